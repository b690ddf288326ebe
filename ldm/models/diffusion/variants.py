"""Stable Diffusion's fine-tunes: text-to-image models that see a masked picture, a depth map or a small picture beside the noisy latent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import checkpoint
from ldm.checkpoint.names import EMA, ema_name
from ldm.config.instantiate import instantiate_from_config
from ldm.models.diffusion.latent import LatentDiffusion

logger = logging.getLogger(__name__)

FIRST_CONVOLUTION = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")


class LatentFinetuneDiffusion(LatentDiffusion):
    """Base of the fine-tunes: a network with further input channels that starts from the weights of one without them.

    finetune_keys: the weights (and their averages) that `ckpt_path` may hold for fewer input channels: the first `keep_finetune_dims` of
    them are kept and the others start at zero, so that the first prediction is the old one. None: the file has to fit as it is.
    c_concat_log_start, c_concat_log_end: which of the concatenated channels are a latent that the image log shows decoded.
    """

    def __init__(
        self,
        *args: Any,
        concat_keys: Sequence[str],
        finetune_keys: Sequence[str] | None = FIRST_CONVOLUTION,
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, concat_keys=concat_keys, **kwargs)
        self.finetune_keys, self.keep_finetune_dims = tuple(finetune_keys or ()), keep_finetune_dims
        self.c_concat_log_start, self.c_concat_log_end = c_concat_log_start, c_concat_log_end
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load weights from a file, see LatentDiffusion; `finetune_keys` may have fewer input channels there.

        A file without averages starts them from its weights, these channels included. CheckpointError where the shapes do not allow it.
        """
        given, own, skip = checkpoint.read_weights(path), self.state_dict(), tuple(ignore_keys)
        candidates = [key for key in self.finetune_keys if key in own and not (skip and key.startswith(skip))]
        found = {key: _find(key, given) for key in candidates if key.startswith("model." if only_model else "")}
        narrow = {key: tensor for key, tensor in found.items() if tensor is not None and tensor.shape != own[key].shape}
        super().init_from_ckpt(path, (*skip, *narrow), only_model)
        for key, tensor in narrow.items():
            self._widen(own[key], tensor, f"{path}: {key}")

    def _widen(self, own: Tensor, given: Tensor, what: str) -> None:
        """Fill `own` (C_out, C_in, k, k) with the first channels of `given`, and with zeros."""
        keep = self.keep_finetune_dims
        if given.shape[:1] + given.shape[2:] != own.shape[:1] + own.shape[2:] or keep > min(
            given.shape[1], own.shape[1]
        ):
            raise checkpoint.CheckpointError(
                f"{what} has shape {tuple(given.shape)}, the model's {tuple(own.shape)}: these cannot share {keep} input channels"
            )
        with torch.no_grad():
            own.zero_()
            own[:, :keep] = given[:, :keep]
        logger.info(
            "%s: the first %d input channels are kept, %d new ones start at zero", what, keep, own.shape[1] - keep
        )

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, **kwargs: Any) -> dict[str, Tensor]:
        log = super().log_images(batch, N, n_row, **kwargs)
        if self.c_concat_log_start is not None and kwargs.get("return_keys") is None:
            _, c = self.get_input(batch, self.first_stage_key, force_c_encode=True, bs=N)
            codes = torch.cat(list(c["c_concat"]), dim=1)[:, self.c_concat_log_start : self.c_concat_log_end]
            log["c_concat_decoded"] = self.decode_first_stage(codes)
        return log


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Text to image around what is kept of a picture: the network sees the mask (1 in the hole, else 0) and the latent of the picture
    whose hole is grey (0), which are `mask` and `masked_image` of the batch, beside the noisy latent."""

    def __init__(
        self,
        *args: Any,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str | None = "masked_image",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, concat_keys=concat_keys, masked_image_key=masked_image_key, **kwargs)


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Text to image in the depth of a picture, which the network sees as one channel beside the noisy latent.

    The depth, near is large, in any unit, comes from the batch's `depth_key` (B, H, W[, 1]) where it is there, else from the network of
    `depth_stage_config` for the pictures under the one of `concat_keys`, (B, H, W, 3) in [-1, 1].
    """

    def __init__(
        self,
        *args: Any,
        depth_stage_config: Mapping[str, Any] | None = None,
        concat_keys: Sequence[str] = ("midas_in",),
        depth_key: str = "depth",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        if len(concat_keys) != 1:
            raise ValueError(
                f"concat_keys {list(concat_keys)}: give the one key of the pictures whose depth is estimated"
            )
        super().__init__(*args, concat_keys=concat_keys, **kwargs)
        self.depth_key, self.depth_stage_key = depth_key, concat_keys[0]
        self.depth_model = None if depth_stage_config is None else instantiate_from_config(depth_stage_config)
        if self.depth_model is not None:
            self.depth_model.requires_grad_(False).eval()
        if ckpt_path is not None:  # after all of its parts are there
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def train(self, mode: bool = True) -> LatentDepth2ImageDiffusion:
        super().train(mode)
        if getattr(self, "depth_model", None) is not None:
            self.depth_model.eval()
        return self

    def further_parts(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> dict[str, Any]:
        parts = {} if self.adm_key is None else {"c_adm": self._on_device(self.batch_value(batch, self.adm_key)[:bs])}
        return {**parts, "c_concat": [self.normalized_depth(self.depth_of(batch, bs), size)]}

    @torch.no_grad()
    def depth_of(self, batch: Mapping[str, Any], bs: int | None = None) -> Tensor:
        """The batch's depth, given or estimated: (B, 1, H, W), in any unit."""
        if self.depth_key in batch:
            depth = self.get_pictures(batch, self.depth_key, bs)
            if depth.shape[1] != 1:
                raise ValueError(f"{self.depth_key}: a depth map has one channel, these have {depth.shape[1]}")
            return depth
        if self.depth_model is None:
            raise ValueError(
                f"the batch has no {self.depth_key!r} and the model no depth_stage_config that could estimate it"
            )
        return self.depth_model(self.get_pictures(batch, self.depth_stage_key, bs))

    @staticmethod
    def normalized_depth(depth: Tensor, size: Sequence[int]) -> Tensor:
        """Depth (B, 1, H, W) as the network sees it: in `size` (h, w), and each sample's range as [-1, 1]."""
        depth = F.interpolate(depth.float(), size=tuple(size), mode="bicubic", align_corners=False)
        low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
        return 2.0 * (depth - low) / (high - low + 0.001) - 1.0  # 0.001: as published, for flat maps

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, **kwargs: Any) -> dict[str, Tensor]:
        log = super().log_images(batch, N, n_row, **kwargs)
        if kwargs.get("return_keys") is None:
            log["depth"] = self.normalized_depth(self.depth_of(batch, N), log["inputs"].shape[2:])
        return log


class LatentUpscaleDiffusion(LatentDiffusion):
    """Text to image under a small picture of the latent's height and width, to which noise of a level that the network is told was added.

    low_scale_config: what adds it, ldm.modules.diffusionmodules.upscaling. low_scale_key: the small pictures of the batch, (B, h, w, 3) in
    [-1, 1]. noise_level_key: levels of the batch, (B,) int64, instead of random ones.
    """

    def __init__(
        self,
        *args: Any,
        low_scale_config: Mapping[str, Any],
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.model.conditioning_key != "hybrid-adm":
            raise ValueError(
                f"conditioning_key {self.model.conditioning_key!r}: LatentUpscaleDiffusion takes hybrid-adm"
            )
        self.low_scale_model = instantiate_from_config(low_scale_config)
        self.low_scale_model.requires_grad_(False).eval()
        self.low_scale_key, self.noise_level_key = low_scale_key, noise_level_key
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    @property
    def has_further_parts(self) -> bool:
        return True

    def further_parts(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> dict[str, Any]:
        small = self.get_pictures(batch, self.low_scale_key, bs)
        if small.shape[2:] != tuple(size):
            given, wanted = ("x".join(map(str, sides)) for sides in (small.shape[2:], size))
            raise ValueError(
                f"{self.low_scale_key}: pictures of {given} pixels beside latents of {wanted}: they must be alike"
            )
        level = None
        if self.noise_level_key is not None:
            level = self._on_device(self.batch_value(batch, self.noise_level_key)[:bs])
        noised, level = self.low_scale_model(small, level)
        further = super().further_parts(batch, size, bs)
        return {**further, "c_concat": [noised, *further.get("c_concat", ())], "c_adm": level}

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, **kwargs: Any) -> dict[str, Tensor]:
        log = super().log_images(batch, N, n_row, **kwargs)
        if kwargs.get("return_keys") is None:
            log["x_lr"] = self.get_pictures(batch, self.low_scale_key, N)
            log["x_lr_noised"] = self.low_scale_model.decode(self.low_scale_model(log["x_lr"])[0])
        return log


def _find(key: str, given: Mapping[str, Tensor]) -> Tensor | None:
    """What a file holds for `key`: for an average that it lacks, as it lacks all others, the weight itself."""
    bare = key.removeprefix("model.")  # in a file of the network alone
    if key in given or bare in given:
        return given[key] if key in given else given[bare]
    if key.startswith(EMA) and not any(name.startswith(EMA) for name in given):
        return next((tensor for name, tensor in given.items() if ema_name(name, key.__eq__) == key), None)
    return None
