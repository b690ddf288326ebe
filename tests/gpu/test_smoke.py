"""Load, sample, edit and train on a CUDA device: `pytest -m gpu`, a few minutes, no downloads.

Stable Diffusion v1 at full size with random weights samples, and trains a LoRA; a tiny model trains and resumes.
`LDM_SMOKE_DEVICE=cpu pytest -m gpu` runs the same tests with tiny models on the CPU, without the figures of memory.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import main
from ldm.checkpoint import read_checkpoint, weights_on_meta, write_weights
from ldm.config.model_info import read_config
from ldm.inference import (
    ControlRequest,
    TextToImageRequest,
    control_to_image,
    image_to_image,
    inpaint,
    load_controlnet,
    load_model,
    text_to_image,
)
from ldm.inference.requests import ImageToImageRequest, InpaintRequest
from ldm.models.diffusion.controlnet import ControlNet
from ldm.paths import ROOT
from ldm.util import instantiate_from_config
from tests.images import make_image
from tests.tiny import text_model_config

DEVICE = os.environ.get("LDM_SMOKE_DEVICE", "cuda")
FULL = DEVICE != "cpu"
SIDE = 512 if FULL else 64
CONFIG = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
_UNET, _STAGE = "model.params.unet_config.params.", "model.params.first_stage_config.params.ddconfig."
_TEXT = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}"
TINY = [
    *(f"{_UNET}{change}" for change in ("model_channels=32", "num_heads=2", "channel_mult=[1,2]", "context_dim=32")),
    *(f"{_UNET}{change}" for change in ("attention_resolutions=[1]", "num_res_blocks=1")),
    *(f"{_STAGE}{change}" for change in ("ch=32", "ch_mult=[1,1,1,1]", "num_res_blocks=1")),
    f"model.params.cond_stage_config.params.text_config={_TEXT}",
]
REASON = "no CUDA device; LDM_SMOKE_DEVICE=cpu runs these tests with tiny models on the CPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(FULL and not torch.cuda.is_available(), reason=REASON)]
needs_cuda = pytest.mark.skipif(not FULL, reason="memory of a CUDA device")
GB = 1e9
SMALL = {"prompt": "an astronaut", "steps": 4, "n_samples": 1, "n_iter": 1, "height": SIDE, "width": SIDE}


def random_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a module on the meta device whose outputs have about the size of its inputs, in float16 if `FULL`."""
    torch.manual_seed(0)
    dtype, values = torch.float16 if FULL else torch.float32, module.state_dict()
    for name, x in values.items():
        if x.is_meta:
            x = torch.randn(x.shape, device=DEVICE) / max(x[0].numel() if x.ndim else 1, 1) ** 0.5
            x = 1.0 + 0.1 * x if x.ndim == 1 and name.endswith("weight") else x
            values[name] = x.to(dtype).cpu()
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def config():
    """The published config of Stable Diffusion v1, or a tiny one with its keys."""
    return read_config(CONFIG, () if FULL else TINY)


@pytest.fixture(scope="module")
def saved(folder, config) -> tuple[Path, Path]:
    """(YAML, checkpoint) of the model with random weights."""
    yaml, ckpt = folder / "model.yaml", folder / "model.safetensors"
    with weights_on_meta():
        model = instantiate_from_config(config.model)
    write_weights(random_weights(model), ckpt)
    OmegaConf.save(config, yaml)
    return yaml, ckpt


def load(saved, **options):
    return load_model(*saved, DEVICE, "auto" if FULL else "full", **options)


@pytest.fixture(scope="module")
def pipeline(saved):
    return load(saved)


def pixels(images) -> list[np.ndarray]:
    arrays = [np.asarray(each.image) for each in images]
    assert arrays and all(array.shape == (SIDE, SIDE, 3) and np.ptp(array) > 0 for array in arrays)
    return arrays


