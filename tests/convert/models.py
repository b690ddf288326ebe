"""Tiny models of every kind that converts, as a YAML and a weights file with seeded weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm.config.model_info import read_config
from ldm.convert.convert import to_folder
from ldm.util import instantiate_from_config
from tests.reference import seed_weights
from tests.tiny import FIRST_STAGE, KINDS, UNET, SavedModel, save_model

CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {
        "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    },
}
OPEN_CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {"layer": "penultimate", "text_config": {"width": 32, "heads": 4, "layers": 3, "embed_dim": 32}},
}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 32,
        "ddconfig": {
            **FIRST_STAGE["params"]["ddconfig"],
            **{"double_z": False, "z_channels": 3, "ch_mult": [1, 2], "attn_resolutions": [16], "norm_num_groups": 8},
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}


def unet(**changes: Any) -> dict[str, Any]:
    """The tiny UNet with attention on its second level and other parameters; those that are None are left out."""
    params = {**UNET["params"], "attention_resolutions": [2], **changes}
    return {"target": UNET["target"], "params": {name: value for name, value in params.items() if value is not None}}


_SD = {
    "timesteps": 1000,
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "scale_factor": 0.18215,
    "use_ema": False,
    "cond_stage_trainable": False,
}
_PLAIN = {
    "use_spatial_transformer": False,
    "context_dim": None,
    "legacy": True,
    "num_heads": None,
    "num_head_channels": 16,
}
_V2 = {
    "context_dim": 32,
    "use_linear_in_transformer": True,
    "num_heads": None,
    "num_head_channels": 8,
    "channel_mult": [1, 2],
}
_V2 |= {"attention_resolutions": [1, 2]}

MODELS: dict[str, dict[str, Any]] = {
    "sd1": {**_SD, "cond_stage_config": CLIP, "unet_config": unet(context_dim=32, channel_mult=[1, 2])},
    "v": {**_SD, "parameterization": "v", "cond_stage_config": CLIP, "unet_config": unet(context_dim=32)},
    "sd2": {**_SD, "parameterization": "v", "cond_stage_config": OPEN_CLIP, "unet_config": unet(**_V2)},
    "inpainting": {
        **_SD,
        "cond_stage_config": CLIP,
        "conditioning_key": "hybrid",
        "unet_config": unet(context_dim=32, in_channels=9),
    },
    "edit": {
        **KINDS["edit"],
        **_SD,
        "cond_stage_config": CLIP,
        "unet_config": unet(context_dim=32, in_channels=8),
    },
    "unconditional": {
        **KINDS["unconditional"],
        "channels": 3,
        "first_stage_config": VQ,
        "unet_config": unet(**_PLAIN, in_channels=3, out_channels=3, channel_mult=[1, 2], attention_resolutions=[1, 2]),
        "scale_by_std": True,
        "cond_stage_trainable": False,
        "scale_factor": 1.0,
    },
    "class": {
        **KINDS["class"],
        "channels": 3,
        "first_stage_config": VQ,
        "unet_config": unet(in_channels=3, out_channels=3),
    },
    "shared": {**KINDS["inpaint"], "cond_stage_trainable": False, "unet_config": unet(**_PLAIN, in_channels=9)},
}
"""Parameters of LatentDiffusion by kind of model."""

_CONVERTED: dict[str, tuple[SavedModel, Path]] = {}


def save(folder: Path, kind: str, **params: Any) -> SavedModel:
    """Write the model of that kind into `folder`; `kl` and `vq` are first stages alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind not in ("kl", "vq"):
        saved = save_model(folder, "text", **{**MODELS[kind], **params})
        if saved.model.scale_by_std:
            saved.model.scale_factor.fill_(0.7)
            torch.save({"state_dict": saved.model.state_dict(), "global_step": 7}, saved.ckpt)
        return saved
    config = {"model": {"kl": FIRST_STAGE, "vq": {**VQ, "target": "ldm.models.autoencoder.VQModel"}}[kind]}
    model = seed_weights(instantiate_from_config(OmegaConf.create(config)["model"]))
    saved = SavedModel(folder / "tiny.yaml", folder / "tiny.ckpt", model)
    OmegaConf.save(OmegaConf.create(config), saved.config)
    torch.save({"state_dict": model.state_dict(), "global_step": 7}, saved.ckpt)
    return saved


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """kind -> (the saved model, its diffusers folder), made once in a test run."""

    def make(kind: str) -> tuple[SavedModel, Path]:
        if kind not in _CONVERTED:
            root = tmp_path_factory.mktemp(kind)
            saved = save(root, kind)
            to_folder(read_config(saved.config), saved.ckpt, root / "folder")
            _CONVERTED[kind] = saved, root / "folder"
        return _CONVERTED[kind]

    return make


def published_weights(saved: SavedModel) -> dict[str, torch.Tensor]:
    """The weights that a converted file holds: all but averages."""
    return {name: tensor for name, tensor in saved.model.state_dict().items() if not name.startswith("model_ema.")}


def exactly(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names with the same bits."""
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )
