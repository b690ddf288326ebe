"""Stable Diffusion's fine-tunes, whose networks also take a masked image, a depth map or a low-resolution image."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm import checkpoint
from ldm.checkpoint.names import EMA, ema_name
from ldm.config.instantiate import instantiate_from_config
from ldm.config.types import NonNegativeInt
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.training import freeze
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

logger = logging.getLogger(__name__)

FIRST_CONVOLUTION = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")


class LatentFinetuneDiffusion(LatentDiffusion):
    """Base of the fine-tunes: a network with more input channels that starts from the weights of one without them.

    finetune_keys: weights (and their averages) that `ckpt_path` may hold with fewer input channels. The first
        `keep_finetune_dims` channels are kept, the others start at zero, so the first prediction is the old one.
        None: the file must have the shapes of the model.
    c_concat_log_start, c_concat_log_end: range of the concat channels that the image log decodes as a latent.
    """

    def __init__(
        self,
        *,
        concat_keys: Sequence[str],
        finetune_keys: Sequence[str] | None = FIRST_CONVOLUTION,
        keep_finetune_dims: NonNegativeInt = 4,
        c_concat_log_start: NonNegativeInt | None = None,
        c_concat_log_end: NonNegativeInt | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(concat_keys=concat_keys, **kwargs)
        self.finetune_keys, self.keep_finetune_dims = tuple(finetune_keys or ()), keep_finetune_dims
        self.c_concat_log_start, self.c_concat_log_end = c_concat_log_start, c_concat_log_end

    def load_tensors(
        self, path: str, tensors: Mapping[str, Tensor], ignore_keys: Sequence[str], only_model: bool
    ) -> None:
        """Let `finetune_keys` have fewer input channels in the file. Raises CheckpointError if the shapes do not fit.

        A file without averages starts them from its weights, these channels included.
        """
        own, skip = self.state_dict(), tuple(ignore_keys)
        candidates = [key for key in self.finetune_keys if key in own and not (skip and key.startswith(skip))]
        found = {key: _find(key, tensors) for key in candidates if key.startswith("model." if only_model else "")}
        narrow = {key: tensor for key, tensor in found.items() if tensor is not None and tensor.shape != own[key].shape}
        for key, tensor in narrow.items() if self.trains_adapters else ():
            raise checkpoint.CheckpointError(
                f"{path}: {key} has {tensor.shape[1]} input channels, the model {own[key].shape[1]}; adapters train on "
                "a frozen base: pass the weights of a fine-tuned model"
            )
        super().load_tensors(path, tensors, (*skip, *narrow), only_model)
        for key, tensor in narrow.items():
            self._widen(own[key], tensor, f"{path}: {key}")

    @torch.no_grad()
    def _widen(self, own: Tensor, given: Tensor, name: str) -> None:
        """Fill `own` (C_out, C_in, k, k) with the first channels of `given` and zeros."""
        keep, shape = self.keep_finetune_dims, tuple(own.shape)
        if given.shape[:1] + given.shape[2:] != shape[:1] + shape[2:] or keep > min(given.shape[1], shape[1]):
            raise checkpoint.CheckpointError(
                f"{name} has shape {tuple(given.shape)}, the model's {shape}: they cannot share {keep} input channels"
            )
        own.zero_()
        own[:, :keep] = given[:, :keep]
        logger.info("%s: kept the first %d input channels, %d new ones start at zero", name, keep, shape[1] - keep)

    def further_images(self, batch: Mapping[str, Any], inputs: Tensor, cond: Any) -> dict[str, Tensor]:
        if self.c_concat_log_start is None:
            return {}
        codes = torch.cat(list(cond["c_concat"]), dim=1)[:, self.c_concat_log_start : self.c_concat_log_end]
        return {"c_concat_decoded": self.decode_first_stage(codes)}


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Text-conditional inpainting. The network also takes `mask` of the batch (1 in the hole, else 0) and the latent of
    `masked_image`, the image with a gray hole (0)."""

    def __init__(
        self,
        *,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str | None = "masked_image",
        **kwargs: Any,
    ) -> None:
        super().__init__(concat_keys=concat_keys, masked_image_key=masked_image_key, **kwargs)


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Text-conditional depth-to-image. The network also takes a depth map as one channel.

    The depth (large is near, any unit) is `depth_key` of the batch, (B, H, W[, 1]), or if that is missing the estimate
    of `depth_stage_config` for the images of the only one of `concat_keys`, (B, H, W, 3) in [-1, 1].
    """

    def __init__(
        self,
        *,
        depth_stage_config: Mapping[str, Any] | None = None,
        concat_keys: Sequence[str] = ("midas_in",),
        depth_key: str = "depth",
        **kwargs: Any,
    ) -> None:
        if len(concat_keys) != 1:
            raise ValueError(f"concat_keys {list(concat_keys)}: expected one, the images whose depth is estimated")
        super().__init__(concat_keys=concat_keys, **kwargs)
        self.depth_key, self.depth_stage_key = depth_key, concat_keys[0]
        self.depth_model: Any = None
        if depth_stage_config is not None:
            self.depth_model = freeze(instantiate_from_config(depth_stage_config))

    def further_parts(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> dict[str, Any]:
        return {**self.adm_part(batch, bs), "c_concat": [self.normalized_depth(self.depth_of(batch, bs), size)]}

    @torch.no_grad()
    def depth_of(self, batch: Mapping[str, Any], bs: int | None = None) -> Tensor:
        """Return the given or estimated depth of a batch, (B, 1, H, W) in any unit."""
        if self.depth_key in batch:
            depth = self.get_images(batch, self.depth_key, bs)
            if depth.shape[1] != 1:
                raise ValueError(f"{self.depth_key}: a depth map has one channel, these have {depth.shape[1]}")
            return depth
        if self.depth_model is None:
            raise ValueError(f"the batch has no {self.depth_key!r}; add it, or set depth_stage_config to estimate it")
        return self.depth_model(self.get_images(batch, self.depth_stage_key, bs))

    @staticmethod
    def normalized_depth(depth: Tensor, size: Sequence[int]) -> Tensor:
        """Resize depth (B, 1, H, W) to `size` (h, w) and scale each sample to [-1, 1]."""
        depth = F.interpolate(depth.float(), size=tuple(size), mode="bicubic", align_corners=False)
        low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
        return 2.0 * (depth - low) / (high - low + 0.001) - 1.0  # 0.001: as published, for flat maps

    def further_images(self, batch: Mapping[str, Any], inputs: Tensor, cond: Any) -> dict[str, Tensor]:
        depth = self.normalized_depth(self.depth_of(batch, len(inputs)), inputs.shape[2:])
        return {**super().further_images(batch, inputs, cond), "depth": depth}


class LatentEditDiffusion(LatentFinetuneDiffusion):
    """Edits by instructions (InstructPix2Pix, arXiv 2211.09800). The network also takes the latent of the image before:
    the posterior's mode, not scaled.

    `first_stage_key` of the batch are the edited images; `cond_stage_key` is a dict of the images before, `c_concat`,
    and of the instructions, `c_crossattn`. Images are (B, H, W, 3) or, as published, (B, 3, H, W), in [-1, 1].
    cond_dropout: share of the training samples that lose the instruction, that lose the image (zeros instead of its
        latent), and that lose both, each (section 3.2.1).
    load_ema: false starts the averages from the weights of `ckpt_path` even if it holds averages.
    """

    def __init__(
        self,
        *,
        concat_keys: Sequence[str] = (),
        first_stage_key: str = "edited",
        cond_stage_key: str = "edit",
        cond_dropout: Annotated[float, "[0, 0.33]"] = 0.05,
        load_ema: bool = True,
        **kwargs: Any,
    ) -> None:
        if concat_keys:
            raise ValueError(f"concat_keys {list(concat_keys)}: remove it, the image before is in {cond_stage_key}")
        kwargs |= {"first_stage_key": first_stage_key, "cond_stage_key": cond_stage_key, "cond_dropout": cond_dropout}
        super().__init__(concat_keys=(), **kwargs)
        key = self.model.conditioning_key
        if key != "hybrid":
            raise ValueError(f"conditioning_key {key!r}: LatentEditDiffusion requires hybrid")
        self.load_ema = load_ema

    def load_tensors(
        self, path: str, tensors: Mapping[str, Tensor], ignore_keys: Sequence[str], only_model: bool
    ) -> None:
        if not self.load_ema:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(EMA)}
        super().load_tensors(path, tensors, ignore_keys, only_model)

    def get_images(self, batch: Mapping[str, Any], key: str, bs: int | None = None) -> Tensor:
        x = super().get_images(batch, key, bs)  # (B, C, H, W), or (B, W, C, H) of channels that came first
        return x.permute(0, 2, 3, 1).contiguous() if x.shape[1] != 3 and x.shape[2] == 3 else x

    def raw_condition(self, batch: Mapping[str, Any], key: str, bs: int | None = None) -> Any:
        return super().raw_condition(self.batch_value(batch, key), "c_crossattn", bs)

    def further_parts(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> dict[str, Any]:
        image = self.get_images(self.batch_value(batch, self.cond_stage_key), "c_concat", bs)
        encoded = self.encode_first_stage(image)
        latent = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded  # (B, c, h, w)
        return {**super().further_parts(batch, size, bs), "c_concat": [latent]}

    def drops_main(self, chance: Tensor) -> Tensor:
        return chance < 2 * self.cond_dropout

    def drop_further(self, parts: dict[str, Any], chance: Tensor) -> dict[str, Any]:
        dropped = (self.cond_dropout <= chance) & (chance < 3 * self.cond_dropout)
        (latent,) = parts["c_concat"]
        return {**parts, "c_concat": [latent * ~dropped.to(latent.device)[:, None, None, None]]}

    def further_images(self, batch: Mapping[str, Any], inputs: Tensor, cond: Any) -> dict[str, Tensor]:
        before = self.get_images(self.batch_value(batch, self.cond_stage_key), "c_concat", len(inputs))
        return {**super().further_images(batch, inputs, cond), "before": before}


class LatentUpscaleDiffusion(LatentDiffusion):
    """Text-conditional upscaling. The network also takes a low-resolution image with noise, and its noise level.

    low_scale_config: module that adds the noise, see ldm.modules.diffusionmodules.upscaling.
    low_scale_key: low-resolution images of the batch, (B, h, w, 3) in [-1, 1] with the latent's height and width.
    noise_level_key: levels of the batch, (B,) int64, instead of random ones.
    """

    def __init__(
        self,
        *,
        low_scale_config: Mapping[str, Any],
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        key = self.model.conditioning_key
        if key != "hybrid-adm":
            raise ValueError(f"conditioning_key {key!r}: LatentUpscaleDiffusion requires hybrid-adm")
        self.low_scale_model: Any = freeze(instantiate_from_config(low_scale_config))
        self.low_scale_key, self.noise_level_key = low_scale_key, noise_level_key

    def further_parts(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> dict[str, Any]:
        small = self.get_images(batch, self.low_scale_key, bs)
        check_low_resolution(self.low_scale_key, small, size)
        level = None
        if self.noise_level_key is not None:
            level = self._on_device(self.batch_value(batch, self.noise_level_key)[:bs])
        noised, level = self.low_scale_model(small, level)
        further = super().further_parts(batch, size, bs)
        return {**further, "c_concat": [noised, *further.get("c_concat", ())], "c_adm": level}

    def further_images(self, batch: Mapping[str, Any], inputs: Tensor, cond: Any) -> dict[str, Tensor]:
        x_lr = self.get_images(batch, self.low_scale_key, len(inputs))
        return {"x_lr": x_lr, "x_lr_noised": self.low_scale_model.decode(self.low_scale_model(x_lr)[0])}


class LatentUpscaleFinetuneDiffusion(LatentFinetuneDiffusion):
    """Text-conditional upscaling by a network that also takes low-resolution images of the latent's height and width.

    concat_keys: images of the batch, (B, h, w, C) in [-1, 1]. reshuffle_patch_size: p moves each p x p patch of them to
        the channels, so they may be p times as large.
    low_scale_config: adds noise to those of `low_scale_key`; the noise level then is `c_adm`.
    """

    def __init__(
        self,
        *,
        concat_keys: Sequence[str] = ("lr",),
        reshuffle_patch_size: int | None = None,
        low_scale_config: Mapping[str, Any] | None = None,
        low_scale_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        if low_scale_config is not None and low_scale_key not in concat_keys:
            raise ValueError(f"low_scale_key {low_scale_key!r}: choose one of concat_keys {list(concat_keys)}")
        super().__init__(concat_keys=concat_keys, **kwargs)
        self.reshuffle_patch_size, self.low_scale_key = reshuffle_patch_size, low_scale_key
        self.low_scale_model: Any = None
        if low_scale_config is not None:
            self.low_scale_model = freeze(instantiate_from_config(low_scale_config))

    def further_parts(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> dict[str, Any]:
        parts = self.adm_part(batch, bs)
        images = []
        for key in self.concat_keys:
            x = self.get_images(batch, key, bs)
            if self.reshuffle_patch_size is not None:
                p = self.reshuffle_patch_size
                x = rearrange(x, "b c (p1 h) (p2 w) -> b (p1 p2 c) h w", p1=p, p2=p)
            if self.low_scale_model is not None and key == self.low_scale_key:
                x, parts["c_adm"] = self.low_scale_model(x)
            check_low_resolution(key, x, size)
            images.append(x)
        return {**parts, "c_concat": [torch.cat(images, dim=1)]}


def check_low_resolution(key: str, small: Tensor, size: Sequence[int]) -> None:
    """Raise ValueError unless the images (B, C, h, w) have the latent's `size` (h, w)."""
    if small.shape[2:] != tuple(size):
        given, wanted = ("x".join(map(str, sides)) for sides in (small.shape[2:], size))
        raise ValueError(f"{key}: images of {given} pixels, expected {wanted}, the latent's size")


def _find(key: str, given: Mapping[str, Tensor]) -> Tensor | None:
    """Return the file's tensor for `key`; for an average, if the file has none at all, the weight itself."""
    bare = key.removeprefix("model.")  # in a file of the network alone
    if key in given or bare in given:
        return given[key] if key in given else given[bare]
    if key.startswith(EMA) and not any(name.startswith(EMA) for name in given):
        return next((tensor for name, tensor in given.items() if ema_name(name, key.__eq__) == key), None)
    return None
