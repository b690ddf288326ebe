"""Laws of the normal form of conditions and of the routing table."""

import pytest
import torch
from torch import nn

from ldm.models.diffusion.conditioning import ROUTES, DiffusionWrapper, Route, join_conditions, normalize_condition
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


def test_a_key_of_another_package_gets_its_own_parts(monkeypatch):
    own = Route(("c_style",), None, lambda net, x, t, c: net(x, t, y=c["c_style"], context=c["c_strength"]))
    monkeypatch.setitem(ROUTES, "styled", own)
    parts = normalize_condition({"c_style": LABEL, "c_strength": 0.5, "c_concat": None}, "styled")
    assert parts == {"c_style": LABEL, "c_strength": 0.5}
    model = wrapper("styled")
    model(X, T, **parts)
    assert model.diffusion_model.seen["y"] is LABEL and model.diffusion_model.seen["context"] == 0.5
    with pytest.raises(ValueError, match="'styled' needs c_style; the condition has c_strength"):
        normalize_condition({"c_strength": 0.5}, "styled")


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
