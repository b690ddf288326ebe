"""Samples of an evaluation: one batch after another, the same whether interrupted or not."""

import json

import numpy as np
import pytest

from ldm.config.model_info import model_info
from ldm.evaluation import sampling as module
from ldm.evaluation.image_sets import DatasetImages
from ldm.evaluation.sampling import Sampling, saved_samples
from ldm.inference.pipeline import load_model
from ldm.inference.requests import ClassConditionalRequest, ConditionalRequest, TextToImageRequest
from tests.tiny import save_model


class Data:
    """Three images with captions, classes and masks."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        image = np.full((32, 32, 3), index / 3, np.float32)
        mask = np.zeros((32, 32, 1), np.float32)
        mask[8:20] = 1
        values = {"image": image, "caption": f"image {index}", "class_label": index}
        return {**values, "mask": mask, "masked_image": image * (1 - mask)}


CONDITIONS = DatasetImages("data", Data(), "image", "data")
KINDS = {
    "text": (TextToImageRequest(prompt="-", steps=2, scale=1.5), {}),
    "class": (ClassConditionalRequest(steps=2, scale=1.5), {}),
    "unconditional": (ClassConditionalRequest(steps=2), {}),
    "inpaint": (ConditionalRequest(steps=2, scale=1.0), {"concat_keys": ["mask"]}),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """(pipeline, sampling) of a model of each kind."""
    asked, changes = KINDS[request.param]
    saved = save_model(tmp_path_factory.mktemp("model"), request.param, timesteps=10, **changes)
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full")
    conditions = None if request.param == "unconditional" else CONDITIONS
    return pipeline, Sampling(asked.checked(pipeline.info), pipeline.info, conditions, 2)


def pixels(samples) -> np.ndarray:
    return np.stack([samples.image(k) for k in range(len(samples))])


def test_an_interrupted_run_resumes_to_the_same_images(made, tmp_path, monkeypatch):
    pipeline, sampling = made
    whole = saved_samples(tmp_path / "whole", 5, sampling, {}, lambda: pipeline, progress=False)
    generate, calls = Sampling.generate, []

    def stops(self, pipeline, indices):
        if indices.start == 2 and not calls:
            calls.append(indices)
            raise KeyboardInterrupt
        return generate(self, pipeline, indices)

    monkeypatch.setattr(Sampling, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        saved_samples(tmp_path / "part", 5, sampling, {}, lambda: pipeline, progress=False)
    assert [file.name for file in sorted((tmp_path / "part").glob("*.npz"))] == ["000000-000001.npz"]
    resumed = saved_samples(tmp_path / "part", 5, sampling, {}, lambda: pipeline, progress=False)
    assert len(resumed) == 5 and np.array_equal(pixels(whole), pixels(resumed))
    assert len({image.tobytes() for image in pixels(whole)}) == 5 and whole.seconds > 0


def test_finished_samples_need_no_model(made, tmp_path):
    pipeline, sampling = made
    first = saved_samples(tmp_path, 3, sampling, {"ckpt": "a"}, lambda: pipeline, progress=False)
    again = saved_samples(tmp_path, 3, sampling, {"ckpt": "a"}, None, progress=False)
    assert np.array_equal(pixels(first), pixels(again))


def test_more_samples_keep_those_that_are_there(made, tmp_path):
    pipeline, sampling = made
    few = pixels(saved_samples(tmp_path, 2, sampling, {}, lambda: pipeline, progress=False))
    more = pixels(saved_samples(tmp_path, 4, sampling, {}, lambda: pipeline, progress=False))
    assert np.array_equal(few, more[:2])


def test_samples_of_other_settings_are_not_mixed(tmp_path):
    module.check_settings(tmp_path / "settings.json", {"scale": 1.5, "ckpt": "a"})
    module.check_settings(tmp_path / "settings.json", {"scale": 1.5, "ckpt": "a"})
    with pytest.raises(ValueError, match=r"holds samples with scale 1\.5, now 3\.0; choose another --outdir"):
        module.check_settings(tmp_path / "settings.json", {"scale": 3.0, "ckpt": "a"})
    with pytest.raises(ValueError, match=r"holds samples with lora None, now b"):
        module.check_settings(tmp_path / "settings.json", {"scale": 1.5, "lora": "b"})
    assert json.loads((tmp_path / "settings.json").read_text())["scale"] == 1.5


def test_samples_of_a_model_that_was_moved_are_kept_and_damaged_settings_are_one_line(tmp_path):
    module.check_settings(tmp_path / "settings.json", {"ckpt": "a", "config": "b", "ckpt_fingerprint": "1"})
    module.check_settings(tmp_path / "settings.json", {"ckpt": "c", "config": "d", "ckpt_fingerprint": "1"})
    for content in ("{", "[1]", "null", "7"):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"settings\.json: damaged; delete"):
            module.check_settings(tmp_path / "settings.json", {"ckpt": "a"})


def test_all_conditions_are_taken_before_one_repeats():
    info = model_info({"model": {"params": {"cond_stage_config": {"target": "a.CaptionEmbedder"}}}})
    sampling = Sampling(TextToImageRequest(), info, CONDITIONS, 2)
    assert sorted(sampling.text(k) for k in range(3)) == ["image 0", "image 1", "image 2"]
    assert all(sampling.text(k + 3) == sampling.text(k) for k in range(3))
    assert {sampling.text(k): sampling.label(k) for k in range(3)} == {
        f"image {k}": CONDITIONS.label(k) for k in range(3)
    }
    with pytest.raises(ValueError, match="needs conditions"):
        Sampling(TextToImageRequest(), info, None, 2)
