"""Laws of the sampling loop and of each sampler, and the published figures."""

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from tests.models.diffusion.samplers.toy import GaussianModel, ToyModel
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error

FIGURES = np.load(GOLDEN / "numerics" / "samplers.npz")
IMG2IMG = np.load(GOLDEN / "numerics" / "img2img.npz")
LOOKS_AHEAD = ("plms", "heun")  # samplers with more network calls than steps
SHAPE = (4, 6, 6)
CASES = {
    "ddim_20": (DDIMSampler, 20, {"x_T": True}),
    "ddim_20_cfg": (DDIMSampler, 20, {"x_T": True, "scale": 7.5}),
    "ddim_20_eta1": (DDIMSampler, 20, {"eta": 1.0}),
    "ddim_20_eta05_temp08": (DDIMSampler, 20, {"eta": 0.5, "temperature": 0.8, "x_T": True, "scale": 7.5}),
    "ddim_20_mask": (DDIMSampler, 20, {"x_T": True, "mask": True, "x0": True, "scale": 7.5}),
    "plms_20": (PLMSSampler, 20, {"x_T": True}),
    "plms_20_cfg": (PLMSSampler, 20, {"x_T": True, "scale": 7.5}),
    "plms_50_seeded": (PLMSSampler, 50, {"scale": 7.5}),
    "dpm_10_cfg": (DPMSolverSampler, 10, {"x_T": True, "scale": 7.5}),
    "dpm_20_cfg": (DPMSolverSampler, 20, {"x_T": True, "scale": 7.5}),
    "dpm_50_cfg": (DPMSolverSampler, 50, {"scale": 7.5}),
}
TENSORS = {"x_T": randn(202, 2, *SHAPE), "x0": randn(203, 2, *SHAPE), "mask": (randn(204, 2, 1, 6, 6) > 0).float()}
COND, UNCOND = randn(200, 2, 4, 1, 1), randn(201, 2, 4, 1, 1)


def draw(sampler, steps, **kwargs):
    return sampler.sample(S=steps, batch_size=2, shape=SHAPE, conditioning=COND, verbose=False, **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_samplers_meet_the_published_figures(name):
    cls, steps, options = CASES[name]
    kwargs = {key: TENSORS[key] if value is True else value for key, value in options.items() if key != "scale"}
    if "scale" in options:
        kwargs |= {"unconditional_guidance_scale": options["scale"], "unconditional_conditioning": UNCOND}
    torch.manual_seed(1234)
    x, intermediates = draw(cls(ToyModel()), steps, **kwargs)
    assert rel_error(x, FIGURES[name]) < TOLERANCE
    if name + "_pred_x0" in FIGURES.files:
        assert rel_error(intermediates["pred_x0"][-1], FIGURES[name + "_pred_x0"]) < TOLERANCE


def test_image_to_image_meets_the_published_figures():
    sampler, t_enc = DDIMSampler(ToyModel()), int(IMG2IMG["t_enc"])
    sampler.make_schedule(int(IMG2IMG["steps"]), ddim_eta=0.0, verbose=False)
    noise = randn(int(IMG2IMG["noise_seed"]), 2, *SHAPE)
    z = sampler.stochastic_encode(TENSORS["x0"], torch.tensor([t_enc] * 2), noise=noise)
    y = sampler.decode(
        z, COND, t_enc, unconditional_guidance_scale=5.0, unconditional_conditioning=UNCOND, verbose=False
    )
    assert rel_error(z, IMG2IMG["encoded"]) < TOLERANCE
    assert rel_error(y, IMG2IMG["decoded"]) < TOLERANCE


def test_full_strength_encodes_to_pure_noise_and_zero_strength_decodes_to_the_latent():
    sampler = DDIMSampler(ToyModel())
    sampler.make_schedule(50, verbose=False)
    noise = randn(1, 2, *SHAPE)
    assert torch.equal(sampler.stochastic_encode(TENSORS["x0"], torch.tensor([50, 50]), noise=noise), noise)
    assert torch.equal(sampler.decode(TENSORS["x0"], COND, 0, verbose=False), TENSORS["x0"])
    with pytest.raises(ValueError, match="choose 0 to 50"):
        sampler.stochastic_encode(TENSORS["x0"], torch.tensor([51, 51]))


def seen_times(name, steps, T, **kwargs):
    model = ToyModel(timesteps=T)
    callbacks = []
    x, _ = draw(make_sampler(name, model), steps, callback=callbacks.append, **kwargs)
    assert torch.isfinite(x).all() and callbacks == list(range(steps))
    times = [float(t[0]) for _, t in model.calls]
    return times if name not in LOOKS_AHEAD else sorted(set(times), reverse=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_count_from_one_to_the_chains_length_calls_the_network_on_a_falling_time(name):
    for grid in (grid for grid in SAMPLERS[name].spacings if grid != "quad"):  # quad repeats small steps, as published
        for steps in range(1, 31) if grid in ("uniform", "trailing") else (1, 2, 30):
            times = seen_times(name, steps, 30, ddim_discretize=grid)
            assert len(times) == steps and (np.diff(times) < 0).all(), (grid, steps)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 37, 599])
