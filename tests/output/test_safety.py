"""The safety check: what it does with a flagged picture, and that a checker which cannot decide is an error, never a silent yes."""

import logging
import pickle

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.config.model_info import SAFETY_MODES, model_info, read_config
from ldm.output.images import GeneratedImage, NamedOutput, Output, read_metadata
from ldm.output.safety import Safety, SafetySettings
from ldm.output.safety_checker import SafetyChecker, find_checker
from ldm.output.watermark import Watermark
from ldm.paths import ROOT
from tests.output.toys import make_checker, save_checker
from tests.tiny import text_model_config

EVERYTHING, NOTHING = -2.0, 2.0  # thresholds of a cosine
SD_V1 = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"


def noise(width: int = 40, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def safety(mode: str, folder) -> Safety:
    return Safety(SafetySettings(mode, None if mode == "off" else str(folder)))


@pytest.fixture(scope="module")
def checkers(tmp_path_factory):
    """Folders of a checker that flags everything and of one that flags nothing."""
    folder = tmp_path_factory.mktemp("checkers")
    return {flags: save_checker(folder / str(flags), EVERYTHING if flags else NOTHING) for flags in (True, False)}


# ------------------------------------------------------------------------------ what it does


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("mode", SAFETY_MODES)
def test_each_mode_keeps_replaces_and_tells(checkers, tmp_path, mode, flags, caplog):
    with caplog.at_level(logging.WARNING, "ldm.output.safety"):
        path = Output(tmp_path, Watermark(), safety(mode, checkers[flags])).save_sample(
            GeneratedImage(noise(), {"image_index": 3})
        )
    info, replaced = read_metadata(path), mode == "on" and flags
    assert (info["safety"], info["flagged"]) == (mode, None if mode == "off" else flags)
    assert np.array_equal(np.asarray(Image.open(path)), np.zeros((32, 40, 3)) if replaced else np.asarray(noise()))
    told = [record.message for record in caplog.records]
    assert len(told) == (mode != "off" and flags) and all("flagged image 3" in line for line in told)


def test_a_black_picture_carries_no_mark_and_nothing_of_the_picture(checkers, tmp_path):
    drawn = Image.new("1", (256, 256), 1)
    path = NamedOutput(tmp_path, Watermark(), safety("on", checkers[True])).save(
        GeneratedImage(noise(256, 256), {}, drawn), "x"
    )
    assert not np.asarray(Image.open(path)).any() and read_metadata(path)["watermark"] is None
    path = NamedOutput(tmp_path, Watermark(), safety("report", checkers[True])).save(
        GeneratedImage(noise(256, 256), {}), "x"
    )
    assert read_metadata(path)["flagged"] is True and read_metadata(path)["watermark"].startswith("StableDiffusionV1")


def test_a_picture_is_checked_once_and_what_is_not_checked_says_so(checkers, tmp_path):
    output = Output(tmp_path, safety=safety("on", checkers[True]))
    black = output.checked(GeneratedImage(noise(), {}))
    black = black._replace(image=noise())  # what a second check would blacken again
    assert np.array_equal(np.asarray(Image.open(output.save_grid(black))), np.asarray(noise()))
    info = read_metadata(Output(tmp_path).save_sample(GeneratedImage(noise(), {"safety": "on", "flagged": False})))
    assert (info["safety"], info["flagged"]) == ("off", None)


def test_a_checker_that_fails_lets_nothing_through(checkers, tmp_path, monkeypatch):
    check = safety("report", checkers[False]).ready()
    monkeypatch.setattr(SafetyChecker, "flags", lambda self, image: 1 // 0)
    with pytest.raises(
        ValueError,
        match="safety checker failed, so this and all further images are not saved: integer division",
    ):
        Output(tmp_path, safety=check).save_sample(GeneratedImage(noise(), {}))
    assert not list(tmp_path.rglob("*.png"))


# ------------------------------------------------------------------------------ the checker


def test_it_decides_as_diffusers_does(tmp_path):
    """The threshold lies between two pictures, so that wrong pixels, weights or names would show."""
    from transformers import CLIPImageProcessor

    model, pictures = make_checker(), [noise(seed=k) for k in range(6)]
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        pooled = model.vision_model(processor(images=pictures, return_tensors="pt")["pixel_values"])[1]
        near = torch.cosine_similarity(
            model.visual_projection(pooled)[:, None], model.concept_embeds[None], dim=-1
        ).amax(1)
    threshold = float(near.sort().values[2:4].mean())
    expected = [bool(score > threshold) for score in near]
    assert sum(expected) == 3 and float((near - threshold).abs().min()) > 2e-3, "diffusers rounds to thousandths"
    for file in ("model.safetensors", "pytorch_model.bin"):
        checker = SafetyChecker(find_checker(str(save_checker(tmp_path / file, threshold, file))))
        assert [checker.flags(picture) for picture in pictures] == expected


def test_half_precision_files_and_a_preprocessors_config_are_taken(tmp_path):
    folder = save_checker(tmp_path, EVERYTHING, **{"visual_projection.weight": torch.randn(8, 16).half()})
    (folder / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}'
    )
    assert SafetyChecker(find_checker(str(folder))).flags(noise())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"concept_embeds_weights": None}, "concept_embeds_weights is missing in the file, expected (17,)"),
        ({"concept_embeds": torch.ones(16, 8)}, "concept_embeds has shape (16, 8) in the file, expected (17, 8)"),
        (
            {"concept_embeds_weights": torch.full((17,), float("nan"))},
            "concept_embeds_weights has non-finite values",
        ),
        (
            {"visual_projection.weight": torch.full((8, 16), float("inf"))},
            "the CLIP embedding of the image is not finite",
        ),
    ],
)
def test_weights_that_would_flag_nothing_are_an_error_and_no_checker(tmp_path, changes, words):
    with pytest.raises(ValueError) as error:
        safety("on", save_checker(tmp_path, EVERYTHING, **changes)).ready()
    assert words in str(error.value) and f"--safety on: the safety checker in {tmp_path} cannot be loaded" in str(
        error.value
    )


