"""DDPM as a Lightning module: losses, hooks, averaged weights and logs, which latent diffusion builds on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm import checkpoint
from ldm.config.instantiate import instantiate_from_config
from ldm.models.diffusion.conditioning import (
    Conditioning,
    DiffusionWrapper,
    condition_batch_size,
    map_tensors,
    normalize_condition,
)
from ldm.models.diffusion.gaussian_diffusion import GaussianProcess
from ldm.models.diffusion.image_log import log_pixel_images
from ldm.models.diffusion.samplers.ancestral import AncestralSampler
from ldm.models.diffusion.samplers.denoiser import SamplingOptions, SamplingRun
from ldm.modules.diffusionmodules.parameterization import get_parameterization
from ldm.modules.ema import LitEma
from ldm.rng import torch_generators_kept

LOSSES = {"l1": nn.functional.l1_loss, "l2": nn.functional.mse_loss}


class DDPM(pl.LightningModule, GaussianProcess):
    """Diffusion in pixel space (arXiv 2006.11239), and everything that latent diffusion shares with it.

    Batches are dicts; `batch[first_stage_key]` holds pictures (B, H, W, C) in [-1, 1].
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        ema_decay: float = 0.9999,
        zero_terminal_snr: bool = False,
    ) -> None:
        super().__init__()
        get_parameterization(parameterization)
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type {loss_type!r}: choose one of {', '.join(LOSSES)}")
        if use_positional_encodings:
            raise ValueError(
                "use_positional_encodings: no published model uses it and it is not supported; leave it false"
            )
        self.parameterization, self.loss_type, self.v_posterior = parameterization, loss_type, v_posterior
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
        self.log_every_t, self.clip_denoised, self.monitor = log_every_t, clip_denoised, monitor
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.learning_rate: float | None = None  # set by whoever trains: main.py works it out from the config
        self.scheduler_config = scheduler_config
        self.cond_stage_model: nn.Module | None = None
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        self._ema_scopes = 0
        if use_ema:
            self.model_ema = LitEma(self.model, decay=ema_decay)
        self.register_schedule(
            given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s, zero_terminal_snr
        )
        self.learn_logvar = learn_logvar
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.restarted_from_ckpt = False
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    # ------------------------------------------------------------------------------------------------------ weights

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load weights from a file; `only_model` takes the denoising network alone. CheckpointError says what is wrong."""
        checkpoint.load_weights(self, path, ignore_keys, only="model." if only_model else None)
        self.restarted_from_ckpt = not only_model

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within it the network has its averaged weights; the trained ones come back whatever happens. Scopes may nest."""
        if not self.use_ema:
            yield
            return
        if self._ema_scopes == 0:
            self.model_ema.store(self.model.parameters())
            self.model_ema.copy_to(self.model)
        self._ema_scopes += 1
        try:
            yield
        finally:
            self._ema_scopes -= 1
            if self._ema_scopes == 0:
                self.model_ema.restore(self.model.parameters())

    # ------------------------------------------------------------------------------------------------------- losses

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """Network output at x_noisy (B, C, H, W) and t (B,) under a condition in any form that callers use."""
        return self.model(x_noisy, t, **normalize_condition(cond, self.model.conditioning_key))

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """The configured distance, averaged or (B, C, H, W)."""
        return LOSSES[self.loss_type](pred, target, reduction="mean" if mean else "none")

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the unconditional model at t (B,) and its named parts (DDPM eq. 12 and 14)."""
        return self._losses(x_start, None, t, noise)

    def _losses(
        self,
        x_start: Tensor,
        cond: Conditioning,
        t: Tensor,
        noise: Tensor | None,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        prefix = "train" if self.training else "val"
        noise = torch.randn_like(x_start) if noise is None else noise
        out = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        per_sample = self.get_loss(out, self.training_target(x_start, noise, t), mean=False).mean(dim=(1, 2, 3))  # (B,)
        logs = {f"{prefix}/loss_simple": per_sample.mean().detach()}
        loss_simple = per_sample
        if weigh is not None:
            loss_simple = weigh(per_sample)
            if self.learn_logvar:
                logs[f"{prefix}/loss_gamma"] = loss_simple.mean().detach()
                logs["logvar"] = self.logvar.detach().mean()
        loss_vlb = (self.lvlb_weights[t] * per_sample).mean()
        logs[f"{prefix}/loss_vlb"] = loss_vlb.detach()
        loss = self.l_simple_weight * loss_simple.mean() + self.original_elbo_weight * loss_vlb
        logs[f"{prefix}/loss"] = loss.detach()
        return loss, logs

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss at timesteps drawn uniformly for each sample."""
        return self.p_losses(x, self.draw_timesteps(x.shape[0]), *args, **kwargs)

    def draw_timesteps(self, batch_size: int) -> Tensor:
        """(B,) int64, uniform in [0, T)."""
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device)

    # -------------------------------------------------------------------------------------------------------- batches

    def batch_value(self, batch: Mapping[str, Any], key: str) -> Any:
        """`batch[key]`, or a ValueError that names the keys which are there."""
        if key not in batch:
            has = ", ".join(sorted(batch))
            raise ValueError(
                f"the batch has no {key!r}, it has {has}: set first_stage_key or cond_stage_key to one of these"
            )
        return batch[key]

    def get_pictures(self, batch: Mapping[str, Any], k: str, bs: int | None = None) -> Tensor:
        """Pictures under key `k` as the network wants them: (B, H, W[, C]) -> (B, C, H, W) float32, contiguous."""
        x = self.batch_value(batch, k)[:bs]
        if x.ndim == 3:
            x = x[..., None]
        return x.to(self.device).permute(0, 3, 1, 2).contiguous().float()

    def get_input(self, batch: Mapping[str, Any], k: str, bs: int | None = None) -> Any:
        """What `forward` takes from a batch: (B, C, H, W)."""
        return self.get_pictures(batch, k, bs)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and named logs of a batch."""
        return self(self.get_input(batch, self.first_stage_key))

    def _batch_size(self, batch: Mapping[str, Any]) -> int:
        return len(self.batch_value(batch, self.first_stage_key))

    # ---------------------------------------------------------------------------------------------------------- hooks

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, logs = self.shared_step(batch)
        size = self._batch_size(batch)
        self.log_dict(logs, logger=True, on_step=True, on_epoch=True, batch_size=size)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=size)
        if self.scheduler_config is not None:
            self.log(
                "lr_abs",
                self.optimizers().param_groups[0]["lr"],
                logger=True,
                on_step=True,
                on_epoch=False,
                batch_size=size,
            )
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Losses with the trained and with the averaged weights, over the same noise each time, so that curves compare."""
        with fixed_noise(batch_idx, self.device):
            _, logs = self.shared_step(batch)
        logs_ema = logs
        if self.use_ema:
            with self.ema_scope(), fixed_noise(batch_idx, self.device):
                _, logs_ema = self.shared_step(batch)
        logs = {**logs, **{f"{name}_ema": value for name, value in logs_ema.items()}}
        self.log_dict(
            logs, logger=True, on_step=False, on_epoch=True, batch_size=self._batch_size(batch), sync_dist=True
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else scaler.get_scale()
        super().optimizer_step(*args, **kwargs)
        skipped = (
            scaler is not None and scaler.get_scale() < scale
        )  # float16 met an infinite gradient and left the weights alone
        if (
            self.use_ema and not skipped
        ):  # here and not at the batch's end: a checkpoint written then must hold this step's average
            self.model_ema(self.model)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    def configure_optimizers(self) -> Any:
        if self.learning_rate is None:
            raise ValueError(
                "learning_rate is not set: assign model.learning_rate first (main.py takes it from base_learning_rate)"
            )
        # On a CPU the fused step saves a Python loop over hundreds of small tensors; on a GPU the default already is foreach.
        fused = True if self.device.type == "cpu" else None
        optimizer = torch.optim.AdamW(self.trainable_parameters(), lr=self.learning_rate, fused=fused)
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config)
        scheduler = {"scheduler": LambdaLR(optimizer, lr_lambda=schedule.schedule), "interval": "step", "frequency": 1}
        return [optimizer], [scheduler]

    @property
    def logging_step(self) -> int:
        """Optimizer steps so far: what names image logs."""
        return self.global_step

    # ------------------------------------------------------------------------------------------------------- sampling

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
        log_every_t: int | None = None,
    ) -> Any:
        """Draw (B, C, H, W) with the ancestral chain, from timestep `timesteps` - 1 (default T - 1) down to 0.

        `shape` is the whole batch's; `return_intermediates` adds the latents on the way.
        """
        shape = (batch_size, self.channels, *latent_size(self.image_size)) if shape is None else tuple(shape)
        size = condition_batch_size(cond)
        if size is not None and size < shape[0]:
            raise ValueError(f"the condition is for {size} samples, batch_size is {shape[0]}")
        if size is not None and size > shape[0]:  # as published: the first samples' conditions
            cond = map_tensors(lambda leaf: leaf[: shape[0]] if torch.is_tensor(leaf) else leaf, cond)
        x = torch.randn(shape, device=self.device) if x_T is None else x_T
        start = self.num_timesteps if timesteps is None else timesteps
        if not 0 <= start <= self.num_timesteps:
            raise ValueError(f"timesteps {start}: choose 0 to {self.num_timesteps}")
        sampler = AncestralSampler(self)
        options = SamplingOptions(clip_denoised=self.clip_denoised, quantize_x0=quantize_denoised)
        run = SamplingRun(self, sampler.checked_steps(self.num_timesteps), x, cond, None, 1.0, options)
        out = sampler.loop(x, run, start, mask, x0, log_every_t=log_every_t or self.log_every_t, verbose=verbose)
        return (out.samples, out.intermediates["x_inter"]) if return_intermediates else out.samples

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, n_row: int = 2, **kwargs: Any) -> dict[str, Tensor]:
        """Pictures of how training goes, each (B, C, H, W) in about [-1, 1]; see ldm.models.diffusion.image_log."""
        return log_pixel_images(self, batch, N, n_row, **kwargs)


@contextmanager
def fixed_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Within it random numbers follow from `seed`; afterwards the generators are where they were."""
    with torch_generators_kept(device):
        torch.manual_seed(seed)
        yield


def latent_size(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
