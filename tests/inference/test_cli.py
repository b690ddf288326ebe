"""Flags that the sampling scripts share."""

import importlib

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ldm.inference.cli import cast_bytes, read_info
from ldm.inference.from_metadata import parse_given
from tests.tiny import text_model_config


@pytest.mark.parametrize("script", ["txt2img", "img2img", "inpaint", "upscale", "knn2img"])
def test_every_script_takes_a_run_directory_as_its_checkpoint(script, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other.yaml"
    for name in ("checkpoints/last.ckpt", "configs/1-project.yaml", "configs/2-project.yaml"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    OmegaConf.save(OmegaConf.create(text_model_config()), run / "configs" / "1-project.yaml")
    OmegaConf.save(OmegaConf.create(text_model_config(timesteps=7)), run / "configs" / "2-project.yaml")
    OmegaConf.save(OmegaConf.create(text_model_config(timesteps=9)), other)
    parser = importlib.import_module(f"scripts.{script}").parser
    for flags, timesteps in (([], 7), (["--config", str(other)], 9)):
        opt = parse_given(parser(), ["--ckpt", str(run), *flags])
        assert read_info(opt).timesteps == timesteps and opt.ckpt == str(run / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    ("dtype", "precision", "copies"),
    [
        (torch.float16, "auto", 1),
        (torch.float16, "full", 2),
        (torch.float16, "fp16", 0),
        (torch.float32, "full", 0),
        (torch.bfloat16, "auto", 0),
    ],
)
def test_memory_is_reserved_for_float16_weights_that_another_precision_copies(tmp_path, dtype, precision, copies):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(64, dtype=dtype)}, file)
    assert cast_bytes(file, precision) == copies * file.stat().st_size
    assert cast_bytes(tmp_path, precision) == 0  # a folder of weights