def test_step_counts_of_a_long_chain(name, steps):
    times = seen_times(name, steps, 1000)
    assert len(times) == steps and (np.diff(times) < 0).all() and times[-1] >= 0 and times[0] <= 999


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_that_do_not_exist_are_refused_before_the_network_runs(name, steps):
    model = ToyModel()
    with pytest.raises(ValueError, match="choose 1 to 1000"):
        draw(make_sampler(name, model), steps)
    assert not model.calls


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_all_parameterizations_of_one_denoiser_give_one_sample(name, parameterization):
    samples = []
    for kind in ("eps", parameterization):
        torch.manual_seed(0)
        samples.append(
            make_sampler(name, GaussianModel(kind)).sample(25, 2, SHAPE, x_T=randn(5, 2, *SHAPE), verbose=False).samples
        )
    assert rel_error(samples[1], samples[0]) < 1e-3


def test_eta_zero_is_deterministic_and_eta_one_is_not():
    def run(seed, eta):
        torch.manual_seed(seed)
        return draw(DDIMSampler(ToyModel()), 10, x_T=TENSORS["x_T"], eta=eta).samples

    assert torch.equal(run(1, 0.0), run(2, 0.0))
    assert not torch.equal(run(1, 1.0), run(2, 1.0))


def test_the_ancestral_chain_has_the_reverse_variance_of_its_model_and_the_true_posteriors_without_one():
    model = ToyModel()
    betas, posterior = model.betas.double().numpy(), model.posterior_variance.double().numpy()
    for v_posterior in (None, 0.0, 0.25, 1.0):
        if v_posterior is not None:
            model.v_posterior = v_posterior
        share = v_posterior or 0.0
        sigmas = make_sampler("ancestral", model).checked_steps(1000).sigmas
        np.testing.assert_allclose(sigmas[1:] ** 2, ((1 - share) * posterior + share * betas)[1:], rtol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_scale_one_is_the_plain_call(name):
    plain, guided = ToyModel(), ToyModel()
    samples = []
    for model, kwargs in (
        (plain, {}),
        (guided, {"unconditional_guidance_scale": 1.0, "unconditional_conditioning": UNCOND}),
    ):
        torch.manual_seed(0)
        samples.append(draw(make_sampler(name, model), 5, x_T=TENSORS["x_T"], **kwargs).samples)
    assert torch.equal(*samples) and len(plain.calls) == len(guided.calls)
    assert all(len(x) == 2 for x, _ in guided.calls)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_mask_of_ones_follows_the_kept_latent_to_the_last_step(name):
    torch.manual_seed(0)
    model = ToyModel()
    draw(make_sampler(name, model), 30, x_T=TENSORS["x_T"], mask=torch.ones(2, 1, 6, 6), x0=TENSORS["x0"])
    last_input, _ = model.calls[-1]
    assert (
        float((last_input - TENSORS["x0"]).std()) < 0.35
    )  # x0 at the grid's smallest noise level, whatever the network says


def test_callbacks_see_every_step_in_order():
    seen, pictures = [], []
    draw(DDIMSampler(ToyModel()), 7, callback=seen.append, img_callback=lambda x, i: pictures.append((i, x.shape)))
    assert seen == list(range(7)) and pictures == [(i, (2, *SHAPE)) for i in range(7)]


def test_intermediates_hold_the_start_and_every_logged_step():
    x, intermediates = draw(DDIMSampler(ToyModel()), 20, log_every_t=5, x_T=TENSORS["x_T"])
    assert len(intermediates["x_inter"]) == len(intermediates["pred_x0"]) == 6  # start, first step, k = 15, 10, 5, 0
    assert torch.equal(intermediates["x_inter"][0], TENSORS["x_T"]) and torch.equal(intermediates["x_inter"][-1], x)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"conditioning": randn(1, 3, 4, 1, 1)}, "conditioning is for 3 samples, batch_size is 2"),
        ({"x_T": randn(1, 2, 4, 5, 5)}, "x_T has shape"),
        ({"mask": torch.ones(2, 1, 6, 6)}, "mask needs x0"),
        ({"normals_sequence": [1]}, "normals_sequence"),
        ({"ddim_discretize": "cubic"}, "choose one of uniform, quad, trailing"),
        ({"ddim_discretize": "karras"}, "choose one of uniform, quad, trailing"),
        ({"eta": -0.1}, "choose 0"),
        ({"eta": float("nan")}, "choose 0"),
        ({"unconditional_guidance_scale": 2.0}, "needs unconditional_conditioning"),
        ({"guidance_rescale": 1.5}, "guidance_rescale 1.5: choose 0"),
        ({"dynamic_threshold": 0.0}, "dynamic_threshold 0.0: choose"),
        ({"noise_dropout": 1.0}, "noise_dropout 1.0: choose"),
    ],
)
def test_requests_that_cannot_be_honoured_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DDIMSampler(ToyModel()).sample(
            **{"S": 5, "batch_size": 2, "shape": SHAPE, "conditioning": COND, "verbose": False, **kwargs}
        )


