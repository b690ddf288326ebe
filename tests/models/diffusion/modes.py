"""One tiny latent diffusion model for each way to condition it."""

from typing import Any

from omegaconf import OmegaConf

from ldm.util import instantiate_from_config
from tests.models.diffusion.tiny import ATTEND, AUTOENCODER, CAPTIONS, CLASSES, unet
from tests.reference import seed_weights

ENCODERS = "ldm.modules.encoders.modules."
IDENTITY = {"target": "torch.nn.Identity"}
CLIP = {
    "embed_dim": 16,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
}
TOKENS = {"n_embed": 16, "n_layer": 1, "vocab_size": 8192, "max_seq_len": 92, "use_tokenizer": False}
BOXES = {"target": ENCODERS + "BERTEmbedder", "params": TOKENS}
MAPS = {"target": ENCODERS + "SpatialRescaler", "params": {"n_stages": 2, "in_channels": 5, "out_channels": 3}}
CLIP_TEXT = {"target": ENCODERS + "FrozenCLIPTextEmbedder", "params": {"clip_config": CLIP}}
CLIP_IMAGE = {"target": ENCODERS + "FrozenClipImageEmbedder", "params": {"clip_config": CLIP}}
TRAINED = {"cond_stage_trainable": True}
CLASS, TEXT = {"cond_stage_key": "class_label"}, {"cond_stage_key": "caption"}
MASKED = {"cond_stage_key": "masked_image", "concat_keys": ["mask"]}
INPAINT = {**TEXT, "concat_keys": ["mask", "masked_image"]}

# {mode: (conditioning_key, changes of the UNet, condition stage, other parameters)}
MODES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | str, dict[str, Any]]] = {
    "class": ("crossattn", ATTEND, CLASSES, {**CLASS, **TRAINED}),
    "boxes": ("crossattn", ATTEND, BOXES, {"cond_stage_key": "coordinates_bbox", **TRAINED}),
    "segmentation": ("concat", {"in_channels": 7}, MAPS, {"cond_stage_key": "segmentation", **TRAINED}),
    "low resolution": ("concat", {"in_channels": 7}, IDENTITY, {"cond_stage_key": "LR_image"}),
    "masked image": ("concat", {"in_channels": 9}, "__is_first_stage__", MASKED),
    "hybrid": ("hybrid", {**ATTEND, "in_channels": 9}, CAPTIONS, {**INPAINT, **TRAINED}),
    "adm": ("adm", {"num_classes": 11}, IDENTITY, CLASS),
    "crossattn-adm": (
        "crossattn-adm",
        {**ATTEND, "num_classes": 10},
        CAPTIONS,
        {**TEXT, "adm_key": "class_label", **TRAINED},
    ),
    "hybrid-adm": (
        "hybrid-adm",
        {**ATTEND, "num_classes": 10, "in_channels": 7},
        CAPTIONS,
        {**TEXT, "adm_key": "class_label", "concat_keys": ["LR_image"]},
    ),
    "CLIP text": ("crossattn", ATTEND, CLIP_TEXT, TEXT),
    "CLIP image": ("crossattn", ATTEND, CLIP_IMAGE, {"cond_stage_key": "image"}),
}


def build(mode: str, target: str = "LatentDiffusion", seeded: bool = True, **changes: Any) -> Any:
    key, unet_changes, cond, params = MODES[mode]
    base = {
        "conditioning_key": key,
        "timesteps": 100,
        "image_size": 8,
        "channels": 4,
        "monitor": "val/loss_simple_ema",
        "cond_dropout": 0.3,
        "unet_config": unet(**unet_changes),
        "first_stage_config": AUTOENCODER,
        "cond_stage_config": cond,
    }
    config = {"target": f"ldm.models.diffusion.ddpm.{target}", "params": {**base, **params, **changes}}
    model = instantiate_from_config(OmegaConf.create(config))
    return seed_weights(model) if seeded else model
