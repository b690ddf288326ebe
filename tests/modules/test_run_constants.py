"""Keys and values of the cross-attention in a sampling run: computed once, and the same bits."""

import copy

import pytest
import torch
from torch import nn

from ldm.models.diffusion.conditioning import joined_context
from ldm.models.diffusion.controlnet import Control, ControlledModel
from ldm.models.diffusion.samplers.guidance import GuidedNetwork
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.modules.run_constants import RunConstants, cast, project
from ldm.util import instantiate_from_config
from tests.reference import randn, seed_weights
from tests.tiny import KINDS, text_model_config

X_T, COND, UNCOND, HINT = randn(0, 2, 4, 8, 8), randn(1, 2, 5, 16), randn(2, 2, 5, 16), randn(3, 2, 3, 32, 32)
STEPS = 4


def text_model(kind="text"):
    config = text_model_config(**{"cond_stage_trainable": kind == "text", **KINDS[kind]})
    return seed_weights(instantiate_from_config(config["model"])).eval()


def conditions(hinted):
    return [{"c_crossattn": [c], "c_concat": [HINT]} if hinted else c for c in (COND, UNCOND)]


def sample(model, cond=COND, uncond=UNCOND, name="ddim", **options):
    torch.manual_seed(0)
    options = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": uncond, **options}
    sampler = make_sampler(name, model)
    return sampler.sample(STEPS, 2, (4, 8, 8), cond, x_T=X_T, verbose=False, **options).samples


def attention(model):
    """The cross-attention layer of the UNet; the tiny one has it in the middle alone."""
    return model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2


@pytest.fixture
def calls(monkeypatch):
    """The weights of the linear layers that ran, in order."""
    weights, linear = [], torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda x, w, b=None: weights.append(w) or linear(x, w, b))
    return weights


