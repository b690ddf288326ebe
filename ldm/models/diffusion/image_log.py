"""What the image log shows of a diffusion model: inputs, reconstructions, conditions, samples and how they come about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ldm.models.diffusion.samplers.ancestral import AncestralSampler
from ldm.models.diffusion.samplers.base import Samples
from ldm.models.diffusion.samplers.ddim import DDIMSampler
from ldm.util import isimage, ismap, log_txt_as_img
from ldm.visualize import labels_to_rgb

GUIDANCE_SCALE = 3.0  # of the guided samples that a model trained with cond_dropout logs by itself


def log_pixel_images(
    model: Any,
    batch: Mapping[str, Any],
    N: int,
    n_row: int,
    split: str = "train",
    sample: bool = True,
    plot_diffusion_rows: bool = True,
) -> dict[str, Tensor]:
    """Pictures of a DDPM in pixel space, each (B, C, H, W) in about [-1, 1]: inputs, diffusion_row, samples, denoise_row."""
    x = model.get_pictures(batch, model.first_stage_key, N)
    log = {"inputs": x}
    if plot_diffusion_rows:
        log["diffusion_row"] = film(_noised(model, x[:n_row]))
    if sample:
        with model.ema_scope("Plotting"):
            samples, inter = model.sample(batch_size=len(x), return_intermediates=True)
        log["samples"] = samples
        log["denoise_row"] = film([frame[:n_row] for frame in inter])
    return log


def log_latent_images(
    model: Any,
    batch: Mapping[str, Any],
    N: int,
    n_row: int,
    split: str = "train",
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
) -> dict[str, Tensor]:
    """Pictures of a latent diffusion model, each (B, C, H, W) in about [-1, 1].

    Always `inputs` and `reconstruction`, and `conditioning` (with a picture for each of `concat_keys`) where there is one.
    `ddim_steps` None means the whole ancestral chain. A model trained with `cond_dropout` also logs `samples_cfg_scale_...`
    under classifier-free guidance, at `unconditional_guidance_scale` (default 3). `return_keys` keeps only these pictures;
    ValueError for an unknown one.
    """
    # Through the published hook, which downstream models override to add to the condition.
    z, c, x, reconstruction, raw_c = model.get_input(
        batch,
        model.first_stage_key,
        return_first_stage_outputs=True,
        force_c_encode=True,
        return_original_cond=True,
        bs=N,
    )
    log = {"inputs": x, "reconstruction": reconstruction}
    shown = _condition_pictures(model, batch, raw_c, x)
    if shown is not None:
        log["conditioning"] = shown
    for key in model.concat_keys:
        joined = (
            model.get_pictures(batch, key, N) if key in batch else None
        )  # a depth map may be there in the place of its picture
        if isimage(joined):
            log[f"conditioning_{key}"] = joined
    if plot_diffusion_rows:
        log["diffusion_row"] = film([model.decode_first_stage(frame) for frame in _noised(model, z[:n_row])])

    def draw(**kwargs: Any) -> Samples:
        with model.ema_scope("Plotting"):
            return sample_log(model, c, z.shape, ddim_steps, ddim_eta, **kwargs)

    if sample:
        samples, inter = draw()
        log["samples"] = model.decode_first_stage(samples)
        if plot_denoise_rows:
            log["denoise_row"] = film([model.decode_first_stage(frame[:n_row]) for frame in inter["x_inter"]])
        if plot_progressive_rows:
            log["progressive_row"] = film([model.decode_first_stage(frame[:n_row]) for frame in inter["pred_x0"]])
        if quantize_denoised:
            log["samples_x0_quantized"] = model.decode_first_stage(draw(quantize_x0=True).samples)
        if unconditional_guidance_scale is None and c is not None and model.cond_dropout > 0:
            unconditional_guidance_scale = GUIDANCE_SCALE
        if unconditional_guidance_scale is not None and unconditional_guidance_scale != 1.0:
            uncond = model.unconditional_like(c, raw_c, len(z), unconditional_guidance_label)
            guided = draw(unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=uncond)
            log[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = model.decode_first_stage(guided.samples)
        if inpaint:
            mask = _centre_hole(z)
            log["samples_inpainting"] = model.decode_first_stage(draw(mask=mask, x0=z).samples)
            log["mask"] = mask.expand(len(z), 1, *z.shape[2:]) * 2 - 1
            log["samples_outpainting"] = model.decode_first_stage(draw(mask=1 - mask, x0=z).samples)
    if return_keys is not None:
        unknown = set(return_keys) - set(log)
        if unknown:
            raise ValueError(f"return_keys {sorted(unknown)}: this model logs {', '.join(log)}")
        log = {key: log[key] for key in return_keys}
    return log


def sample_log(
    model: Any, cond: Any, shape: Sequence[int], ddim_steps: int | None, ddim_eta: float, **kwargs: Any
) -> Samples:
    """Samples for a log: DDIM with at most as many steps as the model has, or the ancestral chain where `ddim_steps` is None."""
    batch_size, *latent = shape
    if ddim_steps is not None:
        steps = min(ddim_steps, model.num_timesteps)
        every = max(1, steps // 8)
        return DDIMSampler(model).sample(
            steps, batch_size, latent, cond, eta=ddim_eta, verbose=False, log_every_t=every, **kwargs
        )
    kwargs |= {"verbose": False, "log_every_t": model.log_every_t, "clip_denoised": model.clip_denoised}
    return AncestralSampler(model).sample(model.num_timesteps, batch_size, latent, cond, **kwargs)


def film(frames: Sequence[Tensor]) -> Tensor:
    """Frames (B, C, H, W) over time as one picture (1, C, B*H, n*W): a row for each sample."""
    return rearrange(torch.stack(list(frames)), "n b c h w -> 1 c (b h) (n w)")


def _noised(model: Any, x: Tensor) -> list[Tensor]:
    """x (B, C, H, W) at every `log_every_t`-th timestep of the forward process, with the same noise in all."""
    noise = torch.randn_like(x)
    T = model.num_timesteps
    times = sorted({*range(0, T, min(model.log_every_t, max(1, T // 4))), T - 1})
    return [model.q_sample(x, torch.full((len(x),), t, device=x.device, dtype=torch.long), noise) for t in times]


def _condition_pictures(model: Any, batch: Mapping[str, Any], raw_c: Any, x: Tensor) -> Tensor | None:
    """The condition as pictures beside the inputs: text and class names drawn, maps coloured, pictures as they are."""
    if raw_c is None:
        return None
    height, width = (max(side, 128) for side in x.shape[2:])  # text in the size of small pictures could not be read
    font_size = max(10, width // 25)
    labels = next(iter(raw_c.values())) if isinstance(raw_c, Mapping) else raw_c
    if torch.is_tensor(labels) and labels.ndim == 1:
        names = batch.get("human_label") or [str(label) for label in labels.tolist()]
        return log_txt_as_img((width, height), list(names)[: len(x)], size=font_size)
    if isinstance(raw_c, list):
        return log_txt_as_img((width, height), [str(text) for text in raw_c], size=font_size)
    if isimage(raw_c):
        return raw_c
    if ismap(raw_c):
        return labels_to_rgb(raw_c)  # the largest channel counts: one-hot maps and scores alike
    return None


def _centre_hole(z: Tensor) -> Tensor:
    """(1, 1, h, w): 1 but for 0 in the middle quarter."""
    h, w = z.shape[2:]
    mask = torch.ones(1, 1, h, w, device=z.device)
    mask[:, :, h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 0.0
    return mask
