"""What every sampler can be asked for: image to image, masks, guidance, thresholds, zero terminal SNR; and the registry."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.samplers.guidance import dynamic_threshold, guided_output
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from tests.models.diffusion.samplers.toy import GaussianModel, ToyModel
from tests.models.diffusion.tiny import unet
from tests.reference import randn, rel_error

SHAPE = (4, 6, 6)
X0, X_T, COND, UNCOND = randn(1, 2, *SHAPE), randn(2, 2, *SHAPE), randn(3, 2, 4, 1, 1), randn(4, 2, 4, 1, 1)
GUIDED = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": UNCOND}


def draw(name, model, steps=8, seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = {"conditioning": COND, "x_T": X_T, **kwargs}
    return make_sampler(name, model).sample(steps, 2, SHAPE, verbose=False, **kwargs).samples


# ---------------------------------------------------------------------------------------------------------- image to image


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_every_strength_works_and_its_ends_are_identity_and_pure_noise(name, steps):
    sampler, noise = make_sampler(name, ToyModel()), randn(5, 2, *SHAPE)
    sampler.make_schedule(steps, verbose=False)
    for strength in np.arange(0, 1.01, 0.05):
        t = int(strength * steps)
        z = sampler.stochastic_encode(X0, torch.tensor([t, t]), noise=noise)
        x = sampler.decode(z, COND, t, verbose=False)
        assert torch.isfinite(x).all()
        if t == 0:
            assert torch.equal(x, X0)
        if t == steps:
            assert torch.equal(z, noise)
    with pytest.raises(ValueError, match=f"choose 0 to {steps}"):
        sampler.stochastic_encode(X0, torch.tensor([steps + 1] * 2))
    with pytest.raises(ValueError, match=f"choose 0 to {steps}"):
        sampler.decode(X0, COND, steps + 1, verbose=False)


@pytest.mark.parametrize("name", SAMPLERS)
def test_full_strength_is_the_sample_from_that_noise(name):
    sampler = make_sampler(name, ToyModel())
    sampler.make_schedule(12, verbose=False)
    torch.manual_seed(7)
    decoded = sampler.decode(X_T, COND, 12, **GUIDED, verbose=False)
    assert torch.equal(decoded, draw(name, ToyModel(), 12, seed=7, **GUIDED))


@pytest.mark.parametrize("name", set(SAMPLERS) - {"ddim"})
def test_encoding_reaches_the_level_that_decoding_starts_from(name):
    sampler = make_sampler(name, ToyModel())
    sampler.make_schedule(12, verbose=False)
    z = sampler.stochastic_encode(torch.ones(2, *SHAPE), torch.tensor([5, 9]), noise=torch.zeros(2, *SHAPE))
    assert torch.allclose(z[:, 0, 0, 0], sampler.ddim_alphas[[4, 8]].sqrt())


@pytest.mark.parametrize("name", SAMPLERS)
def test_decoding_without_a_schedule_or_over_original_steps_is_refused_where_it_cannot_be(name):
    sampler = make_sampler(name, ToyModel())
    with pytest.raises(ValueError, match="call make_schedule"):
        sampler.decode(X0, COND, 1, verbose=False)
    if name != "ddim":
        with pytest.raises(ValueError, match="use_original_steps"):
            sampler.decode(X0, COND, 1, use_original_steps=True, verbose=False)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_mask_changes_the_open_part_alone(name):
    mask = torch.zeros(2, 1, 6, 6)
    mask[..., :3] = 1.0
    model = GaussianModel()
    options = {"conditioning": None, "mask": mask, "x0": X0.clamp(0.3, 1.1)}
    x = draw(name, model, 40, **options)
    sampler = make_sampler(name, model)
    sampler.make_schedule(40, verbose=False)
    torch.manual_seed(0)
    decoded = sampler.decode(X_T, None, 40, mask=mask, x0=options["x0"], verbose=False)
    assert torch.equal(x, decoded)
    kept, drawn = (float((x - options["x0"])[..., part].abs().mean()) for part in (slice(0, 3), slice(3, 6)))
    assert kept < 0.1 < 0.2 < drawn


# ---------------------------------------------------------------------------------------------------------------- guidance


class DictModel(ToyModel):
    """The toy model with its condition in the normal form."""

    def apply_model(self, x, t, c):
        return super().apply_model(x, t, c["c_crossattn"][0] + c["c_concat"][0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_of_dict_conditions_is_that_of_tensors(name):
    zero = torch.zeros_like(COND)
    cond, uncond = ({"c_crossattn": [c], "c_concat": [zero]} for c in (COND, UNCOND))
    guided = {"conditioning": cond, "unconditional_conditioning": uncond, "unconditional_guidance_scale": 5.0}
    assert torch.equal(draw(name, DictModel(), **guided), draw(name, ToyModel(), **GUIDED))


def test_full_rescale_gives_the_guided_output_the_deviation_of_the_conditional_one():
    model, t = ToyModel(), torch.tensor([500, 500])
    plain = guided_output(model.apply_model, X_T, t, COND, UNCOND, 1.0)
    guided, half, full = (
        guided_output(model.apply_model, X_T, t, COND, UNCOND, 40.0, rescale) for rescale in (0.0, 0.5, 1.0)
    )
    deviations = [out.flatten(1).std(dim=1) for out in (plain, guided, half, full)]
    assert torch.allclose(deviations[3], deviations[0], rtol=1e-4) and not torch.allclose(
        deviations[1], deviations[0], rtol=1e-2
    )
    assert torch.allclose(half, (guided + full) / 2, atol=1e-5)
    assert rel_error(full / deviations[3][:, None, None, None], guided / deviations[1][:, None, None, None]) < 1e-5


def test_rescaling_the_zeros_of_an_untrained_network_leaves_them_zero():
    model = ToyModel()
    model.apply_model = lambda x, t, c: torch.zeros_like(x)
    assert torch.equal(
        guided_output(model.apply_model, X_T, torch.tensor([500, 500]), COND, UNCOND, 5.0, 0.7), torch.zeros_like(X_T)
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_rescales_guidance(name):
    assert rel_error(draw(name, ToyModel(), **GUIDED, guidance_rescale=0.7), draw(name, ToyModel(), **GUIDED)) > 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_score_corrector_acts_on_the_noise_whatever_the_parameterization(name):
    class Corrector:
        def modify_score(self, model, eps, x, t, c, gain):
            return eps * gain

    options = {"conditioning": None, "score_corrector": Corrector(), "corrector_kwargs": {"gain": 0.9}}
    samples = [draw(name, GaussianModel(kind), **options) for kind in ("eps", "v")]
    assert rel_error(*samples) < 1e-3
    assert rel_error(samples[0], draw(name, GaussianModel(), conditioning=None)) > 1e-3


# --------------------------------------------------------------------------------------------------------------- threshold


def test_dynamic_threshold_meets_its_formula():
    x0 = torch.arange(-50, 50).float().reshape(1, 4, 5, 5) / 10
    out = dynamic_threshold(torch.cat([x0, x0 / 100]), 0.9)
    s = 4.5  # 90 of the 100 magnitudes 0, .1, .1, ... 4.9, 4.9, 5.0 are at most this
    assert torch.allclose(out[0], x0[0].clamp(-s, s) / s)
    assert torch.equal(out[1], x0[0] / 100)  # within [-1, 1] nothing changes


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_predictions_within_the_dynamic_threshold(name):
    class Wide(ToyModel):
        def apply_model(self, x, t, c):
            return 9.0 * x

    seen = []
    draw(name, Wide("x0"), dynamic_threshold=0.9, img_callback=lambda x0, i: seen.append(float(x0.abs().max())))
    assert max(seen) <= 1.0001
    free = []
    draw(name, Wide("x0"), img_callback=lambda x0, i: free.append(float(x0.abs().max())))
    assert max(free) > 2.0


# ------------------------------------------------------------------------------------------------------- zero terminal SNR


@pytest.mark.parametrize("name", set(SAMPLERS) - {"lcm"})
@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_zero_terminal_snr_with_trailing_steps_draws_the_data_from_pure_noise(name, parameterization):
    model = GaussianModel(parameterization, zero_terminal_snr=True)
    assert float(model.alphas_cumprod[-1]) == 0.0
    torch.manual_seed(0)
    x = make_sampler(name, model).sample(100, 4, (4, 16, 16), ddim_discretize="trailing", verbose=False).samples
    # Steps uniform in time are coarse at the end, where the noisy chains lose some deviation.
    assert abs(float(x.mean()) - 0.7) < 0.02 and abs(float(x.std()) - 0.3) < 0.04


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 17])
def test_zero_terminal_snr_works_with_every_step_count(name, steps):
    model = GaussianModel("v", zero_terminal_snr=True)
    times = []
    apply_model, model.apply_model = (
        model.apply_model,
        lambda x, t, c: times.append(float(t[0])) or apply_model(x, t, c),
    )
    x = draw(name, model, steps, conditioning=None, ddim_discretize="trailing")
    assert torch.isfinite(x).all() and times[0] == 999
    assert len(set(times)) == steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_is_refused_with_eps_and_on_grids_that_need_its_logarithm(name):
    with pytest.raises(ValueError, match="use v or x0"):
        draw(name, GaussianModel(zero_terminal_snr=True), 1000, ddim_discretize="trailing")
    if "karras" in SAMPLERS[name].spacings:
        for grid in ("uniform", "karras", "logsnr"):
            with pytest.raises(ValueError, match="choose 'trailing'"):
                draw(name, GaussianModel("v", zero_terminal_snr=True), ddim_discretize=grid)


def small_ddpm(**changes):
    config = {
        "timesteps": 20,
        "image_size": 8,
        "channels": 4,
        "use_ema": False,
        "linear_start": 1e-3,
        "linear_end": 0.2,
    }
    return DDPM(unet(model_channels=32, attention_resolutions=[]), **{**config, **changes})


def test_a_model_with_zero_terminal_snr_trains_samples_and_keeps_its_schedule_when_weights_are_loaded():
    torch.manual_seed(0)
    model = small_ddpm(zero_terminal_snr=True, parameterization="v")
    assert float(model.alphas_cumprod[-1]) == 0.0 and float(model.betas[0]) == pytest.approx(1e-3)
    loss, _ = model.p_losses(randn(1, 2, 4, 8, 8), torch.tensor([19, 19]))
    assert torch.isfinite(loss)
    assert torch.isfinite(model.sample(batch_size=2)).all()
    tables = model.alphas_cumprod.clone()
    model.load_state_dict(small_ddpm(parameterization="v").state_dict())
    assert torch.equal(model.alphas_cumprod, tables)


def test_zero_terminal_snr_with_eps_is_refused_when_the_model_is_built():
    with pytest.raises(ValueError, match="set parameterization v or x0"):
        small_ddpm(zero_terminal_snr=True)


# ---------------------------------------------------------------------------------------------------------------- registry


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_registry_says_what_the_class_says(name):
    sampler, entry = make_sampler(name, ToyModel()), dataclasses.asdict(SAMPLERS[name])
    target = entry.pop("target")
    assert target == f"{type(sampler).__module__}.{type(sampler).__name__}"
    assert entry == {key: getattr(sampler, key) for key in entry}


def test_the_registry_is_read_without_torch():
    code = "import sys, ldm.models.diffusion.samplers.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_sampler_lists_the_choices():
    with pytest.raises(ValueError, match="unknown sampler 'dimm': choose one of ddim, plms"):
        make_sampler("dimm", ToyModel())


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("dpm_solver", {"order": 4}, "order 4: choose one of 1, 2, 3"),
        ("dpm_solver", {"method": "adaptive"}, "choose one of multistep, singlestep"),
        ("unipc", {"order": 0}, "order 0: choose 1 to 3"),
        ("unipc", {"variant": "bh3"}, "choose one of bh1, bh2"),
        ("dpmpp_2m_sde", {"solver": "euler"}, "choose one of midpoint, heun"),
        ("lcm", {"original_steps": 1001}, "choose 1 to 1000"),
    ],
)
def test_constructor_options_outside_their_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(name, ToyModel(), **options)
