"""ControlNet: the published numbers, the start as a copy of the UNet, what trains, and several controls at once."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.models.diffusion.controlnet import Control, ControlLDM, ControlledModel, ControlNet
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.models.diffusion.tiny import ATTEND, AUTOENCODER, CAPTIONS, Samples, batch, fit, latent_diffusion, unet
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error, seed_weights

CASE = json.loads((GOLDEN / "controlnet" / "controlnet.json").read_text())
T = torch.tensor([21, 811])


def control_ldm(**changes):
    """A small ControlLDM as built, for hints of 32x32 pixels; its first stage's weights count as trained."""
    network = unet(**ATTEND)["params"]
    net = {name: value for name, value in network.items() if name != "out_channels"}
    params = {
        **{"timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012, "first_stage_key": "image"},
        **{"cond_stage_key": "caption", "image_size": 8, "channels": 4, "conditioning_key": "crossattn"},
        **{"scale_factor": 0.18215, "use_ema": False, "control_key": "hint", "monitor": "val/loss_simple_ema"},
        "control_stage_config": {
            "target": "cldm.cldm.ControlNet",
            "params": {**net, "hint_channels": 3, "hint_block_channels": [16, 32, 96]},
        },
        "unet_config": {"target": "cldm.cldm.ControlledUnetModel", "params": network},
        **{"first_stage_config": AUTOENCODER, "cond_stage_config": CAPTIONS, "untrained_first_stage": True},
    }
    return instantiate_from_config(OmegaConf.create({"target": "cldm.cldm.ControlLDM", "params": params | changes}))


def base_model():
    return latent_diffusion("crossattn", ATTEND, CAPTIONS)


class Hints(Samples):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "hint": torch.sigmoid(randn(100 + index, 32, 32, 3))}


def inputs():
    """x, context, unconditional context, hint for two samples."""
    return randn(1, 2, 4, 8, 8), randn(2, 2, 8, 16), randn(3, 2, 8, 16), torch.sigmoid(randn(4, 2, 3, 32, 32))


@pytest.fixture(autouse=True)
def hints(monkeypatch):
    monkeypatch.setattr("tests.models.diffusion.tiny.Samples", Hints)


@torch.no_grad()
def test_outputs_loss_and_samples_are_the_published_ones():
    m, n = seed_weights(instantiate_from_config(CASE["config"])), CASE["seed"]
    x, ctx, un, noise = randn(n, 2, 4, 8, 8), randn(n + 1, 2, 1, 16), randn(n + 2, 2, 1, 16), randn(n + 4, 2, 4, 8, 8)
    hint, t = torch.sigmoid(randn(n + 3, 2, 3, 64, 64)), torch.tensor(CASE["t"])
    cond, uncond = {"c_crossattn": [ctx], "c_concat": [hint]}, {"c_crossattn": [un], "c_concat": [hint]}
    guess = {"c_crossattn": [un], "c_concat": None}
    m.control_scales = [CASE["control_scale"]] * 13
    residuals = m.control_model(x=x, hint=hint, timesteps=t, context=ctx)
    found = {
        "apply": m.apply_model(x, t, cond),
        "apply_nohint": m.apply_model(x, t, guess),
        "control_norms": torch.stack([residual.norm() for residual in residuals]),
        "loss": m.p_losses(x, cond, t, noise=noise)[0],
    }
    options = {"verbose": False, "eta": 0.0, "x_T": noise, "unconditional_guidance_scale": CASE["guidance"]}
    for name, other in (("ddim", uncond), ("ddim_guess", guess)):
        sampler = DDIMSampler(m)
        found[name] = sampler.sample(CASE["S"], 2, (4, 8, 8), cond, unconditional_conditioning=other, **options)[0]
    with np.load(GOLDEN / "controlnet" / "controlnet.npz") as reference:
        errors = {name: rel_error(value, reference[name]) for name, value in found.items()}
        assert set(errors) == set(reference.files) and max(errors.values()) < TOLERANCE, errors


def test_the_published_names_are_these_classes():
    assert get_obj_from_str("cldm.cldm.ControlNet") is ControlNet
    assert get_obj_from_str("cldm.cldm.ControlLDM") is ControlLDM