@needs_cuda
@pytest.mark.parametrize("n_samples, limit", [(3, 10.0), (1, 5.0)])
def test_peak_memory_of_loading_and_sampling(saved, n_samples, limit):
    """txt2img's defaults are 3 samples of 512x512; the number of steps has no influence."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    request = TextToImageRequest(**{**SMALL, "steps": 2, "n_samples": n_samples})
    assert len(pixels(text_to_image(load(saved), request, progress=False))) == n_samples
    peak = torch.cuda.max_memory_reserved() / GB
    print(f"{n_samples} samples: {peak:.2f} GB")
    assert peak < limit


def test_two_seeds_generated_again_give_equal_images(pipeline):
    def generate(seed):
        return pixels(text_to_image(pipeline, TextToImageRequest(**SMALL, seed=seed), progress=False))[0]

    first, second = generate(1), generate(2)
    assert np.array_equal(generate(1), first) and np.array_equal(generate(2), second)
    assert not np.array_equal(first, second)


def test_image_to_image(pipeline):
    pixels(image_to_image(pipeline, make_image(SIDE, SIDE), ImageToImageRequest(**SMALL), progress=False))


def test_inpainting_keeps_the_rest(pipeline):
    image, mask = make_image(SIDE, SIDE), Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE // 2))
    request = InpaintRequest(prompt="an astronaut", steps=4)
    (result,) = pixels([inpaint(pipeline, image, mask, request, progress=False)])
    changed = (result != np.asarray(image)).any(axis=2)
    assert changed[: SIDE // 2, : SIDE // 2].any() and not changed[SIDE // 2 :].any()


def test_a_controlnet(pipeline, config, folder):
    params = {name: x for name, x in config.model.params.unet_config.params.items() if name != "out_channels"}
    with weights_on_meta():
        net = ControlNet(**{**params, "hint_channels": 3, "use_checkpoint": False})
    weights = {f"control_model.{name}": x for name, x in random_weights(net).items()}
    write_weights(weights, folder / "control.safetensors")
    net = load_controlnet(pipeline, folder / "control.safetensors")
    request = ControlRequest(**SMALL)
    pixels(control_to_image(pipeline, [make_image(SIDE, SIDE)], request, [net], progress=False))


# ------------------------------------------------------------------------------------------------------------ training


def data(folder: Path, side: int) -> dict:
    """The section `data`: eight captioned images of noise."""
    for index in range(8):
        make_image(side, side, index).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"image number {index}")
    images = {
        "target": "ldm.data.folder.ImageFolder",
        "params": {"root": str(folder), "size": side, "captions": "sidecar"},
    }
    params = {"batch_size": 2, "num_workers": 0, "train": images, "validation": images}
    return {"target": "main.DataModuleFromConfig", "params": params}


def train(folder: Path, name: str, model: dict, side: int, *words: str) -> Path:
    """Train by main.py for four steps, an epoch; return the run directory."""
    trainer = {"max_steps": 4, "logger": False, "num_sanity_val_steps": 0, "val_check_interval": 2}
    trainer |= {"accelerator": "gpu" if FULL else "cpu", "devices": 1, "limit_val_batches": 1}
    images = folder / f"{name}-images"
    images.mkdir()
    run = {"model": model, "data": data(images, side)}
    run["lightning"] = {"trainer": trainer, "callbacks": {"image_logger": None}}
    OmegaConf.save(OmegaConf.create(run), folder / f"{name}.yaml")
    assert main.main(["-b", str(folder / f"{name}.yaml"), "-t", "-n", name, "-l", str(folder / "logs"), *words]) == 0
    return next((folder / "logs").glob(f"*_{name}"))


def last(run: Path) -> dict:
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert all(torch.isfinite(x).all() for x in checkpoint["state_dict"].values() if x.is_floating_point())
    return checkpoint


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_training_and_resume(folder, precision):
    model = text_model_config(image_size=8, untrained_first_stage=True, cond_dropout=0.1)["model"]
    model = {"base_learning_rate": 1e-4, **model}
    run = train(folder, f"train-{precision}", model, 32, "--precision", precision)
    first = last(run)
    assert first["global_step"] == 4
    # float16 needs a gradient scaler, whose state is in the checkpoint; on a CPU this precision is bfloat16 without.
    assert ("MixedPrecision" in first) == (FULL and precision == "16-mixed")
    assert main.main(["-r", str(run), "-t", "--max_steps", "12", "--precision", precision]) == 0
    second = last(run)
    assert second["global_step"] == 12  # enough that the scaler, which skips steps at first, has found its scale
    name = "model.diffusion_model.out.2.weight"
    assert not torch.equal(first["state_dict"][name], second["state_dict"][name])


def test_a_lora_is_trained_and_sampled(folder, saved, config, pipeline):
    model = OmegaConf.to_container(config.model)
    model["params"] |= {"ckpt_path": str(saved[1]), "first_stage_key": "image", "cond_stage_key": "caption"}
    model["params"] |= {"adapters": {"rank": 4, "alpha": 4, "targets": ["attention"]}}
    words = ["--precision", "bf16-mixed"] if FULL else []
    run = train(folder, "lora", {"base_learning_rate": 1e-2, **model}, SIDE, "--scale_lr", "false", *words)
    request = TextToImageRequest(**SMALL, seed=1)
    base, adapted = (
        pixels(text_to_image(each, request, progress=False))[0]
        for each in (pipeline, load(saved, lora=[(run / "checkpoints" / "lora.safetensors", 1.0)]))
    )
    assert not np.array_equal(base, adapted)