@pytest.mark.parametrize("name", [name for name, entry in SAMPLERS.items() if not entry.takes_eta])
def test_samplers_with_a_noise_of_their_own_refuse_eta(name):
    with pytest.raises(ValueError, match="eta 0.5: .* supports only"):
        draw(make_sampler(name, ToyModel()), 5, eta=0.5)


@pytest.mark.parametrize("name", ["plms", "dpm_solver", "unipc", "euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("option", [{"temperature": 0.8}, {"noise_dropout": 0.1}])
def test_samplers_without_noise_refuse_what_would_change_it(name, option):
    with pytest.raises(ValueError, match="adds no noise"):
        draw(make_sampler(name, ToyModel()), 5, **option)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="not_an_option"):
        draw(DDIMSampler(ToyModel()), 5, not_an_option=1)


def test_one_published_step_equals_the_loops_step():
    sampler, model = DDIMSampler(ToyModel()), ToyModel()
    sampler.make_schedule(20, verbose=False)
    index = 19
    t = torch.full((2,), int(sampler.ddim_timesteps[index]))
    x_prev, _ = sampler.p_sample_ddim(TENSORS["x_T"], COND, t, index)
    _, intermediates = draw(DDIMSampler(model), 20, x_T=TENSORS["x_T"])
    assert torch.equal(x_prev, intermediates["x_inter"][1])


def test_a_sampler_stores_no_run():
    sampler = PLMSSampler(ToyModel())
    first = draw(sampler, 6, x_T=TENSORS["x_T"]).samples
    assert torch.equal(draw(sampler, 6, x_T=TENSORS["x_T"]).samples, first) and set(vars(sampler)) == {
        "model",
        "_scheduled",
        "_eta",
    }


def test_a_published_step_takes_each_samples_own_time():
    sampler, model = DDIMSampler(ToyModel()), ToyModel()
    sampler.model = model
    sampler.make_schedule(20, verbose=False)
    sampler.p_sample_ddim(TENSORS["x_T"], COND, torch.tensor([951, 3]), 19)
    assert model.calls[-1][1].tolist() == [951, 3]


def test_callbacks_can_read_the_schedule():
    sampler, seen = DDIMSampler(ToyModel()), []
    draw(sampler, 4, callback=lambda i: seen.append(sampler.ddim_timesteps.tolist()))
    assert seen == [[1, 251, 501, 751]] * 4
