"""The safety check: its modes, and errors instead of silent approval if the checker fails."""

import logging

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm.config.model_info import SAFETY_MODES, model_info
from ldm.output.images import GeneratedImage, NamedOutput, Output, read_metadata
from ldm.output.safety import Safety, SafetySettings
from ldm.output.safety_checker import SafetyChecker
from ldm.output.watermark import Watermark
from tests.output.toys import save_checker
from tests.tiny import text_model_config

EVERYTHING, NOTHING = -2.0, 2.0  # thresholds of a cosine


def noise(width: int = 40, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def safety(mode: str, folder) -> Safety:
    return Safety(SafetySettings(mode, None if mode == "off" else str(folder)))


@pytest.fixture(scope="module")
def checkers(tmp_path_factory):
    """Folders of a checker that flags everything and of one that flags nothing."""
    folder = tmp_path_factory.mktemp("checkers")
    return {flags: save_checker(folder / str(flags), EVERYTHING if flags else NOTHING) for flags in (True, False)}


# --- what it does


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("mode", SAFETY_MODES)
def test_each_mode_saves_replaces_and_warns(checkers, tmp_path, mode, flags, caplog):
    with caplog.at_level(logging.WARNING, "ldm.output.safety"):
        path = Output(tmp_path, Watermark(), safety(mode, checkers[flags])).save_sample(
            GeneratedImage(noise(), {"image_index": 3})
        )
    info, replaced = read_metadata(path), mode == "on" and flags
    assert (info["safety"], info["flagged"]) == (mode, None if mode == "off" else flags)
    assert np.array_equal(np.asarray(Image.open(path)), np.zeros((32, 40, 3)) if replaced else np.asarray(noise()))
    logged = [record.message for record in caplog.records]
    assert len(logged) == (mode != "off" and flags) and all("flagged image 3" in line for line in logged)


def test_a_black_image_has_no_watermark(checkers, tmp_path):
    results = Image.new("1", (256, 256), 1)
    path = NamedOutput(tmp_path, Watermark(), safety("on", checkers[True])).save(
        GeneratedImage(noise(256, 256), {}, results), "x"
    )
    assert not np.asarray(Image.open(path)).any() and read_metadata(path)["watermark"] is None
    path = NamedOutput(tmp_path, Watermark(), safety("report", checkers[True])).save(
        GeneratedImage(noise(256, 256), {}), "x"
    )
    assert read_metadata(path)["flagged"] is True and read_metadata(path)["watermark"].startswith("StableDiffusionV1")


def test_an_image_is_checked_once_and_an_unchecked_one_is_recorded(checkers, tmp_path):
    output = Output(tmp_path, safety=safety("on", checkers[True]))
    black = output.checked(GeneratedImage(noise(), {}))
    black = black._replace(image=noise())  # what a second check would blacken again
    assert np.array_equal(np.asarray(Image.open(output.save_grid(black))), np.asarray(noise()))
    info = read_metadata(Output(tmp_path).save_sample(GeneratedImage(noise(), {"safety": "on", "flagged": False})))
    assert (info["safety"], info["flagged"]) == ("off", None)


def test_a_failing_checker_saves_nothing(checkers, tmp_path, monkeypatch):
    check = safety("report", checkers[False]).ready()
    monkeypatch.setattr(SafetyChecker, "flags", lambda self, image: 1 // 0)
    with pytest.raises(
        ValueError,
        match="safety checker failed, so this and all further images are not saved: integer division",
    ):
        Output(tmp_path, safety=check).save_sample(GeneratedImage(noise(), {}))
    assert not list(tmp_path.rglob("*.png"))


# --- the checker


# --- where it comes from


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_without_the_packages_the_extra_is_named(checkers, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(
        ImportError, match=rf'--safety on: the safety checker requires {package}: pip install -e "\.\[safety\]"'
    ):
        safety("on", checkers[False]).ready()
    assert safety("off", checkers[False]).ready()(GeneratedImage(noise(), {})).info["safety"] == "off"


# --- its default


def info(**top):
    return model_info(OmegaConf.create({**text_model_config(), **top}))


@pytest.mark.parametrize("word, mode", [(True, "on"), (False, "off"), ("report", "report"), ("off", "off")])
def test_a_config_sets_the_default_and_the_flag_overrides_it(word, mode):
    assert info(safety=word).safety == mode == SafetySettings().checked(info(safety=word)).mode
    assert SafetySettings("report").checked(info(safety=word)).mode == "report"


def test_a_checker_with_safety_off_is_refused():
    with pytest.raises(ValueError, match=r"--safety_checker x with --safety off \(the default of this config\)"):
        SafetySettings(checker="x").checked(info())
    assert SafetySettings("on", "x").checked(info()) == SafetySettings("on", "x")
