"""Tiny models and batches for the tests of training and sampling."""

from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from ldm.modules.encoders.layout_tokens import Box, LayoutTokens
from ldm.util import instantiate_from_config
from tests.models.first_stages import QUIET
from tests.reference import randn, seed_weights

EVERYWHERE = {"attention_resolutions": [2, 1]}  # of the models with published values
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
            "ch_mult": [1, 1, 1],
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
        "attention_resolutions": [],  # the middle alone
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


LAYOUT = LayoutTokens(40)


class Samples(torch.utils.data.Dataset):
    """Eight samples with every condition."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.tanh(randn(index, 32, 32, 3))
        mask = torch.full((32, 32, 1), -1.0)
        mask[8:24, 8:24] = 1.0
        labels = torch.randint(0, 5, (32, 32), generator=torch.Generator().manual_seed(index))
        return {
            "image": image,
            "mask": mask,
            "masked_image": torch.where(mask > 0, -1.0, image),
            "LR_image": image[::4, ::4],
            "segmentation": torch.nn.functional.one_hot(labels, 5).float(),
            "coordinates_bbox": LAYOUT.encode([Box(index, (0.1, 0.2, 0.3, 0.4))]),
            "class_label": index,
            "human_label": f"class {index}",
            "caption": f"sample number {index}",
        }


def loader(batch_size: int = 2) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Samples(), batch_size=batch_size)


def batch(size: int = 2) -> dict[str, Any]:
    return next(iter(loader(size)))


def fit(model: Any, steps: int = 2, batch_size: int = 2, **options: Any) -> pl.Trainer:
    """Train for some steps and validate one batch. Returns the trainer."""
    model.learning_rate = 1e-3
    options = {**QUIET, "max_steps": steps, "limit_val_batches": 1, "val_check_interval": min(2, steps), **options}
    trainer = pl.Trainer(**options)
    trainer.fit(model.train(), loader(batch_size), loader(batch_size))
    return trainer
