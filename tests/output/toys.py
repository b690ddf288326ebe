"""A tiny safety checker in the published layout that flags everything, nothing, or what a test needs."""

import json
from pathlib import Path

import torch

from ldm.checkpoint import write_weights
from tests.reference import seed_weights

CONFIG = {
    "model_type": "clip",
    "projection_dim": 8,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    },
}


def make_checker():
    """diffusers' own model with seeded weights; every concept at random."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    return seed_weights(StableDiffusionSafetyChecker(CLIPConfig.from_dict(CONFIG))).eval()


def save_checker(
    folder: Path, threshold: float, file: str = "model.safetensors", **changes: torch.Tensor | None
) -> Path:
    """Write a checker that flags nothing (threshold 2) or everything (-2).

    changes: other tensors by name; None leaves one out. Names are the published ones, vision_model.vision_model.*.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(make_checker().state_dict())
    state["concept_embeds_weights"] = torch.full((17,), threshold)
    state["special_care_embeds_weights"] = torch.full((3,), 2.0)
    state = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
    doubled = "vision_model.vision_model."
    state = {n if n.startswith(doubled) else n.replace("vision_model.", doubled, 1): t for n, t in state.items()}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        write_weights(state, folder / file)
    return folder
