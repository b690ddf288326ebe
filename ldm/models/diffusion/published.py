"""Members that research code takes from the published DDPM and LatentDiffusion.

The reverse process here is what `sample` runs, so a subclass may override any of its steps. The rest are thin aliases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ldm.config.suggest import log_unused
from ldm.models.diffusion.conditioning import Conditioning, condition_batch_size, map_tensors
from ldm.models.diffusion.gaussian_diffusion import Gaussian, GaussianDiffusion
from ldm.models.diffusion.samplers.denoiser import ScoreCorrector
from ldm.modules.diffusionmodules.parameterization import get_parameterization
from ldm.modules.diffusionmodules.schedule import noise_like
from ldm.visualize import labels_to_rgb

StepCallback = Callable[[int], None] | None
ImageCallback = Callable[[Tensor, int], None] | None


class PublishedDDPM(GaussianDiffusion):
    """Reverse process p(x_{t-1} | x_t) (DDPM, arXiv 2006.11239, Algorithm 2) with the published signatures.

    Those of LatentDiffusion also take a condition, so these name theirs in the docstring.
    """

    apply_model: Callable[..., Tensor]
    latent_shape: Callable[[], tuple[int, int, int]]
    clip_denoised: bool
    log_every_t: int
    first_stage_model: Any
    ucg_training: Mapping[str, Any] | None = None  # Stability's condition dropout; here it is `cond_dropout`

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return x_0 (B, C, H, W) from x_t and its v at t (B,)."""
        return get_parameterization("v").to_x0(x_t, v, *self._alpha_sigma(t, x_t))

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return the noise (B, C, H, W) from x_t and its v at t (B,)."""
        return get_parameterization("v").to_eps(x_t, v, *self._alpha_sigma(t, x_t))

    def p_mean_variance(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """p_mean_variance(x, t, clip_denoised) -> (mean, variance, log-variance) of p(x_{t-1} | x_t)."""
        return self._reverse(x, None, *args, **kwargs)[0]

    @torch.no_grad()
    def p_sample(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """p_sample(x, t, clip_denoised=True, repeat_noise=False) -> a sample of p(x_{t-1} | x_t), (B, C, H, W)."""
        return self._sample_pixels(x, *args, **kwargs)

    def _sample_pixels(self, x: Tensor, t: Tensor, clip_denoised: bool = True, repeat_noise: bool = False) -> Tensor:
        mean, _, log_variance = self.p_mean_variance(x=x, t=t, clip_denoised=clip_denoised)
        return _sample(mean, log_variance, t, repeat_noise)

    @torch.no_grad()
    def p_sample_loop(self, *args: Any, **kwargs: Any) -> Any:
        """p_sample_loop(shape, return_intermediates=False) -> samples of `shape` (B, C, H, W)[, list of latents]."""
        return self._loop_pixels(*args, **kwargs)

    def _loop_pixels(self, shape: Sequence[int], return_intermediates: bool = False) -> Any:
        def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            x = self.p_sample(x, t, clip_denoised=self.clip_denoised)
            return x, x

        x = torch.randn(tuple(shape), device=self.betas.device)
        x, latents, _ = self._denoise(step, x, self.num_timesteps, self.log_every_t)
        return (x, latents) if return_intermediates else x

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """sample(batch_size=16, return_intermediates=False) -> samples (B, C, H, W)[, list of latents]."""
        return self._sample_batch(*args, **kwargs)

    def _sample_batch(self, batch_size: int = 16, return_intermediates: bool = False) -> Any:
        return self.p_sample_loop((batch_size, *self.latent_shape()), return_intermediates=return_intermediates)

    def _reverse(
        self,
        x: Tensor,
        cond: Conditioning,
        t: Tensor,
        clip_denoised: bool,
        quantize: bool = False,
        corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Gaussian, Tensor]:
        """Return p(x_{t-1} | x_t) at t (B,) and the predicted x_0 (eq. 7)."""
        alpha, sigma = self._alpha_sigma(t, x)
        network = get_parameterization(self.parameterization)
        out = self.apply_model(x, t, cond)
        x_0 = network.to_x0(x, out, alpha, sigma)
        if corrector is not None and bool((alpha > 0).all()):  # in pure noise there is no signal to correct
            eps = network.to_eps(x, out, alpha, sigma)
            x_0 = (x - sigma * corrector.modify_score(self, eps, x, t, cond, **(corrector_kwargs or {}))) / alpha
        if clip_denoised:
            x_0 = x_0.clamp(-1.0, 1.0)
        if quantize:
            x_0 = self.first_stage_model.quantize(x_0)[0]
        return self.q_posterior(x_0, x, t), x_0

    def _denoise(
        self,
        step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        x: Tensor,
        start: int,
        log_every_t: int,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        callback: StepCallback = None,
        img_callback: ImageCallback = None,
        verbose: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Take `step` at timesteps `start` - 1 to 0 -> (x, latents, predictions of x_0 at every `log_every_t`-th)."""
        if not 0 <= start <= self.num_timesteps:
            raise ValueError(f"timesteps {start}: choose 0 to {self.num_timesteps}")
        if mask is not None and (x0 is None or mask.shape[-2:] != x0.shape[-2:]):
            raise ValueError("mask needs x0 of the same height and width, the latent that is kept where the mask is 1")
        latents, predictions = [x], []
        for i in tqdm(reversed(range(start)), desc="DDPM", total=start, disable=not verbose, leave=False):
            t = torch.full((len(x),), i, device=x.device, dtype=torch.long)
            x, pred_x0 = step(x, t)
            if mask is not None and x0 is not None:
                x = self.q_sample(x0, t) * mask + (1.0 - mask) * x
            if i % log_every_t == 0 or i == start - 1:
                latents.append(x)
                predictions.append(pred_x0)
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(x, i)
        return x, latents, predictions


