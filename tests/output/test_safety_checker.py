"""The safety checker: diffusers' decisions, weights that must be complete, and where they come from."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.output.images import GeneratedImage
from ldm.output.safety import Safety, SafetySettings
from ldm.output.safety_checker import SafetyChecker, find_checker
from tests.output.toys import make_checker, save_checker

EVERYTHING, NOTHING = -2.0, 2.0  # thresholds of a cosine


def noise(width: int = 40, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def safety(mode: str, folder) -> Safety:
    return Safety(SafetySettings(mode, None if mode == "off" else str(folder)))


def test_it_decides_as_diffusers_does(tmp_path):
    """The threshold lies between two images, so wrong pixels, weights or names would show."""
    from transformers import CLIPImageProcessor

    model, generated_images = make_checker(), [noise(seed=k) for k in range(6)]
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        pooled = model.vision_model(processor(images=generated_images, return_tensors="pt")["pixel_values"])[1]
        near = torch.cosine_similarity(
            model.visual_projection(pooled)[:, None], model.concept_embeds[None], dim=-1
        ).amax(1)
    threshold = float(near.sort().values[2:4].mean())
    expected = [bool(score > threshold) for score in near]
    assert sum(expected) == 3 and float((near - threshold).abs().min()) > 2e-3, "diffusers rounds to thousandths"
    for file in ("model.safetensors", "pytorch_model.bin"):
        checker = SafetyChecker(find_checker(str(save_checker(tmp_path / file, threshold, file))))
        assert [checker.flags(generated) for generated in generated_images] == expected


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
def test_weights_that_would_flag_nothing_are_refused(tmp_path, changes, words):
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


def test_a_missing_checker_is_reported_with_the_next_step(tmp_path, monkeypatch):
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
