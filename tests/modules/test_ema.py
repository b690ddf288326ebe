"""Averaged weights. tests/golden/numerics/ema.npz: figures of the published implementation."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ldm.config.instantiate import ConfigError
from ldm.modules.ema import EMAConfig, LitEma, PowerEma, power_gamma
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


def test_an_update_is_the_published_formula_bit_for_bit():
    model = nn.Sequential(*(nn.Linear(7, 7) for _ in range(5)))
    ema = LitEma(model, decay=0.9999)
    before = {name: ema.get_buffer(shadow).clone() for name, shadow in ema.m_name2s_name.items()}
    train(model, 1, ema)
    one_minus_decay = 1.0 - torch.minimum(torch.tensor(0.9999), (1 + ema.num_updates) / (10 + ema.num_updates))
    for name, parameter in model.named_parameters():
        expected = before[name] - one_minus_decay * (before[name] - parameter.detach())
        assert torch.equal(ema.get_buffer(ema.m_name2s_name[name]), expected)


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


def test_an_update_averages_the_modules_and_parameters_that_the_model_has_now():
    model = nn.ModuleDict({"inner": make_model()})
    ema = LitEma(model, decay=0.0, use_num_upates=False)
    ema(model)
    model["inner"][0] = nn.Linear(4, 3)
    model["inner"][1].bias = nn.Parameter(torch.ones(2))
    ema(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ema.get_buffer(ema.m_name2s_name[name]), parameter.detach(), msg=name)


def test_a_wrapper_with_names_of_its_own_is_averaged_under_them():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def named_parameters(self, *args, **kwargs):
            return self.inner.named_parameters(*args, **kwargs)

    model = Wrapper()
    ema = LitEma(model, decay=0.0, use_num_upates=False)
    with torch.no_grad():
        model.inner[0].weight.add_(1.0)
    del ema.m_name2s_name["1.weight"]
    ema(model)
    torch.testing.assert_close(ema.get_buffer("0weight"), model.inner[0].weight.detach())
    model.inner[0].weight = None
    with pytest.raises(ValueError, match=r"no parameter '0\.weight' \(1 missing\)"):
        ema(model)


def test_another_model_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter '1\.weight'"):
        LitEma(make_model())(nn.Sequential(nn.Linear(4, 3)))


def test_decay_is_checked():
    with pytest.raises(ValueError, match=r"decay=1\.5"):
        LitEma(make_model(), decay=1.5)


def test_builds_without_memory_and_follows_the_model_out_of_it():
    with torch.device("meta"):
        ema = LitEma(nn.Linear(2, 2))
    ema.bfloat16()
    assert all(buffer.is_meta and buffer.dtype != torch.bfloat16 for buffer in ema.buffers())
    assert all(not buffer.is_meta for buffer in ema.to_empty(device="cpu").buffers())


# --------------------------------------------------------------------------------------------------- section ema_config


def averaged(model, steps, **section):
    """Averages of random steps of the parameters -> the average of the section."""
    ema = EMAConfig(**section).build(model)
    for i in range(steps):
        with torch.no_grad():
            for j, parameter in enumerate(model.parameters()):
                parameter.add_(randn(100 + i * 10 + j, *parameter.shape) * 0.1)
        for average in ema.all_averages():
            average(model)
    return ema


@pytest.mark.parametrize("warm_up", [True, False])
def test_an_update_every_n_steps_uses_the_product_of_the_decays_of_these_steps(warm_up):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = LitEma(model, decay=0.9, use_num_upates=warm_up, every=4)
    expected, product = 0.0, 1.0
    for n in range(1, 31):
        nn.init.constant_(model.weight, float(n))
        if n == 18:  # as after a resume
            state, ema = ema.state_dict(), LitEma(model, decay=0.9, use_num_upates=warm_up, every=4)
            ema.load_state_dict(state)
        ema(model)
        product *= min(0.9, (1 + n) / (10 + n)) if warm_up else 0.9
        if n % 4 == 0:
            expected, product = product * expected + (1 - product) * n, 1.0
    assert abs(ema.weight.item() - expected) < 1e-5 * expected
    assert ema.num_updates.item() == 30 and ema.time == 28


@pytest.mark.parametrize("every", [1, 5])
def test_a_power_function_average_weighs_steps_by_their_profile(every):
    """The profile of call k of t is the integral of (gamma + 1) s^gamma / t^(gamma + 1) over [k - every, k]."""
    model = nn.Linear(1, 1, bias=False)
    ema, gamma = PowerEma(model, 0.1, every=every), power_gamma(0.1)
    expected = 0.0
    for n in range(1, 31):
        nn.init.constant_(model.weight, float(n % 7))
        ema(model)
        if n % every == 0:
            expected += (n % 7) * ((n / 30) ** (gamma + 1) - ((n - every) / 30) ** (gamma + 1))
    assert ema.weight.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("width, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponent_of_a_width_is_that_of_the_paper(width, gamma):
    found = power_gamma(width)
    assert found == pytest.approx(gamma, abs=0.005)
    assert ((found + 1) / (found + 3)) ** 0.5 / (found + 2) == pytest.approx(width)


def test_the_first_average_has_the_published_keys_and_bits_and_the_others_their_own():
    published = LitEma(make_model(), decay=0.99)
    train(make := make_model(), 5, published)
    ema = averaged(make_model(), 5, averages=[{"decay": 0.99}, {"decay": 0.5, "warm_up": False}, {"sigma_rel": 0.1}])
    state = ema.state_dict()
    first = {name: value for name, value in state.items() if not name.startswith("averages.")}
    assert list(first) == list(published.state_dict())
    assert all(torch.equal(value, first[name]) for name, value in published.state_dict().items())
    assert {name.split(".")[1] for name in set(state) - set(first)} == {"decay_0_5", "sigma_rel_0_1"}
    ema.copy_to(make)
    assert torch.equal(make[0].weight, first["0weight"])


def test_averages_on_the_cpu_stay_there():
    model = make_model()
    ema = averaged(model, 3, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(ema.buffers(), averaged(make_model(), 3).buffers()))
    with torch.device("meta"):
        ema = EMAConfig(device="cpu").build(nn.Linear(2, 2))
    assert all(buffer.device.type == "cpu" for buffer in ema.to_empty(device="cpu").buffers())


def test_another_width_is_refused_on_resume():
    state = PowerEma(make_model(), 0.1).state_dict()
    ema = PowerEma(make_model(), 0.2)
    with pytest.raises(ConfigError, match=r"sigma_rel 0.2, but the checkpoint's average has 0.1"):
        ema.load_state_dict(state)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"averages": []}, "at least one"),
        ({"averages": [{"decay": 1.5}]}, r"averages\[0\].decay 1.5: choose"),
        ({"averages": [{"sigma_rel": 0.3}]}, r"averages\[0\].sigma_rel 0.3: choose"),
        ({"averages": [{"decay": 0.9, "sigma_rel": 0.1}]}, "expected {decay: D}"),
        ({"averages": [{"decays": 0.9}]}, r"averages\[0\].decays: unknown key; did you mean 'decay'"),
        ({"averages": [{"decay": 0.9}, {"decay": 0.9}]}, "an earlier one is the same"),
        ({"snapshot_every": 10}, "only power-function averages"),
        ({"averages": [{"sigma_rel": 0.1}], "snapshot_every": 10, "every": 3}, "expected a multiple of every 3"),
    ],
)
def test_mistakes_in_the_section_are_refused(section, message):
    with pytest.raises(ValueError, match=message) as error:
        EMAConfig(**section)
    assert str(error.value).startswith("ema_config.")