def test_a_checkers_weights_are_data(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    folder = save_checker(tmp_path / "checker", EVERYTHING)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"concept_embeds": Attack()}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        safety("on", folder).ready()
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------ where it comes from


def test_what_is_missing_is_named_with_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.paths.ROOT", tmp_path)  # a checkout without weights; tests cannot reach the hub
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"not in models/safety_checker or the hub's cache, .* --safety_checker \(--safety off"
    ):
        Safety(SafetySettings("on")).ready()
    with pytest.raises(FileNotFoundError, match="no such folder; put config"):
        safety("report", tmp_path / "nowhere").ready()
    folder = save_checker(tmp_path / "models" / "safety_checker", NOTHING)
    assert not Safety(SafetySettings("on")).ready()(GeneratedImage(noise(), {})).info["flagged"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"models/safety_checker: no model.safetensors or pytorch_model.bin in"):
        Safety(SafetySettings("on")).ready()


def test_the_hubs_cache_is_asked_before_the_hub(tmp_path, monkeypatch):
    """With pytorch_model.bin alone, as older caches have it; the hub itself is not asked for what the cache holds."""
    folder, asked = save_checker(tmp_path / "cache", NOTHING, "pytorch_model.bin"), []
    (folder / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}'
    )

    def hf_hub_download(repository: str, name: str, local_files_only: bool) -> str:
        asked.append((repository, local_files_only))
        if not (folder / name).is_file():
            raise FileNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr("ldm.paths.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.output.safety_checker.hf_hub_download", hf_hub_download)
    assert find_checker(None).weights == folder / "pytorch_model.bin"
    assert set(asked) == {("CompVis/stable-diffusion-safety-checker", True)}
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="the download failed"):
        find_checker(None)
    assert asked[-1][1] is False


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_without_the_extra_its_name_is_told(checkers, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(
        ImportError, match=rf'--safety on: the safety checker requires {package}: pip install -e "\.\[safety\]"'
    ):
        safety("on", checkers[False]).ready()
    assert safety("off", checkers[False]).ready()(GeneratedImage(noise(), {})).info["safety"] == "off"


# ------------------------------------------------------------------------------ its default


def info(**top):
    return model_info(OmegaConf.create({**text_model_config(), **top}))


def test_of_the_shipped_configs_stable_diffusion_alone_is_checked():
    """Those of the folder, and the recipe that goes on from its weights."""
    configs = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("models/ldm/**/*.yaml")]
    on = {path for path in configs if model_info(read_config(path)).safety == "on"}
    recipe = ROOT / "configs" / "recipes" / "inpainting-folder.yaml"
    assert on == {*ROOT.glob("configs/stable-diffusion/*.yaml"), recipe} and len(configs) > 20


@pytest.mark.parametrize("word, mode", [(True, "on"), (False, "off"), ("report", "report"), ("off", "off")])
def test_a_config_states_its_default_and_the_flag_overrides_it(word, mode):
    assert info(safety=word).safety == mode == SafetySettings().checked(info(safety=word)).mode
    assert SafetySettings("report").checked(info(safety=word)).mode == "report"


def test_the_published_yaml_without_the_word_is_stable_diffusion_too(tmp_path):
    lines = SD_V1.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "v1.yaml").write_text("".join(line for line in lines if not line.startswith("safety:")))
    assert model_info(read_config(tmp_path / "v1.yaml")).safety == model_info(read_config(SD_V1)).safety == "on"
    (tmp_path / "v1.yaml").write_text(
        "safety: off\n" + "".join(line for line in lines if not line.startswith("safety:"))
    )
    assert model_info(read_config(tmp_path / "v1.yaml")).safety == "off"
    assert info().safety == "off"
    with pytest.raises(ValueError, match="safety: of: choose one of on, off, report"):
        info(safety="of")


def test_a_run_of_ones_own_keeps_the_word_through_main_and_merged_files(tmp_path):
    OmegaConf.save(
        OmegaConf.create({**text_model_config(), "safety": "report", "data": {"target": "x"}}), tmp_path / "a.yaml"
    )
    (tmp_path / "b.yaml").write_text("model: {params: {image_size: 16}}\n")
    config = read_config([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert model_info(config).safety == "report" and config.model.params.image_size == 16


def test_a_checker_without_a_check_is_refused():
    with pytest.raises(ValueError, match=r"--safety_checker x with --safety off \(the default of this config\)"):
        SafetySettings(checker="x").checked(info())
    assert SafetySettings("on", "x").checked(info()) == SafetySettings("on", "x")
