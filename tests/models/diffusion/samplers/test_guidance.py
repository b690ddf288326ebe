"""Classifier-free guidance, its rescaling, and dynamic thresholding."""

import torch

from ldm.models.diffusion.samplers.guidance import dynamic_threshold, guided_output
from tests.models.diffusion.samplers.toy import COND, UNCOND, X_T, ToyModel
from tests.reference import rel_error

T = torch.tensor([500, 700])


def test_guidance_is_its_formula_in_one_call_of_a_double_batch():
    model = ToyModel()
    cond, uncond = (model.apply_model(X_T, T, c) for c in (COND, UNCOND))
    model.calls.clear()
    out = guided_output(model.apply_model, X_T, T, COND, UNCOND, 5.0)
    assert torch.allclose(out, uncond + 5.0 * (cond - uncond), atol=1e-5)
    assert len(model.calls) == 1 and model.calls[0][1].tolist() == [500, 700, 500, 700]


def test_scale_one_and_no_unconditional_conditioning_are_the_plain_call():
    model = ToyModel()
    for uncond, scale in ((UNCOND, 1.0), (None, 5.0)):
        out = guided_output(model.apply_model, X_T, T, COND, uncond, scale, 0.7)
        assert torch.equal(out, model.apply_model(X_T, T, COND))


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
