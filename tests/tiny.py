"""A text-to-image latent diffusion model of 0.1 M parameters, and other kinds, as a YAML and a checkpoint."""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.util import instantiate_from_config
from tests.reference import seed_weights

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [],  # the middle alone: the time of a test that trains goes with the number of tensors
        "num_res_blocks": 1,
        "channel_mult": [1, 1],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 16,
        "legacy": False,
    },
}
CONTROL = {
    "target": "cldm.cldm.ControlNet",
    "params": {
        **{name: value for name, value in UNET["params"].items() if name != "out_channels"},
        "hint_channels": 3,
        "hint_block_channels": [16, 16, 32],
    },
}
FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 32,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
CAPTIONS = {
    "target": "ldm.modules.encoders.modules.CaptionEmbedder",
    "params": {"n_embed": 16, "n_layer": 1, "max_seq_len": 12, "vocab_rows": 64, "heads": 2, "dim_head": 8},
}
OPEN_CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {
        "freeze": True,
        "layer": "penultimate",
        "text_config": {"width": 16, "heads": 2, "layers": 2, "embed_dim": 8},
    },
}


def text_model_config(**params: Any) -> dict[str, Any]:
    """Return the model's config: f = 4, a UNet of two levels, 100 timesteps, image sizes in multiples of 8."""
    defaults = {
        "timesteps": 100,
        "channels": 4,
        "image_size": 8,
        "first_stage_key": "image",
        "cond_stage_key": "caption",
        "conditioning_key": "crossattn",
        "cond_stage_trainable": True,
        "scale_factor": 0.5,
        "use_ema": True,
        "unet_config": UNET,
        "first_stage_config": FIRST_STAGE,
        "cond_stage_config": CAPTIONS,
    }
    target = params.pop("target", "LatentDiffusion")
    target = target if "." in target else f"ldm.models.diffusion.ddpm.{target}"
    return {"model": {"target": target, "params": deepcopy({**defaults, **params})}}


def _unet(**changes: Any) -> dict[str, Any]:
    return {"target": UNET["target"], "params": {**UNET["params"], **changes}}


_HEADS = {"num_heads": -1, "num_head_channels": 16, "use_linear_in_transformer": True}
_V2 = _unet(**_HEADS)


_NO_TEXT = _unet(use_spatial_transformer=False, context_dim=None, transformer_depth=1)
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "unconditional": {"cond_stage_config": "__is_unconditional__", "conditioning_key": None, "unet_config": _NO_TEXT},
    "class": {
        "cond_stage_key": "class_label",
        "cond_dropout": 0.1,
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"n_classes": 6, "embed_dim": 16, "key": "class_label"},
        },
    },
    # As models/ldm/inpainting_big: latent, latent of the masked image, mask.
    "inpaint": {
        "cond_stage_key": "masked_image",
        "cond_stage_config": "__is_first_stage__",
        "conditioning_key": "concat",
        "unet_config": _unet(in_channels=9, use_spatial_transformer=False, context_dim=None),
    },
    # As models/ldm/bsr_sr: latent and low-resolution image.
    "upscale": {
        "cond_stage_key": "LR_image",
        "cond_stage_config": {"target": "torch.nn.Identity"},
        "conditioning_key": "concat",
        "unet_config": _unet(in_channels=7, use_spatial_transformer=False, context_dim=None),
    },
    # As configs/stable-diffusion/: v2-inference, v2-inference-v, v2-inpainting-, v2-midas-inference and
    # x4-upscaling.
    "v2": {"cond_stage_config": OPEN_CLIP, "unet_config": _V2},
    "v2-v": {"cond_stage_config": OPEN_CLIP, "unet_config": _V2, "parameterization": "v"},
    "sd-inpaint": {
        "target": "LatentInpaintDiffusion",
        "cond_stage_config": OPEN_CLIP,
        "conditioning_key": "hybrid",
        "finetune_keys": None,
        "unet_config": _unet(**_HEADS, in_channels=9),
    },
    "depth": {
        "target": "LatentDepth2ImageDiffusion",
        "cond_stage_config": OPEN_CLIP,
        "conditioning_key": "hybrid",
        "finetune_keys": None,
        "depth_stage_config": {
            "target": "ldm.modules.midas.api.MiDaSInference",
            "params": {"model_type": "dpt_hybrid"},
        },
        "unet_config": _unet(**_HEADS, in_channels=5),
    },
    # As configs/controlnet/cldm_v15.yaml.
    "control": {
        "target": "cldm.cldm.ControlLDM",
        "use_ema": False,
        "control_key": "hint",
        "control_stage_config": CONTROL,
        "unet_config": {**UNET, "target": "cldm.cldm.ControlledUnetModel"},
    },
    # As configs/instruct-pix2pix/generate.yaml.
    "edit": {
        "target": "ldm.models.diffusion.ddpm_edit.LatentDiffusion",
        "first_stage_key": "edited",
        "cond_stage_key": "edit",
        "conditioning_key": "hybrid",
        "finetune_keys": None,
        "unet_config": _unet(in_channels=8),
    },
    "x4": {
        "target": "LatentUpscaleDiffusion",
        "cond_stage_config": OPEN_CLIP,
        "conditioning_key": "hybrid-adm",
        "parameterization": "v",
        "low_scale_key": "lr",
        "low_scale_config": {
            "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
            "params": {"noise_schedule_config": {"linear_start": 0.0001, "linear_end": 0.02}, "max_noise_level": 350},
        },
        "unet_config": _unet(**_HEADS, in_channels=7, num_classes=1000),
    },
}
"""Parameters that turn the text model into another kind, by its use."""


class SavedModel(NamedTuple):
    """The files of a model, and the model itself; its regular and EMA weights differ."""

    config: Path
    ckpt: Path
    model: nn.Module


def model_flags(saved: SavedModel, outdir: Path | str | None = None) -> list[str]:
    """Flags of the sampling scripts for a model, in float32 on the CPU."""
    where = [] if outdir is None else ["--outdir", str(outdir)]
    return ["--config", str(saved.config), "--ckpt", str(saved.ckpt), *where, "--device", "cpu", "--precision", "full"]


def save_text_model(folder: Path, **params: Any) -> SavedModel:
    """Write `tiny.yaml` and `tiny.ckpt` (as Lightning does: weights under `state_dict`) with seeded weights."""
    return save_model(folder, "text", **params)


def save_model(folder: Path, kind: str, **params: Any) -> SavedModel:
    """Write a model as `save_text_model` does, of any of KINDS."""
    trained = {} if kind in ("text", "class") else {"cond_stage_trainable": False}
    config = text_model_config(**{**trained, **KINDS[kind], **params})
    model = seed_weights(instantiate_from_config(OmegaConf.create(config)["model"]))
    if model.use_ema:
        for name, parameter in model.model.named_parameters():
            getattr(model.model_ema, name.replace(".", "")).copy_(0.9 * parameter.detach())
    saved = SavedModel(folder / "tiny.yaml", folder / "tiny.ckpt", model)
    OmegaConf.save(OmegaConf.create(config), saved.config)
    torch.save({"state_dict": model.state_dict(), "global_step": 7}, saved.ckpt)
    return saved
