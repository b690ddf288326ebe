"""Flags that the sampling scripts share."""

import importlib

import pytest
from omegaconf import OmegaConf

from ldm.inference.cli import read_info
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
