"""Without any network: what a file of weights holds is never asked for elsewhere."""

import os
import socket

import pytest
import torch

from ldm.cli import run_command
from ldm.config import text_shapes
from scripts import img2img, txt2img
from tests.tiny import save_text_model

HUB_NAME = "openai/clip-vit-large-patch14"  # the published text encoder, here in another shape
CLIP = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"version": HUB_NAME}}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture()
def attempts(monkeypatch, tmp_path) -> list:
    """What was tried to be reached; every try fails, and no cache of the hub is there."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setitem(text_shapes.CLIP_SHAPES, HUB_NAME, {**text_shapes.VIT_L_14, **SHAPE})
    return tried


@pytest.mark.parametrize("hub_offline", [True, False])
@pytest.mark.parametrize("script", [txt2img, img2img])
def test_a_file_that_holds_its_text_encoder_draws_without_network(
    tmp_path, attempts, script, hub_offline, monkeypatch, capsys
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", hub_offline)
    saved = save_text_model(tmp_path, cond_stage_config=CLIP, cond_stage_trainable=False, cond_stage_key="txt")
    argv = [
        "--config",
        str(saved.config),
        "--ckpt",
        str(saved.ckpt),
        "--outdir",
        str(tmp_path / "out"),
        "--safety",
        "off",
    ]
    if script is txt2img:
        argv += ["--H", "16", "--W", "16"]
    else:
        from PIL import Image

        Image.new("RGB", (16, 16), "gray").save(tmp_path / "gray.png")
        argv += ["--init-img", str(tmp_path / "gray.png"), "--strength", "0.5"]
    assert (
        run_command(
            script.main, [*argv, "--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1", "--prompt", "a horse"]
        )
        == 0
    )
    assert attempts == [] and (tmp_path / "out" / "samples" / "00000.png").is_file() and os.listdir(tmp_path / "out")


def test_a_file_without_its_text_encoder_says_so_in_one_line(tmp_path, attempts, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    saved = save_text_model(tmp_path, cond_stage_config=CLIP, cond_stage_trainable=False, cond_stage_key="txt")
    rest = {
        name: tensor for name, tensor in saved.model.state_dict().items() if not name.startswith("cond_stage_model.")
    }
    torch.save(rest, saved.ckpt)
    argv = [
        "--config",
        str(saved.config),
        "--ckpt",
        str(saved.ckpt),
        "--outdir",
        str(tmp_path / "out"),
        "--safety",
        "off",
    ]
    assert run_command(txt2img.main, argv) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1 and HUB_NAME in err[0] and "give a local folder" in err[0] and attempts == []
