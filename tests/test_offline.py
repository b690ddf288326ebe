"""Laws of running without a network: nothing that a weights file holds is looked for elsewhere."""

import socket

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from ldm.cli import run_command
from ldm.config import text_shapes
from scripts import img2img, txt2img
from tests.tiny import save_text_model

HUB_NAME = text_shapes.CLIP_VERSION  # the published text encoder, here in a tiny shape
CLIP = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"version": HUB_NAME}}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def attempts(monkeypatch, tmp_path) -> list:
    """Attempted connections; each fails, and the hub cache is empty."""
    attempted = []

    def refuse(*args, **kwargs):
        attempted.append(args)
        raise OSError("no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setitem(text_shapes.CLIP_SHAPES, HUB_NAME, {**text_shapes.VIT_L_14, **SHAPE})
    return attempted


@pytest.fixture
def saved(tmp_path, attempts):
    return save_text_model(tmp_path, cond_stage_config=CLIP, cond_stage_trainable=False, cond_stage_key="txt")


def arguments(saved, folder) -> list[str]:
    return f"--config {saved.config} --ckpt {saved.ckpt} --outdir {folder / 'out'} --safety off --prompt horse".split()


@pytest.mark.parametrize("hub_offline", [True, False])
@pytest.mark.parametrize("script", [txt2img, img2img])
def test_a_file_with_its_text_encoder_samples_without_network(
    tmp_path, saved, attempts, script, hub_offline, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", hub_offline)
    Image.new("RGB", (16, 16), "gray").save(tmp_path / "gray.png")
    size = ["--H", "16", "--W", "16"] if script is txt2img else ["--init-img", str(tmp_path / "gray.png")]
    argv = [*arguments(saved, tmp_path), *size, "--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1"]
    assert run_command(script.main, argv) == 0
    assert attempts == [] and (tmp_path / "out" / "samples" / "00000.png").is_file()


def test_a_file_without_its_text_encoder_is_one_error_line(tmp_path, saved, attempts, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    weights = saved.model.state_dict()
    torch.save({key: weights[key] for key in weights if not key.startswith("cond_stage_model.")}, saved.ckpt)
    assert run_command(txt2img.main, arguments(saved, tmp_path)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert HUB_NAME in error and "to a local folder" in error and attempts == []
