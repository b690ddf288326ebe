"""Laws of the models that a page offers: those that were named at its start, and no others."""

import pytest
import torch

from ldm.inference.from_metadata import parse_given
from ldm.web import models
from ldm.web.models import Choice, Shelf
from scripts import app
from tests.tiny import FIRST_STAGE, save_model


def shelf(*argv) -> Shelf:
    return Shelf(parse_given(app.parser(), list(map(str, [*argv, "--device", "cpu", "--precision", "full"]))))


def test_a_folder_is_scanned_for_models_and_their_files(tmp_path, caplog):
    from omegaconf import OmegaConf

    for kind in ("text", "class"):
        (tmp_path / kind).mkdir()
        save_model(tmp_path / kind, kind)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "style.safetensors").touch()
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "config.yaml").touch()  # its weights were not downloaded
    (tmp_path / "first").mkdir()
    torch.save({}, tmp_path / "first" / "kl.ckpt")
    OmegaConf.save({"model": FIRST_STAGE}, tmp_path / "first" / "kl.yaml")
    with caplog.at_level("INFO"):
        found = shelf("--models", tmp_path)
    assert list(found.models) == ["class/tiny.ckpt", "text/tiny.ckpt"] and list(found.lora) == ["style.safetensors"]
    assert "kl.ckpt is not offered" in caplog.text and "first stage" in caplog.text


def test_a_name_that_is_not_offered_is_refused_whatever_file_it_is(tmp_path):
    saved = save_model(tmp_path, "text")
    found = shelf("--ckpt", saved.ckpt)
    for choice in (Choice(str(saved.ckpt)), Choice("tiny.ckpt", lora=((str(saved.ckpt), 1.0),))):
        with pytest.raises(ValueError, match="not offered here"):
            found.load(choice)


def test_a_model_is_loaded_once_and_dropped_for_the_next(tmp_path):
    for kind in ("text", "class"):
        (tmp_path / kind).mkdir()
        save_model(tmp_path / kind, kind)
    found = shelf("--models", tmp_path)
    first = found.load(Choice("text/tiny.ckpt"))
    assert found.load(Choice("text/tiny.ckpt")) is first
    second = found.load(Choice("class/tiny.ckpt"))
    assert found.loaded is second and second.pipeline.info.n_classes == 6


def test_the_choice_of_an_image_is_found_by_its_metadata_which_open_no_file(tmp_path):
    saved = save_model(tmp_path, "text")
    (tmp_path / "style.safetensors").touch()
    found = shelf("--ckpt", saved.ckpt, "--lora", tmp_path / "style.safetensors")
    info = {"ckpt": str(saved.ckpt), "lora": [f"{tmp_path / 'style.safetensors'}:0.5", "/etc/passwd:1.0"]}
    choice, notes = found.choice_of(info)
    assert choice == Choice("tiny.ckpt", (("style.safetensors", 0.5),))
    assert notes == ["the LoRA /etc/passwd:1.0 of this image is not offered here"]


def test_without_any_model_the_error_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "QUICKSTART", str(tmp_path))
    monkeypatch.setattr(models, "SD_CKPT", str(tmp_path / "model.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"python scripts/quickstart\.py"):
        shelf()
    for name in ("2026-01-02_text2image", "2026-01-01_text2image"):
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "configs").mkdir()
        saved = save_model(tmp_path, "text")
        saved.ckpt.rename(run / "checkpoints" / "last.ckpt")
        saved.config.rename(run / "configs" / "x-project.yaml")
    assert list(shelf().models) == ["2026-01-02_text2image"]