def test_a_package_that_the_user_allowed_keeps_its_own_classes(tmp_path, monkeypatch):
    (tmp_path / "cldm").mkdir()
    (tmp_path / "cldm" / "cldm.py").write_text("class ControlLDM:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LDM_ALLOW_TARGETS", "cldm")
    assert get_obj_from_str("cldm.cldm.ControlLDM").__module__ == "cldm.cldm"


@torch.no_grad()
@pytest.mark.parametrize("averaged", [False, True])
def test_a_control_starts_as_a_copy_of_its_base_and_changes_no_prediction(tmp_path, averaged):
    base = base_model()
    state = dict(base.state_dict())
    if averaged:  # what the base is sampled with
        own = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
        state |= {f"model_ema.{name[6:].replace('.', '')}": 0.9 * tensor for name, tensor in own.items()}
    torch.save({"state_dict": state}, tmp_path / "base.ckpt")
    model = control_ldm(ckpt_path=str(tmp_path / "base.ckpt"), use_ema=averaged).eval()
    factor, network = 0.9 if averaged else 1.0, base.model.diffusion_model.state_dict()
    control = model.control_model.state_dict()
    copied = [name for name in control if name in network]
    assert len(copied) > 40 and all(torch.equal(control[name], factor * network[name]) for name in copied)
    zero = [name for name in control if name.startswith(("zero_convs.", "middle_block_out.", "input_hint_block.10."))]
    assert len(zero) == 12 and not any(control[name].any() for name in zero)
    own = {name.split(".")[0] for name in set(control) - set(copied)}
    assert own == {"input_hint_block", "zero_convs", "middle_block_out"}
    if averaged:
        assert torch.equal(
            model.model_ema.control_modelinput_blocks00weight, model.control_model.input_blocks[0][0].weight
        )
        return
    x, context, _, hint = inputs()
    cond = {"c_crossattn": [context], "c_concat": [hint]}
    assert torch.equal(model.apply_model(x, T, cond), model.apply_model(x, T, context))
    torch.testing.assert_close(model.apply_model(x, T, cond), base.apply_model(x, T, context))


