"""Requests and sweeps of evaluations."""

import pytest

from ldm.config.model_info import model_info
from ldm.evaluation.plan import is_first_stage, parse_sweep, points_of, request_type, usual_scale
from ldm.inference.requests import ClassConditionalRequest, ConditionalRequest, TextToImageRequest
from ldm.paths import ROOT
from tests.tiny import KINDS, text_model_config

TYPES = {
    "text": TextToImageRequest,
    "class": ClassConditionalRequest,
    "unconditional": ClassConditionalRequest,
    "inpaint": ConditionalRequest,
    "edit": ConditionalRequest,
}


def info(kind: str, **changes):
    return model_info(text_model_config(**{**KINDS[kind], **changes}))


@pytest.mark.parametrize("kind", TYPES)
def test_a_model_is_sampled_by_the_request_of_its_script(kind):
    assert request_type(info(kind)) is TYPES[kind]


def test_the_usual_scale_needs_training_with_dropout():
    assert usual_scale(info("text", cond_dropout=0.1)) == 3.0 and usual_scale(info("class")) == 1.0


def test_a_sweep_is_every_combination_of_its_values():
    model = info("text")
    swept = parse_sweep(["scale=1,1.5", "steps=2,5,5", "sampler=ddim,heun"])
    points = points_of(TextToImageRequest(prompt="a"), swept, model)
    assert len(points) == 8 and points[0].name == "scale1-steps2-ddim"
    near = points_of(
        TextToImageRequest(prompt="a"), parse_sweep(["seed=1234567,1234568", "scale=1.5,1.50000001"]), model
    )
    assert len({point.name for point in near}) == 4
    assert {(p.request.scale, p.request.steps, p.request.sampler) for p in points} == {
        (scale, steps, sampler) for scale in (1, 1.5) for steps in (2, 5) for sampler in ("ddim", "heun")
    }


@pytest.mark.parametrize(
    "texts, words",
    [
        (["scale"], "expected NAME=VALUE,VALUE"),
        (["scales=1"], "unknown setting; did you mean 'scale'"),
        (["steps=1.5"], "expected whole numbers"),
        (["scale=a"], "expected numbers"),
        (["scale=1", "scale=2"], "given twice"),
        (["seed=" + ",".join(map(str, range(201)))], "201 points, choose at most 200"),
    ],
)
def test_a_wrong_sweep_is_one_line(texts, words):
    with pytest.raises(ValueError, match=words):
        parse_sweep(texts)


def test_every_point_is_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="steps"):
        points_of(TextToImageRequest(prompt="a"), parse_sweep(["steps=5,5000"]), info("text"))


def test_first_stages_are_told_from_models_by_their_config():
    found = [is_first_stage([ROOT / f"configs/quickstart/{name}.yaml"]) for name in ("autoencoder", "text2image")]
    assert found == [True, False]
