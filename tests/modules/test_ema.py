"""Averaged weights. tests/golden/numerics/ema.npz: figures of the published implementation."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error, seed_weights


def make_model() -> nn.Sequential:
    return seed_weights(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))


def train(model: nn.Module, steps: int, ema: LitEma) -> None:
    """Random steps of the parameters, each followed by an update of the average."""
    for i in range(steps):
        with torch.no_grad():
            for j, parameter in enumerate(model.parameters()):
                parameter.add_(randn(100 + i * 10 + j, *parameter.shape) * 0.1)
        ema(model)


def test_agrees_with_the_published_figures_and_names():
    reference = np.load(GOLDEN / "numerics/ema.npz")
    model = make_model()
    ema = LitEma(model, decay=0.99)
    train(model, 20, ema)
    state = ema.state_dict()
    assert set(state) == set(reference.files) == {"decay", "num_updates", "0weight", "0bias", "1weight", "1bias"}
    for name in reference.files:
        assert rel_error(state[name], reference[name]) < TOLERANCE, name


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_average_is_its_closed_form(warm_up):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = LitEma(model, decay=0.9, use_num_upates=warm_up)
    expected = 0.0
    for n in range(1, 31):
        nn.init.constant_(model.weight, float(n))
        ema(model)
        decay = min(0.9, (1 + n) / (10 + n)) if warm_up else 0.9
        expected = decay * expected + (1 - decay) * n
    assert abs(ema.weight.item() - expected) < 1e-6 * expected
    assert ema.num_updates.item() == (30 if warm_up else -1)


def test_copy_store_restore_give_the_trained_weights_back_bit_for_bit():
    model = make_model()
    ema = LitEma(model, decay=0.5)
    train(model, 3, ema)
    trained = copy.deepcopy(model.state_dict())
    ema.store(model.parameters())
    ema.copy_to(model)
    assert torch.equal(model[0].weight, getattr(ema, "0weight"))
    ema.restore(model.parameters())
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_stores_nest():
    model = make_model()
    ema = LitEma(model)
    first = model[0].weight.detach().clone()
    ema.store(model.parameters())
    nn.init.zeros_(model[0].weight)
    ema.store(model.parameters())
    nn.init.ones_(model[0].weight)
    ema.restore(model.parameters())
    assert (model[0].weight == 0).all()
    ema.restore(model.parameters())
    assert torch.equal(model[0].weight, first)
    with pytest.raises(RuntimeError, match="store"):
        ema.restore(model.parameters())


def test_a_half_precision_model_has_a_float32_average():
    model = make_model().bfloat16()
    ema = LitEma(model, decay=0.9999, use_num_upates=False).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = getattr(ema, "0weight").clone()
    ema(model)
    after = getattr(ema, "0weight")
    assert after.dtype == torch.float32
    torch.testing.assert_close(after - before, torch.full_like(after, 1e-4), atol=2e-6, rtol=0.02)
    ema.copy_to(model)
    assert model[0].weight.dtype == torch.bfloat16


def test_only_trainable_parameters_are_averaged():
    model = make_model()
    model[1].requires_grad_(False)
    assert set(LitEma(model).m_name2s_name) == {"0.weight", "0.bias"}


def test_names_that_collide_without_dots_are_errors():
    model = nn.ModuleDict({"a": nn.ModuleDict({"bc": nn.Linear(1, 1)}), "ab": nn.ModuleDict({"c": nn.Linear(1, 1)})})
    with pytest.raises(ValueError, match="abcweight"):
        LitEma(model)


def test_another_model_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter '1\.weight'"):
        LitEma(make_model())(nn.Sequential(nn.Linear(4, 3)))


def test_decay_is_checked():
    with pytest.raises(ValueError, match=r"decay=1\.5"):
        LitEma(make_model(), decay=1.5)


def test_builds_without_memory_and_follows_the_model_out_of_it():
    with torch.device("meta"):
        ema = LitEma(nn.Linear(2, 2))
    assert all(buffer.is_meta for buffer in ema.buffers())
    assert all(not buffer.is_meta for buffer in ema.to_empty(device="cpu").buffers())