@pytest.mark.parametrize("sd_locked", [True, False])
def test_only_the_control_trains_and_the_decoder_if_it_is_not_locked(sd_locked):
    model = seed_weights(control_ldm(sd_locked=sd_locked, use_ema=True, cond_dropout=0.5))
    assert model.sd_locked == sd_locked
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = fit(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    decoder = ("control_model.", "model.diffusion_model.output_blocks.", "model.diffusion_model.out.")
    assert changed and all(name.startswith(decoder[: 1 if sd_locked else 3]) for name in changed)
    trained = {name for name in before if name.startswith(decoder[: 1 if sd_locked else 3])}
    assert len(changed) > 0.9 * len(trained)  # keys of one-token attention have no gradient
    states = trainer.optimizers[0].state_dict()["param_groups"][0]["params"]
    assert len(states) == len(trained) == len(model.model_ema.m_name2s_name)
    assert torch.isfinite(trainer.callback_metrics["val/loss_simple_ema"])


def test_gradients_reach_every_weight_of_a_control_through_the_frozen_network():
    model = seed_weights(control_ldm())
    x, context, _, hint = inputs()
    model.apply_model(x, T, {"c_crossattn": [context], "c_concat": [hint]}).square().mean().backward()
    assert all(parameter.grad.any() for name, parameter in model.control_model.named_parameters() if "bias" not in name)
    assert all(parameter.grad is None for parameter in model.model.parameters())


@torch.no_grad()
def test_scales_multiply_the_residuals_and_the_middle_can_be_alone():
    model = seed_weights(control_ldm())
    x, context, _, hint = inputs()
    cond = {"c_crossattn": [context], "c_concat": [hint]}
    plain, full = model.apply_model(x, T, context), model.apply_model(x, T, cond)
    assert rel_error(full, plain) > 1e-2 and len(model.control_scales) == 5
    model.control_scales = [0.0] * 13
    assert torch.equal(model.apply_model(x, T, cond), plain)
    model.control_scales = [0.0] * 4 + [1.0]
    middle = model.apply_model(x, T, cond)
    model.control_scales, model.only_mid_control = [1.0] * 13, True
    assert torch.equal(model.apply_model(x, T, cond), middle) and rel_error(middle, full) > 1e-3
    model.only_mid_control, model.global_average_pooling = False, True
    averaged = model.apply_model(x, T, cond)
    assert rel_error(averaged, full) > 1e-3 and rel_error(averaged, plain) > 1e-3


@torch.no_grad()
def test_controls_of_a_plain_model_add_up():
    whole, base = seed_weights(control_ldm()), base_model()
    x, context, _, hint = inputs()
    cond = {"c_crossattn": [context], "c_concat": [hint]}
    one = ControlledModel(base, [Control(whole.control_model, whole.control_scales)])
    torch.testing.assert_close(one.apply_model(x, T, cond), whole.apply_model(x, T, cond))
    assert torch.equal(one.apply_model(x, T, context), base.apply_model(x, T, context))
    halves = ControlledModel(base, [Control(whole.control_model, [0.5] * 5)] * 2)
    twice = {"c_crossattn": [context], "c_concat": [hint, hint]}
    torch.testing.assert_close(halves.apply_model(x, T, twice), whole.apply_model(x, T, cond))
    half = ControlledModel(base.to(torch.bfloat16), [Control(whole.control_model.to(torch.bfloat16), [1.0] * 5)])
    out = half.apply_model(x, T, cond)
    assert out.dtype == torch.float32 and rel_error(out, whole.float().apply_model(x, T, cond)) < 0.05


@torch.no_grad()
def test_guess_mode_is_the_uncontrolled_model_in_the_unconditional_half():
    model = seed_weights(control_ldm())
    x, context, un, hint = inputs()
    cond, guess = {"c_crossattn": [context], "c_concat": [hint]}, {"c_crossattn": [un], "c_concat": None}
    options = {"unconditional_guidance_scale": 3.0, "verbose": False, "x_T": x}
    for other in (guess, {"c_crossattn": [un]}):
        found = DDIMSampler(model).sample(1, 2, (4, 8, 8), cond, unconditional_conditioning=other, **options).samples
        t = torch.full((2,), 1)
        eps = torch.lerp(model.apply_model(x, t, un), model.apply_model(x, t, cond), 3.0)
        alpha, alpha_prev = model.alphas_cumprod[1], model.alphas_cumprod[0]
        x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        torch.testing.assert_close(found, alpha_prev.sqrt() * x0 + (1 - alpha_prev).sqrt() * eps)


@torch.no_grad()
def test_image_logs_have_the_published_images():
    model, data = seed_weights(control_ldm()), batch()
    images = model.log_images(data, N=2, ddim_steps=2)
    assert set(images) == {"inputs", "reconstruction", "control", "conditioning", "samples_cfg_scale_9.00"}
    torch.testing.assert_close(images["control"], data["hint"].permute(0, 3, 1, 2) * 2 - 1)
    assert "samples" in model.log_images(data, N=2, ddim_steps=2, sample=True, unconditional_guidance_scale=1.0)
    _, cond = model.get_input(data, "image")
    assert set(cond) == {"c_crossattn", "c_concat"}
    assert torch.equal(cond["c_concat"][0], data["hint"].permute(0, 3, 1, 2))


def test_a_hint_of_another_size_and_settings_that_exclude_control_are_refused():
    model = control_ldm()
    x, context, _, hint = inputs()
    with pytest.raises(ValueError, match=r"hint of shape \(2, 3, 16, 16\): this ControlNet needs \(B, 3, 32, 32\)"):
        model.apply_model(x, T, {"c_crossattn": [context], "c_concat": [hint[..., ::2, ::2]]})
    with pytest.raises(ValueError, match="conditioning_key 'hybrid'"):
        control_ldm(conditioning_key="hybrid")
    with pytest.raises(ValueError, match="cond_stage_trainable"):
        control_ldm(cond_stage_trainable=True)
