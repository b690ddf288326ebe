"""Tiny models and batches for the tests of training and sampling."""

from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config
from tests.reference import randn, seed_weights

AUTOENCODER = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 32,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 2, 4],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    },
}
CLASSES = {
    "target": "ldm.modules.encoders.modules.ClassEmbedder",
    "params": {"n_classes": 10, "embed_dim": 16, "key": "class_label"},
}
CAPTIONS = {
    "target": "ldm.modules.encoders.modules.CaptionEmbedder",
    "params": {"n_embed": 16, "n_layer": 1, "max_seq_len": 8, "vocab_rows": 64, "heads": 2, "dim_head": 8},
}
ATTEND = {"use_spatial_transformer": True, "context_dim": 16, "transformer_depth": 1, "legacy": False}


def unet(**changes: Any) -> dict[str, Any]:
    params = {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [2, 1],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_heads": 2,
    }
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params | changes}


def latent_diffusion(
    conditioning_key: str | None, unet_changes: dict[str, Any], cond: dict[str, Any] | str, **changes: Any
) -> Any:
    """A small LatentDiffusion with the weights of the rule in tests/reference.py."""
    params = {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "image",
        "image_size": 8,
        "channels": 4,
        "conditioning_key": conditioning_key,
        "monitor": "val/loss_simple_ema",
        "scale_factor": 0.18215,
        "use_ema": False,
        "unet_config": unet(**unet_changes),
        "first_stage_config": AUTOENCODER,
        "cond_stage_config": cond,
    }
    config = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params | changes}
    return seed_weights(instantiate_from_config(OmegaConf.create(config)))


class TinyData(torch.utils.data.Dataset):
    """Eight samples with everything that a condition may need."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": torch.tanh(randn(index, 32, 32, 3)),
            "low": torch.tanh(randn(100 + index, 8, 8, 3)),
            "class_label": index % 9,
            "human_label": f"class {index % 9}",
            "caption": f"sample number {index}",
        }


def loader(batch_size: int = 2) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(TinyData(), batch_size=batch_size)


def batch(size: int = 2) -> dict[str, Any]:
    return next(iter(loader(size)))