def count(calls, layer):
    return sum(weight is layer.weight for weight in calls)


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm_solver", "ancestral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_have_the_same_bits_as_with_layers_called_at_each_step(name, dtype, monkeypatch):
    model = text_model()
    model.model.to(dtype)
    samples = sample(model, name=name)
    monkeypatch.setattr(RunConstants, "add", lambda self, tensor: tensor)
    assert torch.equal(sample(model, name=name), samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_computed_once_in_each_run(dtype, calls):
    model = text_model()
    model.model.to(dtype)
    layers = attention(model).to_k, attention(model).to_v
    first = sample(model)
    assert [count(calls, layer) for layer in layers] == [1, 1] and count(calls, attention(model).to_q) == STEPS
    other = sample(model, randn(5, 2, 5, 16))
    assert [count(calls, layer) for layer in layers] == [2, 2] and not torch.equal(other, first)
    assert torch.equal(sample(model), first)


@pytest.mark.parametrize("plain", [False, True])
def test_a_control_net_computes_its_own_once_too(plain, calls):
    model = text_model("control")
    net, sampled = model.control_model, model
    if plain:
        sampled = ControlledModel(text_model().bfloat16(), [Control(net.bfloat16(), [1.0] * 9)])
    sample(sampled, *conditions(hinted=True))
    layer = net.middle_block[1].transformer_blocks[0].attn2
    assert [count(calls, each) for each in (layer.to_k, layer.to_v, layer.to_q)] == [1, 1, STEPS]


def test_unguided_steps_of_a_run_keep_their_own(calls):
    model = text_model()
    sigmas = (1.0 / model.alphas_cumprod - 1.0).sqrt()  # the steps begin at timesteps 1, 26, 51 and 76
    sample(model, guidance_interval=[float(sigmas[26]) - 1e-3, float(sigmas[51]) + 1e-3])  # on in the middle two
    assert count(calls, attention(model).to_k) == 2  # of both conditions, and of one alone


def test_a_hook_runs_at_each_step():
    model, seen = text_model(), []
    attention(model).to_k.register_forward_hook(lambda layer, inputs, output: seen.append(1) or 2.0 * output)
    hooked = sample(model)
    assert len(seen) == STEPS
    attention(model).to_k._forward_hooks.clear()
    assert not torch.equal(sample(model), hooked)


def test_a_replaced_layer_runs_at_each_step():
    model, seen = text_model(), []

    class Other(nn.Linear):
        def forward(self, x):
            seen.append(1)
            return super().forward(x)

    attention(model).to_k.__class__ = Other
    to_v = attention(model).to_v
    to_v.forward = lambda x: seen.append(1) or nn.functional.linear(x, to_v.weight)
    sample(model)
    assert len(seen) == 2 * STEPS


def test_weights_that_change_in_a_run_are_used():
    def changed(change):
        model = text_model()
        with torch.no_grad():
            return sample(model, callback=lambda step: change(attention(model).to_v))

    def in_place(layer):
        layer.weight.mul_(2.0)

    def replace(layer):
        layer.weight = nn.Parameter(2.0 * layer.weight)

    assert torch.equal(changed(in_place), changed(replace))
    assert not torch.equal(changed(in_place), sample(text_model()))


def test_a_condition_that_changes_in_a_run_is_used(monkeypatch):
    model, options = text_model(), {"uncond": None, "unconditional_guidance_scale": 1.0}

    def changed():
        cond = COND.clone()
        return sample(model, cond, callback=lambda step: cond.mul_(2.0) if step == 0 else None, **options)

    samples = changed()
    assert not torch.equal(samples, sample(model, **options))
    monkeypatch.setattr(RunConstants, "add", lambda self, tensor: tensor)
    assert torch.equal(changed(), samples)


def test_nothing_stays_with_the_model_after_a_run():
    model = text_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    keys = set(model.state_dict())
    sample(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert set(model.state_dict()) == keys
    assert torch.equal(sample(copy.deepcopy(model)), sample(model))


def test_inference_mode_samples_alike():
    model = text_model()
    with torch.inference_mode():
        samples = sample(model, COND.clone(), UNCOND.clone())
    assert torch.equal(samples, sample(model))


def test_gradients_flow_through_layers_that_a_run_has_computed():
    layer, x, run = nn.Linear(16, 8), COND.clone().requires_grad_(), RunConstants()
    run.add(x)
    with run.in_use():
        with torch.no_grad():
            assert project(layer, x) is project(layer, x)
        project(layer, x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


@torch.no_grad()
def test_only_the_constants_of_the_run_in_use_are_computed_once():
    layer, run, other = nn.Linear(16, 8), RunConstants(), RunConstants()
    half = cast(COND, torch.bfloat16)
    assert cast(COND, torch.bfloat16) is not half and project(layer, COND) is not project(layer, COND)
    run.add(COND)
    with run.in_use():
        kept, half = project(layer, COND), cast(COND, torch.bfloat16)
        assert project(layer, COND) is kept and cast(COND, torch.bfloat16) is half
        assert project(layer.bfloat16(), half) is project(layer, half)  # what is cast is a constant, too
        assert project(layer, half + 0) is not project(layer, half + 0)
        with other.in_use():
            assert cast(COND, torch.bfloat16) is not half
        assert cast(COND, torch.bfloat16) is half


@torch.no_grad()
def test_hooks_of_all_modules_are_called(monkeypatch):
    layer, run, seen = nn.Linear(16, 8), RunConstants(), []
    run.add(COND)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *args: seen.append(1))
    try:
        with run.in_use():
            project(layer, COND), project(layer, COND)
    finally:
        hook.remove()
    assert len(seen) == 2


@torch.no_grad()
def test_a_compiled_network_is_called_as_ever():
    layer, run = nn.Linear(16, 8), RunConstants()
    run.add(COND)
    compiled = torch.compile(lambda x: project(layer, x), backend="eager", fullgraph=True)
    with run.in_use():
        assert torch.equal(compiled(COND), layer(COND))


def test_the_network_of_a_run_uses_its_constants_only_within_its_calls():
    seen = []

    def apply_model(x, t, cond):
        seen.append(cast(cond, torch.float64))
        return torch.cat([x, x])

    network = GuidedNetwork(apply_model, COND, UNCOND, 5.0)
    with torch.no_grad():
        for _ in range(2):
            network(X_T, torch.tensor([1, 1]))
        assert seen[0] is seen[1]
        assert cast(network.joined, torch.float64) is not seen[0]


def test_a_network_that_modifies_its_context_has_the_same_one_at_each_step():
    class Doubling:
        model = None

        def apply_model(self, x, t, cond):
            context = joined_context({"c_crossattn": [cond]})
            context = cast(context, torch.bfloat16) if self.half else context
            return context.mul_(2.0)

    with torch.no_grad():
        for half in (False, True):
            net, before = Doubling(), COND.clone()
            net.half = half
            network = GuidedNetwork(net.apply_model, COND, None, 1.0)
            outputs = [network(X_T, torch.zeros(2)).clone() for _ in range(3)]
            assert all(torch.equal(each, outputs[0]) for each in outputs) and torch.equal(COND, before)
            assert len(network.constants._tensors) <= 3  # nothing is kept of the modified ones


def test_what_autocast_computed_is_not_taken_outside_of_it_nor_weights_that_are_computed():
    layer, parametrized, constants = nn.Linear(16, 3), nn.Linear(16, 3), RunConstants()
    nn.utils.parametrizations.weight_norm(parametrized)
    constants.add(COND)
    with torch.no_grad(), constants.in_use():
        with torch.autocast("cpu", torch.bfloat16):
            assert project(layer, COND).dtype == torch.bfloat16
        assert project(layer, COND).dtype == torch.float32
        project(parametrized, COND)
        assert len(constants._kept) == 2


def test_conditions_in_turn_are_each_computed_once(calls):
    layer, constants = nn.Linear(16, 3), RunConstants()
    both = [constants.add(each) for each in (COND, UNCOND)]
    with torch.no_grad(), constants.in_use():
        for each in both * 3:
            project(layer, each)
    assert count(calls, layer) == 2