class PublishedLatentDiffusion(PublishedDDPM):
    """The reverse process under a condition, and the published helpers of the image log."""

    decode_first_stage: Callable[..., Tensor]

    def p_mean_variance(
        self,
        x: Tensor,
        c: Conditioning,
        t: Tensor,
        clip_denoised: bool,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return (mean, variance, log-variance[, predicted x_0]) of p(x_{t-1} | x_t, c) at t (B,)."""
        if return_codebook_ids:
            raise ValueError("return_codebook_ids is not supported: no published model predicts codebook ids")
        p, x_0 = self._reverse(x, c, t, clip_denoised, quantize_denoised, score_corrector, corrector_kwargs)
        return (*p, x_0) if return_x0 else p

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        c: Conditioning,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return a sample of p(x_{t-1} | x_t, c), (B, C, H, W)[, and the predicted x_0]."""
        mean, _, log_variance, *x_0 = self.p_mean_variance(
            x=x,
            c=c,
            t=t,
            clip_denoised=clip_denoised,
            return_codebook_ids=return_codebook_ids,
            quantize_denoised=quantize_denoised,
            return_x0=return_x0,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        x = _sample(mean, log_variance, t, repeat_noise, temperature, noise_dropout)
        return (x, *x_0) if return_x0 else x

    @torch.no_grad()
    def p_sample_loop(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        callback: StepCallback = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: ImageCallback = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> Any:
        """Return samples of `shape` (B, C, H, W)[, and the start and every `log_every_t`-th latent].

        The first timestep is min(timesteps, start_T) - 1, by default T - 1. Where `mask` is 1 the result keeps `x0`.
        `callback(t)` and `img_callback(x, t)` run after the step at timestep t.
        """
        x, latents, _ = self._denoise(
            self._latent_step(cond, quantize_denoised=quantize_denoised),
            torch.randn(tuple(shape), device=self.betas.device) if x_T is None else x_T,
            self._start(timesteps, start_T),
            log_every_t or self.log_every_t,
            mask,
            x0,
            callback,
            img_callback,
            verbose,
        )
        return (x, latents) if return_intermediates else x

    @torch.no_grad()
    def progressive_denoising(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        verbose: bool = True,
        callback: StepCallback = None,
        quantize_denoised: bool = False,
        img_callback: ImageCallback = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        x_T: Tensor | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return samples, and the predicted x_0 of every `log_every_t`-th step.

        `shape` is (B, C, H, W), or (C, H, W) with `batch_size`. Other arguments: see `p_sample_loop` and `p_sample`.
        """
        shape = tuple(shape) if batch_size is None else (batch_size, *shape)
        step = self._latent_step(
            first_samples(cond, shape[0]),
            quantize_denoised=quantize_denoised,
            temperature=temperature,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        x = torch.randn(shape, device=self.betas.device) if x_T is None else x_T
        every = log_every_t or self.log_every_t
        start = self._start(None, start_T)
        x, _, predictions = self._denoise(step, x, start, every, mask, x0, callback, img_callback, verbose)
        return x, predictions

    @torch.no_grad()
    def sample(
        self,
        cond: Conditioning = None,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = False,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return samples (B, C, H, W)[, list of latents] of the ancestral sampler, see `p_sample_loop`.

        `shape` is that of the whole batch. Of a larger condition the first samples are used.
        """
        known = {
            name: kwargs.pop(name) for name in ("callback", "img_callback", "start_T", "log_every_t") if name in kwargs
        }
        log_unused(f"{type(self).__name__}.sample", kwargs, known)
        shape = (batch_size, *self.latent_shape()) if shape is None else tuple(shape)
        return self.p_sample_loop(
            first_samples(cond, shape[0]),
            shape,
            return_intermediates=return_intermediates,
            x_T=x_T,
            verbose=verbose,
            timesteps=timesteps,
            quantize_denoised=quantize_denoised,
            mask=mask,
            x0=x0,
            **known,
        )

    def _latent_step(self, cond: Conditioning, **options: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return lambda x, t: self.p_sample(x, cond, t, clip_denoised=self.clip_denoised, return_x0=True, **options)

    def _start(self, timesteps: int | None, start_T: int | None) -> int:
        given = [steps for steps in (timesteps, start_T) if steps is not None]
        return min(given, default=self.num_timesteps)

    def to_rgb(self, x: Tensor) -> Tensor:
        """Color maps of labels by their largest channel: (B, labels, H, W) -> (B, 3, H, W) in [-1, 1]."""
        return labels_to_rgb(x)

    def _get_denoise_row_from_list(
        self, samples: Sequence[Tensor], desc: str = "", force_no_decoder_quantization: bool = False
    ) -> Tensor:
        """Decode latents (B, c, h, w) over time and tile them: (C, B * H, n * W), a row for each sample."""
        frames = [
            self.decode_first_stage(z.to(self.betas.device), force_not_quantize=force_no_decoder_quantization)
            for z in tqdm(samples, desc=desc, disable=not desc, leave=False)
        ]
        return rearrange(torch.stack(frames), "n b c h w -> c (b h) (n w)")


def uniform_on_device(r1: float, r2: float, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Return uniform random numbers between r1 and r2."""
    return torch.rand(tuple(shape), device=device) * (r1 - r2) + r2


def first_samples(cond: Conditioning, batch_size: int) -> Conditioning:
    """Return the condition of the first `batch_size` samples. Raises ValueError if it is for fewer."""
    size = condition_batch_size(cond)
    if size is not None and size < batch_size:
        raise ValueError(f"the condition is for {size} samples, batch_size is {batch_size}")
    return cond if size is None or size == batch_size else map_tensors(lambda tensor: tensor[:batch_size], cond)


def _sample(
    mean: Tensor,
    log_variance: Tensor,
    t: Tensor,
    repeat_noise: bool = False,
    temperature: float = 1.0,
    noise_dropout: float = 0.0,
) -> Tensor:
    """Sample the normal distribution; its mean at t = 0."""
    noise = noise_like(mean.shape, mean.device, repeat_noise).to(mean.dtype) * temperature
    if noise_dropout > 0.0:
        noise = F.dropout(noise, p=noise_dropout)
    adds_noise = (t > 0).reshape(-1, *(1 for _ in mean.shape[1:])).to(mean.dtype)
    return mean + adds_noise * (0.5 * log_variance).exp() * noise
