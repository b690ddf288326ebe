"""Classifier-free guidance, its rescaling, and dynamic thresholding."""

from types import MethodType

import pytest
import torch

from ldm.inference.randomness import SilentModel
from ldm.models.diffusion.samplers.guidance import GuidedNetwork, dynamic_threshold
from ldm.util import instantiate_from_config
from tests.models.diffusion.samplers.toy import COND, UNCOND, X_T, ToyModel
from tests.reference import randn, rel_error, seed_weights
from tests.tiny import KINDS, text_model_config

T = torch.tensor([500, 700])


def guided_output(apply_model, x, t, *args, **kwargs):
    return GuidedNetwork(apply_model, *args, **kwargs)(x, t)


def test_guidance_is_its_formula_in_one_call_of_a_double_batch():
    model = ToyModel()
    cond, uncond = (model.apply_model(X_T, T, c) for c in (COND, UNCOND))
    model.calls.clear()
    out = guided_output(model.apply_model, X_T, T, COND, UNCOND, 5.0)
    assert torch.allclose(out, uncond + 5.0 * (cond - uncond), atol=1e-5)
    assert len(model.calls) == 1 and model.calls[0][1].tolist() == [500, 700, 500, 700]


def test_the_conditions_of_a_run_are_joined_once():
    conds = []
    network = GuidedNetwork(lambda x, t, c: conds.append(c) or torch.cat([X_T, X_T]), COND, UNCOND, 5.0)
    for _ in range(2):
        network(X_T, T)
    assert conds[0] is conds[1] and torch.equal(conds[0], torch.cat([UNCOND, COND]))
    network(X_T, T, guided=False)
    assert conds[2] is COND


def test_conditions_that_cannot_be_joined_pass_where_nothing_guides():
    network = GuidedNetwork(lambda x, t, c: x, COND, [UNCOND], 5.0)  # research code may join them in its own step
    assert network(X_T, T, guided=False) is X_T
    with pytest.raises(ValueError, match="conditions differ in form"):
        network(X_T, T)


def test_the_first_layers_of_a_text_model_run_once_for_both_conditions():
    model = seed_weights(instantiate_from_config(text_model_config()["model"])).eval()
    x, cond, uncond = randn(0, 2, 4, 8, 8), randn(1, 2, 5, 16), randn(2, 2, 5, 16)
    network, sizes = GuidedNetwork(model.apply_model, cond, uncond, 5.0), []
    assert network.repeats_inputs
    with torch.no_grad():
        both = GuidedNetwork(lambda *args: model.apply_model(*args), cond, uncond, 5.0)(x, T)  # not the model's own
        once = network(x, T)
        assert rel_error(once, both) < 1e-5
        for layer in (model.model.diffusion_model.input_blocks[1], model.model.diffusion_model.out):
            layer.register_forward_pre_hook(lambda layer, inputs: sizes.append(len(inputs[0])))
        network(x, T)
    assert sizes == [2, 4]


@pytest.mark.parametrize("kind", ["control", "depth", "class"])
def test_only_a_model_that_is_conditioned_by_its_context_alone_repeats_its_inputs(kind):
    config = text_model_config(**{"cond_stage_trainable": kind == "class", **KINDS[kind]})
    model = instantiate_from_config(config["model"])
    assert model.repeats_inputs == (kind == "class")
    model.apply_model = MethodType(lambda self, x, t, cond: x, model)  # as research code replaces it
    assert not model.repeats_inputs
    wrapper = SilentModel(model)
    assert not GuidedNetwork(wrapper.apply_model, COND, UNCOND, 5.0).repeats_inputs


def test_scale_one_and_no_unconditional_conditioning_are_the_plain_call():
    model = ToyModel()
    for uncond, scale in ((UNCOND, 1.0), (None, 5.0)):
        out = guided_output(model.apply_model, X_T, T, COND, uncond, scale, 0.7)
        assert torch.equal(out, model.apply_model(X_T, T, COND))


def test_image_guidance_is_eq_3_of_instruct_pix2pix_in_one_call_of_a_triple_batch():
    calls = []

    def apply_model(x, t, cond):
        calls.append(t.tolist())
        return x + cond["c_concat"][0] + 10.0 * cond["c_crossattn"][0]

    ones = torch.ones_like(X_T)
    cond = {"c_concat": [2.0 * ones], "c_crossattn": [3.0 * ones]}
    uncond = {"c_concat": [0.0 * ones], "c_crossattn": [1.0 * ones]}
    none, image, both = X_T + 10.0, X_T + 12.0, X_T + 32.0
    for scale, image_scale in ((7.5, 1.5), (1.0, 1.5), (3.0, 0.0)):
        out = guided_output(apply_model, X_T, T, cond, uncond, scale, image_scale=image_scale)
        assert torch.allclose(out, none + image_scale * (image - none) + scale * (both - image), atol=1e-4)
    assert calls == [[500, 700] * 3] * 3
    plain = guided_output(apply_model, X_T, T, cond, uncond, 7.5, image_scale=1.0)
    assert torch.allclose(plain, none + 7.5 * (both - none), atol=1e-4) and calls[-1] == [500, 700] * 2
    with pytest.raises(ValueError, match="image_guidance_scale needs conditions with c_concat"):
        guided_output(apply_model, X_T, T, ones, ones, 7.5, image_scale=1.5)


def test_full_rescale_gives_the_guided_output_the_deviation_of_the_conditional_one():
    call = ToyModel().apply_model
    plain = guided_output(call, X_T, T, COND, UNCOND, 1.0)
    guided, half, full = (guided_output(call, X_T, T, COND, UNCOND, 40.0, rescale) for rescale in (0.0, 0.5, 1.0))
    std = [out.flatten(1).std(dim=1) for out in (plain, guided, full)]
    assert torch.allclose(std[2], std[0], rtol=1e-4) and not torch.allclose(std[1], std[0], rtol=1e-2)
    assert torch.allclose(half, (guided + full) / 2, atol=1e-5)
    assert rel_error(full / std[2][:, None, None, None], guided / std[1][:, None, None, None]) < 1e-5


def test_rescaling_the_zeros_of_an_untrained_network_leaves_them_zero():
    out = guided_output(lambda x, t, c: torch.zeros_like(x), X_T, T, COND, UNCOND, 5.0, 0.7)
    assert torch.equal(out, torch.zeros_like(X_T))


def test_dynamic_threshold_is_its_formula():
    x0 = torch.arange(-50, 50).float().reshape(1, 4, 5, 5) / 10
    out = dynamic_threshold(torch.cat([x0, x0 / 100]), 0.9)
    s = 4.5  # 90 of the 100 magnitudes 0, .1, .1, ... 4.9, 4.9, 5.0 are at most this
    assert torch.allclose(out[0], x0[0].clamp(-s, s) / s)
    assert torch.equal(out[1], x0[0] / 100)  # within [-1, 1] nothing changes
    assert torch.equal(dynamic_threshold(x0, 1e-9), x0.clamp(-1, 1))  # the smallest magnitude, at least 1
    assert torch.allclose(dynamic_threshold(x0, 1.0), x0 / 5)
