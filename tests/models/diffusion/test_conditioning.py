"""Laws of the conditions' normal form, the routing table, guidance and condition dropout."""

import pytest
import torch
from torch import nn

from ldm.models.diffusion.conditioning import ROUTES, DiffusionWrapper, join_conditions, normalize_condition
from ldm.models.diffusion.condition_stage import drop_condition
from ldm.models.diffusion.samplers.guidance import guided_output
from tests.reference import randn

X, T = randn(0, 2, 4, 8, 8), torch.tensor([1, 9])
MAP, CONTEXT, LABEL = randn(1, 2, 3, 8, 8), randn(2, 2, 5, 16), torch.tensor([3, 8])
PARTS = {"c_concat": [MAP], "c_crossattn": [CONTEXT], "c_adm": LABEL}


class Recorder(nn.Module):
    """A network that keeps what it was called with."""

    def forward(self, x, t, context=None, y=None):
        self.seen = {"channels": x.shape[1], "context": context, "y": y}
        return x[:, :4]


def wrapper(key):
    model = DiffusionWrapper({"target": "torch.nn.Identity"}, key)
    model.diffusion_model = Recorder()
    return model


@pytest.mark.parametrize("key", ROUTES)
def test_each_key_hands_over_exactly_its_parts(key):
    model = wrapper(key)
    model(X, T, **{name: PARTS[name] for name in ROUTES[key].needs})
    seen, needs = model.diffusion_model.seen, ROUTES[key].needs
    assert seen["channels"] == (7 if "c_concat" in needs else 4)
    assert (seen["context"] is not None) == ("c_crossattn" in needs)
    assert (seen["y"] is not None) == ("c_adm" in needs)


@pytest.mark.parametrize("key", [key for key in ROUTES if key])
def test_a_missing_part_is_refused_by_name(key):
    with pytest.raises(ValueError, match=f"{key!r} needs .*the condition has nothing"):
        normalize_condition({}, key)


def test_bare_tensors_and_lists_become_the_keys_part():
    assert normalize_condition(CONTEXT, "crossattn")["c_crossattn"] == [CONTEXT]
    assert normalize_condition([CONTEXT], "crossattn")["c_crossattn"] == [CONTEXT]
    assert normalize_condition(MAP, "concat")["c_concat"] == [MAP]
    assert normalize_condition(None, None) == {}


@pytest.mark.parametrize("cond", [LABEL, [LABEL], {"c_crossattn": [LABEL]}, {"c_adm": LABEL}])
def test_adm_accepts_the_published_forms(cond):
    assert torch.equal(normalize_condition(cond, "adm")["c_adm"], LABEL)


def test_a_bare_tensor_is_no_condition_for_two_parts():
    with pytest.raises(ValueError, match="'hybrid' needs a dict with c_concat, c_crossattn"):
        normalize_condition(CONTEXT, "hybrid")


def test_an_unknown_key_lists_the_choices():
    with pytest.raises(ValueError, match="'cross': choose one of None, concat, crossattn"):
        wrapper("cross")


def test_several_contexts_are_joined_along_their_length():
    model = wrapper("crossattn")
    model(X, T, c_crossattn=[CONTEXT, CONTEXT[:, :2]])
    assert model.diffusion_model.seen["context"].shape == (2, 7, 16)


class Linear:
    """apply_model(x, t, c) = x + c, counting its calls."""

    def __init__(self):
        self.batches = []

    def apply_model(self, x, t, c):
        self.batches.append(len(x))
        return x + (c["c_concat"][0] if isinstance(c, dict) else c)


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"c_concat": [c]}])
def test_guidance_extrapolates_from_unconditional_to_conditional_in_one_call(wrap):
    model, c, u = Linear(), randn(3, 2, 4, 8, 8), randn(4, 2, 4, 8, 8)
    out = guided_output(model.apply_model, X, T, wrap(c), wrap(u), 7.5)
    assert torch.allclose(out, X + u + 7.5 * (c - u), atol=1e-5) and model.batches == [4]


def test_conditions_of_different_form_cannot_be_joined():
    with pytest.raises(ValueError, match="differ in form"):
        join_conditions({"c_concat": [MAP]}, {"c_crossattn": [CONTEXT]})
    with pytest.raises(ValueError, match="differ in form"):
        join_conditions(CONTEXT, {"c_crossattn": [CONTEXT]})
    with pytest.raises(ValueError, match="cannot share a batch"):
        join_conditions(CONTEXT, CONTEXT[:, :3])


def test_leaves_that_are_no_tensors_must_agree():
    assert join_conditions({"c_crossattn": [CONTEXT], "w": 3.0}, {"c_crossattn": [CONTEXT], "w": 3.0})["w"] == 3.0
    with pytest.raises(ValueError, match=r"3\.0 and 1\.0"):
        join_conditions({"w": 3.0}, {"w": 1.0})


def test_dropping_replaces_only_the_chosen_samples():
    dropped = torch.tensor([True, False, True])
    assert drop_condition(["a", "b", "c"], ["", "", ""], dropped) == ["", "b", ""]
    labels = drop_condition({"class_label": torch.tensor([1, 2, 3])}, {"class_label": torch.tensor([9, 9, 9])}, dropped)
    assert labels["class_label"].tolist() == [9, 2, 9]
    pictures = drop_condition(torch.ones(3, 2, 4, 4), torch.zeros(3, 2, 4, 4), dropped)
    assert pictures.mean(dim=(1, 2, 3)).tolist() == [0, 1, 0]
