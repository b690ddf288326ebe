"""Image logs of diffusion models: inputs, reconstructions, conditions, samples and intermediate steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.models.diffusion.samplers.ancestral import AncestralSampler
from ldm.models.diffusion.samplers.base import Samples
from ldm.models.diffusion.samplers.ddim import DDIMSampler
from ldm.modules.encoders.modules import SpatialRescaler
from ldm.util import isimage, ismap, log_txt_as_img
from ldm.visualize import labels_to_rgb

if TYPE_CHECKING:  # ddpm is built on this module
    from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion

GUIDANCE_SCALE = 3.0  # default of models trained with cond_dropout


def log_pixel_images(
    model: DDPM,
    batch: Mapping[str, Any],
    N: int,
    n_row: int,
    sample: bool = True,
    return_keys: Sequence[str] | None = None,
    split: str = "train",
    plot_diffusion_rows: bool = True,
) -> dict[str, Tensor]:
    """Return inputs, diffusion_row, samples and denoise_row of a DDPM, each (B, C, H, W) in about [-1, 1]."""
    x = model.get_images(batch, model.first_stage_key, N)
    log = {"inputs": x}
    if plot_diffusion_rows:
        log["diffusion_row"] = tile_frames(_noised(model, x[:n_row]))
    if sample:
        with model.ema_scope("Plotting"):
            samples, inter = model.sample(batch_size=len(x), return_intermediates=True)
        log["samples"] = samples
        log["denoise_row"] = tile_frames([frame[:n_row] for frame in inter])
    return _selected(log, return_keys)


def log_latent_images(
    model: LatentDiffusion,
    batch: Mapping[str, Any],
    N: int,
    n_row: int,
    sample: bool = True,
    ddim_steps: int | None = 50,
    ddim_eta: float = 1.0,
    return_keys: Sequence[str] | None = None,
    quantize_denoised: bool = False,
    inpaint: bool = False,
    plot_denoise_rows: bool = True,
    plot_progressive_rows: bool = False,
    plot_diffusion_rows: bool = True,
    unconditional_guidance_scale: float | None = None,
    unconditional_guidance_label: Any = None,
    use_ema_scope: bool = True,
    split: str = "train",
) -> dict[str, Tensor]:
    """Return images of a latent diffusion model, each (B, C, H, W) in about [-1, 1].

    Always `inputs` and `reconstruction`; `conditioning`, and an image for each of `concat_keys`, if there are any.
    `ddim_steps` None means the ancestral sampler. A model trained with `cond_dropout` also logs `samples_cfg_scale_...`
    under classifier-free guidance, at `unconditional_guidance_scale` (default 3), which may be given without `sample`
    too. `return_keys` selects images; raises ValueError for an unknown one.
    """
    # get_input is the hook that downstream models override to add to the condition.
    z, c, x, reconstruction, raw_c = model.get_input(
        batch,
        model.first_stage_key,
        return_first_stage_outputs=True,
        force_c_encode=True,
        return_original_cond=True,
        bs=N,
    )
    log = {"inputs": x, "reconstruction": reconstruction, **condition_images(model, batch, raw_c, x, z.shape[2:])}

    def decoded_rows(frames: Sequence[Tensor]) -> Tensor:
        return tile_frames([model.decode_first_stage(frame[:n_row]) for frame in frames])

    def generate(**kwargs: Any) -> Samples:
        with model.ema_scope("Plotting") if use_ema_scope else nullcontext():
            return _sample(model, c, z.shape, ddim_steps, ddim_eta, **kwargs)

    def decoded_samples(**kwargs: Any) -> Tensor:
        return model.decode_first_stage(generate(**kwargs).samples)

    if plot_diffusion_rows:
        log["diffusion_row"] = decoded_rows(_noised(model, z[:n_row]))
    if sample:
        samples, inter = generate()
        log["samples"] = model.decode_first_stage(samples)
        if plot_denoise_rows:
            log["denoise_row"] = decoded_rows(inter["x_inter"])
        if plot_progressive_rows:
            log["progressive_row"] = decoded_rows(inter["pred_x0"])
        if quantize_denoised:
            log["samples_x0_quantized"] = decoded_samples(quantize_x0=True)
        if inpaint:
            mask = _center_hole(z)
            log["samples_inpainting"] = decoded_samples(mask=mask, x0=z)
            log["mask"] = mask.expand(len(z), 1, *z.shape[2:]) * 2 - 1
            log["samples_outpainting"] = decoded_samples(mask=1 - mask, x0=z)
    scale = unconditional_guidance_scale
    if scale is None:
        scale = GUIDANCE_SCALE if sample and c is not None and model.cond_dropout > 0 else 1.0
    if scale != 1.0:
        uncond = model.unconditional_like(c, raw_c, len(z), unconditional_guidance_label)
        log[f"samples_cfg_scale_{scale:.2f}"] = decoded_samples(
            unconditional_guidance_scale=scale, unconditional_conditioning=uncond
        )
    log |= model.further_images(batch, x, c)
    return _selected(log, return_keys)


def _selected(log: dict[str, Tensor], keys: Sequence[str] | None) -> dict[str, Tensor]:
    if keys is None:
        return log
    unknown = set(keys) - set(log)
    if unknown:
        raise ValueError(f"return_keys {sorted(unknown)}: this model logs {', '.join(log)}")
    return {key: log[key] for key in keys}


def _sample(
    model: LatentDiffusion, cond: Any, shape: Sequence[int], ddim_steps: int | None, ddim_eta: float, **kwargs: Any
) -> Samples:
    """Sample by DDIM with at most as many steps as the model has, or by the ancestral sampler."""
    batch_size, *latent = shape
    if ddim_steps is None:
        kwargs |= {"clip_denoised": model.clip_denoised, "log_every_t": model.log_every_t, "verbose": False}
        return AncestralSampler(model).sample(model.num_timesteps, batch_size, latent, cond, **kwargs)
    steps = min(ddim_steps, model.num_timesteps)
    kwargs |= {"eta": ddim_eta, "log_every_t": max(1, steps // 8), "verbose": False}
    return DDIMSampler(model).sample(steps, batch_size, latent, cond, **kwargs)


def tile_frames(frames: Sequence[Tensor]) -> Tensor:
    """Tile frames (B, C, H, W) over time to one image (1, C, B*H, n*W): a row for each sample."""
    return rearrange(torch.stack(list(frames)), "n b c h w -> 1 c (b h) (n w)")


def _noised(model: DDPM, x: Tensor) -> list[Tensor]:
    """x (B, C, H, W) at every `log_every_t`-th timestep of the forward process, all with the same noise."""
    noise = torch.randn_like(x)
    T = model.num_timesteps
    times = sorted({*range(0, T, min(model.log_every_t, max(1, T // 4))), T - 1})
    return [model.q_sample(x, torch.full((len(x),), t, device=x.device, dtype=torch.long), noise) for t in times]


def condition_images(
    model: LatentDiffusion, batch: Mapping[str, Any], raw_c: Any, x: Tensor, size: Sequence[int]
) -> dict[str, Tensor]:
    """Return the conditions of images x (B, C, H, W) as the network sees them, at the size that it gets.

    raw_c: the raw main condition, None without one; size: (h, w) of the latents.
    """
    log: dict[str, Tensor] = {}
    if torch.is_tensor(raw_c) and isinstance(model.cond_stage_model, SpatialRescaler):
        raw_c = model.cond_stage_model.rescale(raw_c.float())
    shown = None if raw_c is None else _shown(batch, raw_c, x)
    if shown is not None:
        log["conditioning"] = shown
    for key in model.concat_keys:
        if key in batch:  # a depth map may replace it
            image = model.get_images(batch, key, len(x))
            if key != model.masked_image_key:  # which the first stage encodes whole
                image = F.interpolate(image, size=tuple(size))
            if isimage(image):
                log[f"conditioning_{key}"] = image
    return log


def _shown(batch: Mapping[str, Any], raw_c: Any, x: Tensor) -> Tensor | None:
    """A raw condition as images: text and class names as text, maps in colors, images unchanged."""
    size = max(x.shape[3], 128), max(x.shape[2], 128)  # at least this much, to be legible
    font_size = max(10, size[0] // 25)
    labels = next(iter(raw_c.values())) if isinstance(raw_c, Mapping) else raw_c
    if torch.is_tensor(labels) and labels.ndim == 1:
        names = batch.get("human_label") or [str(label) for label in labels.tolist()]
        return log_txt_as_img(size, list(names)[: len(x)], size=font_size)
    if isinstance(raw_c, list):
        return log_txt_as_img(size, [str(text) for text in raw_c], size=font_size)
    if isimage(raw_c):
        return raw_c
    if ismap(raw_c):
        return labels_to_rgb(raw_c)  # by the largest channel: one-hot maps and scores alike
    return None


def _center_hole(z: Tensor) -> Tensor:
    """Return a mask (1, 1, h, w) of ones with zeros in the middle quarter."""
    h, w = z.shape[2:]
    mask = torch.ones(1, 1, h, w, device=z.device)
    mask[:, :, h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 0.0
    return mask
