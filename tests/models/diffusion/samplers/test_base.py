"""Laws of the sampling loop for every sampler: image to image, masks, callbacks, zero terminal SNR, refusals."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.models.diffusion.samplers.ddim import DDIMSampler
from ldm.models.diffusion.samplers.denoiser import SamplingOptions, SamplingRun
from ldm.models.diffusion.samplers.plms import PLMSSampler
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from tests.models.diffusion.samplers.toy import COND, GUIDED, SHAPE, UNCOND, X0, X_T, GaussianModel, ToyModel, sample
from tests.reference import randn, rel_error

MASK = (randn(204, 2, 1, 6, 6) > 0).float()
DETERMINISTIC = [name for name, entry in SAMPLERS.items() if entry.takes_eta or entry.default_eta == 0.0]
BLENDS_PREDICTIONS = [name for name in SAMPLERS if make_sampler(name, ToyModel()).mask_blend == "prediction"]


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_constant_prediction_is_followed_exactly(name, zero_terminal_snr):
    model, clean = ToyModel("x0", zero_terminal_snr=zero_terminal_snr), torch.full((2, *SHAPE), 0.5)
    model.apply_model = lambda x, t, c: clean
    steps = make_sampler(name, model).checked_steps(9, 0.0, "trailing")
    _, inter = sample(name, model, 9, eta=0.0, log_every_t=1, ddim_discretize="trailing")
    eps = (X_T - steps.alphas[-1] ** 0.5 * clean) / (1 - steps.alphas[-1]) ** 0.5
    for x, alpha in zip(inter["x_inter"][1:], steps.alphas_prev[::-1]):
        assert torch.allclose(x, alpha**0.5 * clean + (1 - alpha) ** 0.5 * eps, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_all_parameterizations_of_one_denoiser_give_one_sample(name, parameterization):
    x, expected = (
        sample(name, GaussianModel(kind), 25, conditioning=None).samples for kind in (parameterization, "eps")
    )
    assert rel_error(x, expected) < 1e-3


# --------------------------------------------------------------------------------------------------- the loop's results


def test_callbacks_see_every_step_in_order():
    seen, images = [], []
    kwargs = {"callback": seen.append, "img_callback": lambda x0, i: images.append((i, x0))}
    _, inter = sample("ddim", ToyModel(), 7, log_every_t=1, **kwargs)
    assert seen == [i for i, _ in images] == list(range(7))
    assert all(torch.equal(x0, logged) for (_, x0), logged in zip(images, inter["pred_x0"][1:], strict=True))


def test_intermediates_hold_the_start_and_every_logged_step():
    x, inter = sample("ddim", ToyModel(), 20, log_every_t=5)
    _, every = sample("ddim", ToyModel(), 20, log_every_t=1)
    logged = [0, 1, 5, 10, 15, 20]  # the start, the first step, and those that end at k = 15, 10, 5, 0
    for key in ("x_inter", "pred_x0"):
        assert all(torch.equal(a, every[key][i]) for a, i in zip(inter[key], logged, strict=True))
    assert torch.equal(inter["x_inter"][0], X_T) and torch.equal(inter["x_inter"][-1], x)


def test_a_sampler_stores_no_run():
    sampler = PLMSSampler(ToyModel())
    first, second = (sampler.sample(6, 2, SHAPE, COND, x_T=X_T, verbose=False).samples for _ in range(2))
    assert torch.equal(first, second) and set(vars(sampler)) == {"model", "_scheduled", "_eta"}


class NoHostReads(TorchDispatchMode):
    """Fails where Python reads a tensor's value, for which a GPU would have to finish its work."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_reads_values_on_the_host(name):
    options = SamplingOptions(guidance_rescale=0.7, dynamic_threshold=0.9)
    for parameterization, zero_terminal_snr in (("eps", False), ("v", True)):
        sampler = make_sampler(name, ToyModel(parameterization, zero_terminal_snr=zero_terminal_snr))
        steps = sampler.checked_steps(5, spacing="trailing")
        run = SamplingRun(sampler.model, steps, X_T, COND, UNCOND, 5.0, options)
        with NoHostReads():
            sampler.loop(X_T, run, 5, MASK, X0, verbose=False)
    with pytest.raises(AssertionError), NoHostReads():
        float(X_T.sum())


def test_callbacks_can_read_the_schedule():
    sampler, seen = DDIMSampler(ToyModel()), []
    callback = lambda i: seen.append(sampler.ddim_timesteps.tolist())  # noqa: E731
    sampler.sample(4, 2, SHAPE, COND, callback=callback, verbose=False)
    assert seen == [[1, 251, 501, 751]] * 4


def test_the_tables_of_a_schedule_are_the_steps():
    sampler = DDIMSampler(ToyModel())
    sampler.make_schedule(5, "quad", 0.5, verbose=False)
    steps = sampler.checked_steps(5, 0.5, "quad")
    assert np.array_equal(sampler.ddim_timesteps, steps.t) and np.array_equal(
        sampler.ddim_alphas_prev, steps.alphas_prev
    )
    for table, expected in ((sampler.ddim_alphas, steps.alphas), (sampler.ddim_sigmas, steps.sigmas)):
        assert table.dtype == torch.float32 and np.allclose(table, expected) and (table > 0).all()


# ------------------------------------------------------------------------------------------------------- image to image


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_every_strength_works_and_its_ends_are_identity_and_pure_noise(name, steps):
    sampler, noise = make_sampler(name, ToyModel()), randn(5, 2, *SHAPE)
    sampler.make_schedule(steps, verbose=False)
    for t in range(steps + 1):
        z = sampler.stochastic_encode(X0, torch.tensor([t, t]), noise=noise)
        x = sampler.decode(z, COND, t, verbose=False)
        assert torch.isfinite(x).all()
        assert torch.equal(x, X0) == (t == 0) and torch.equal(z, noise) == (t == steps)
    for t in (-1, steps + 1):
        with pytest.raises(ValueError, match=f"choose 0 to {steps}"):
            sampler.stochastic_encode(X0, torch.tensor([0, t]))
        with pytest.raises(ValueError, match=f"choose 0 to {steps}"):
            sampler.decode(X0, COND, t, verbose=False)


@pytest.mark.parametrize("name", SAMPLERS)
def test_full_strength_is_the_sample_from_that_noise(name):
    sampler = make_sampler(name, ToyModel())
    sampler.make_schedule(12, verbose=False)
    torch.manual_seed(7)
    decoded = sampler.decode(X_T, COND, 12, **GUIDED, guidance_rescale=0.7, verbose=False)
    assert torch.equal(decoded, sample(name, ToyModel(), 12, 7, **GUIDED, guidance_rescale=0.7).samples)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"ddim"}))
def test_encoding_reaches_the_level_that_decoding_starts_from(name):
    sampler = make_sampler(name, ToyModel())
    sampler.make_schedule(12, verbose=False)
    z = sampler.stochastic_encode(torch.ones(2, *SHAPE), torch.tensor([5, 9]), noise=torch.zeros(2, *SHAPE))
    assert torch.allclose(z[:, 0, 0, 0], sampler.ddim_alphas[[4, 8]].sqrt())
    z = sampler.stochastic_encode(torch.zeros(2, *SHAPE), torch.tensor([5, 9]), noise=torch.ones(2, *SHAPE))
    assert torch.allclose(z[:, 0, 0, 0], (1 - sampler.ddim_alphas[[4, 8]]).sqrt())


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpm_solver", "dpm_solver_3s", "unipc"])
def test_image_to_image_of_exact_samples_keeps_mean_and_deviation(name):
    torch.manual_seed(0)
    sampler = make_sampler(name, GaussianModel())
    sampler.make_schedule(60, "logsnr", verbose=False)
    x0 = 0.7 + 0.3 * torch.randn(16, 4, 16, 16)
    x = sampler.decode(sampler.stochastic_encode(x0, torch.full((16,), 40)), None, 40, verbose=False)
    assert abs(float(x.mean()) - 0.7) < 0.01 and abs(float(x.std()) - 0.3) < 0.01
    assert float((x - x0).std()) > 0.1  # another image of the same distribution


@pytest.mark.parametrize("name", SAMPLERS)
def test_decoding_without_a_schedule_or_over_original_steps_is_refused_if_not_supported(name):
    sampler = make_sampler(name, ToyModel())
    with pytest.raises(ValueError, match="call make_schedule"):
        sampler.decode(X0, COND, 1, verbose=False)
    if name != "ddim":
        with pytest.raises(ValueError, match="use_original_steps"):
            sampler.decode(X0, COND, 1, use_original_steps=True, verbose=False)


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name, when", [("ddim", "before"), ("plms", "before"), ("ancestral", "after")])
def test_published_samplers_blend_the_latent_with_x0_at_the_steps_noise_level(name, when):
    sampler, model = make_sampler(name, ToyModel()), ToyModel()
    steps = sampler.checked_steps(6)
    run = SamplingRun(model, steps, X_T, COND, None, 1.0, SamplingOptions())
    torch.manual_seed(0)
    x = X_T
    for k in range(5, -1, -1):
        for part in ("before", "step", "after"):
            if part == "step":
                x, _ = sampler.step(x, k, run)
            elif part == when:  # one new noise for every step, at the level that the step starts from
                noised = steps.alphas[k] ** 0.5 * X0 + (1 - steps.alphas[k]) ** 0.5 * torch.randn_like(X0)
                x = (noised * MASK + x * (1 - MASK)).float()
    assert rel_error(sample(name, ToyModel(), 6, mask=MASK, x0=X0).samples, x) < 1e-5


@pytest.mark.parametrize("name", BLENDS_PREDICTIONS)
def test_the_other_samplers_predict_x0_under_the_mask_and_are_free_elsewhere(name):
    eta = 0.0 if SAMPLERS[name].takes_eta else None  # the toy network acts on each value alone
    kwargs = {"ddim_discretize": "trailing", "log_every_t": 1, "eta": eta}
    masked, free = (sample(name, ToyModel(), 6, **kwargs, **more)[1] for more in ({"mask": MASK, "x0": X0}, {}))
    alphas = make_sampler(name, ToyModel()).checked_steps(6, eta, "trailing").alphas_prev[::-1]
    alpha_T = float(ToyModel().alphas_cumprod[-1])
    eps = (X_T - alpha_T**0.5 * X0) / (1 - alpha_T) ** 0.5
    for k, alpha in enumerate(alphas):
        x, x0, free_x = masked["x_inter"][k + 1], masked["pred_x0"][k + 1], free["x_inter"][k + 1]
        if name != "lcm":
            assert torch.allclose(x0 * MASK, X0 * MASK, atol=1e-4)
            assert torch.allclose(x * MASK, (alpha**0.5 * X0 + (1 - alpha) ** 0.5 * eps).float() * MASK, atol=1e-4)
        assert torch.allclose(x * (1 - MASK), free_x * (1 - MASK), atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_mask_keeps_x0_and_leaves_the_rest_to_the_model(name):
    mask = torch.zeros(2, 1, 6, 6)
    mask[..., :3] = 1.0
    options = {"mask": mask, "x0": X0.clamp(0.3, 1.1)}
    x = sample(name, GaussianModel(), 40, conditioning=None, **options).samples
    sampler = make_sampler(name, GaussianModel())
    sampler.make_schedule(40, verbose=False)
    torch.manual_seed(0)
    assert torch.equal(x, sampler.decode(X_T, None, 40, **options, verbose=False))
    kept, other = (float((x - options["x0"])[..., part].abs().mean()) for part in (slice(0, 3), slice(3, 6)))
    assert kept < 0.1 < 0.2 < other


# ------------------------------------------------------------------------------------------------------------- guidance


class DictModel(ToyModel):
    """The toy model with its condition in the normal form."""

    def apply_model(self, x, t, c):
        return super().apply_model(x, t, c["c_crossattn"][0] + c["c_concat"][0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_of_dict_conditions_is_that_of_tensors(name):
    zero = torch.zeros_like(COND)
    cond, uncond = ({"c_crossattn": [c], "c_concat": [zero]} for c in (COND, UNCOND))
    guided = {**GUIDED, "conditioning": cond, "unconditional_conditioning": uncond}
    assert torch.equal(sample(name, DictModel(), **guided).samples, sample(name, ToyModel(), **GUIDED).samples)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_by_an_image_and_a_text_takes_one_call_of_three(name):
    cond, uncond = {"c_concat": [COND], "c_crossattn": [COND]}, {"c_concat": [0 * COND], "c_crossattn": [UNCOND]}
    scales = {"unconditional_guidance_scale": 4.0, "image_guidance_scale": 1.5, "unconditional_conditioning": uncond}
    model = DictModel()  # linear in both parts
    edited = sample(name, model, conditioning=cond, **scales).samples
    expected = sample(name, ToyModel(), conditioning=UNCOND + 1.5 * COND + 4.0 * (COND - UNCOND)).samples
    assert rel_error(edited, expected) < 1e-4 and {len(x) for x, _ in model.calls} == {6}
    with pytest.raises(ValueError, match=r"image_guidance_scale 1\.5 needs unconditional_conditioning"):
        sample(name, model, conditioning=cond, image_guidance_scale=1.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_scale_one_is_the_plain_call(name):
    plain, guided = ToyModel(), ToyModel()
    x, expected = (
        sample(name, model, 5, **more).samples
        for model, more in ((guided, {**GUIDED, "unconditional_guidance_scale": 1.0}), (plain, {}))
    )
    assert torch.equal(x, expected) and [len(x) for x, _ in guided.calls] == [2] * len(plain.calls)


# ---------------------------------------------------------------------------------------------------- zero terminal SNR


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lcm"}))
@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_zero_terminal_snr_with_trailing_steps_gives_the_data_from_pure_noise(name, parameterization):
    model = GaussianModel(parameterization, zero_terminal_snr=True)
    assert float(model.alphas_cumprod[-1]) == 0.0
    torch.manual_seed(0)
    x = make_sampler(name, model).sample(100, 4, (4, 16, 16), ddim_discretize="trailing", verbose=False).samples
    # Steps uniform in time are coarse at the end, where noisy samplers lose some deviation.
    assert abs(float(x.mean()) - 0.7) < 0.02 and abs(float(x.std()) - 0.3) < 0.04


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_works_with_every_step_count(name):
    for steps in (1, 2, 3, 4, 17):
        model, times = GaussianModel("v", zero_terminal_snr=True), []
        call = model.apply_model
        model.apply_model = lambda x, t, c: times.append(float(t[0])) or call(x, t, c)  # noqa: B023
        x = sample(name, model, steps, conditioning=None, ddim_discretize="trailing").samples
        assert torch.isfinite(x).all() and times[0] == 999 and len(set(times)) == steps


@pytest.mark.parametrize("name, options", [*((name, {}) for name in DETERMINISTIC), ("unipc", {"order": 3})])
def test_after_a_step_from_pure_noise_a_run_is_as_if_it_started_there(name, options):
    sampler = make_sampler(name, GaussianModel("v", zero_terminal_snr=True), **options)
    sampler.make_schedule(6, "trailing", 0.0, verbose=False)
    assert all(np.isfinite(table).all() for table in sampler.checked_steps(6, 0.0, "trailing").coefs.values())
    kwargs = {"conditioning": None, "ddim_discretize": "trailing", "eta": 0.0, "log_every_t": 1}
    x, inter = sample(name, sampler.model, 6, options=options, **kwargs)
    assert rel_error(sampler.decode(inter["x_inter"][1], None, 5, verbose=False), x) < 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_is_refused_with_eps_and_with_spacings_that_need_its_logarithm(name):
    with pytest.raises(ValueError, match="starts from pure noise, where eps gives no x_0; use v or x0"):
        sample(name, GaussianModel(zero_terminal_snr=True), 1000, ddim_discretize="trailing")
    if SAMPLERS[name].continuous_time:
        for spacing in ("uniform", "karras", "logsnr"):
            with pytest.raises(ValueError, match="choose 'trailing'"):
                sample(name, GaussianModel("v", zero_terminal_snr=True), ddim_discretize=spacing)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"conditioning": randn(1, 3, 4, 1, 1)}, "conditioning is for 3 samples, batch_size is 2"),
        ({**GUIDED, "unconditional_conditioning": COND[:1]}, "unconditional_conditioning is for 1 samples"),
        ({"x_T": randn(1, 2, 4, 5, 5)}, r"x_T has shape \(2, 4, 5, 5\), expected \(2, 4, 6, 6\)"),
        ({"mask": MASK}, "mask needs x0"),
        ({"mask": MASK[..., :3], "x0": X0}, "differ in height or width"),
        ({"mask": MASK[..., :3, :], "x0": X0}, "differ in height or width"),
        ({"normals_sequence": [1]}, "normals_sequence is not supported"),
        (
            {"ddim_discretize": "cubic"},
            "'cubic' is not supported by DDIMSampler: choose one of uniform, quad, trailing",
        ),
        ({"ddim_discretize": "karras"}, "choose one of uniform, quad, trailing"),
        ({"eta": -0.1}, "eta -0.1: choose 0"),
        ({"eta": float("nan")}, "eta nan: choose 0"),
        ({"unconditional_guidance_scale": 2.0}, "unconditional_guidance_scale 2 needs unconditional_conditioning"),
        ({"guidance_rescale": 1.5}, "guidance_rescale 1.5: choose 0"),
    ],
)
def test_requests_that_are_not_supported_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample("ddim", ToyModel(), 5, **kwargs)


def test_a_shape_of_a_batch_and_another_schedule_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 4, 6, 6\): expected \(channels, height, width\)"):
        DDIMSampler(ToyModel()).sample(5, 2, (2, *SHAPE))
    with pytest.raises(ValueError, match="schedule 'cosine': only 'linear'"):
        DDIMSampler(ToyModel(), schedule="cosine")


@pytest.mark.parametrize("name", [name for name, entry in SAMPLERS.items() if not entry.takes_eta])
def test_samplers_with_a_fixed_eta_refuse_another(name):
    with pytest.raises(ValueError, match=r"eta 0\.5: \w+ supports only [01]; DDIM supports any eta"):
        sample(name, ToyModel(), 5, eta=0.5)


@pytest.mark.parametrize("name", [name for name, entry in SAMPLERS.items() if not entry.adds_noise])
@pytest.mark.parametrize("option", [{"temperature": 0.8}, {"noise_dropout": 0.1}, {"repeat_noise": True}])
def test_samplers_without_noise_refuse_what_would_change_it(name, option):
    with pytest.raises(ValueError, match="adds no noise"):
        sample(name, ToyModel(), 5, **option)


def test_an_unknown_option_is_logged_once_and_unused(caplog):
    plain, extra, again = (sample("ddim", ToyModel(), 5, **given) for given in ({}, {"a_hook": 1}, {"a_hook": 2}))
    assert torch.equal(plain[0], extra[0]) and torch.equal(plain[0], again[0])
    sampler = DDIMSampler(ToyModel(), device="cpu", features_adapter=None)
    sampler.make_schedule(5, verbose=False)
    sampler.decode(X_T, COND, 2, verbose=False, guidance_rescal=0.5)
    lines = [record.message for record in caplog.records]
    assert [line for line in lines if "a_hook" in line] == ["DDIMSampler: a_hook has no effect"]
    assert "DDIMSampler: guidance_rescal has no effect; did you mean 'guidance_rescale'?" in lines
    assert "DDIMSampler: features_adapter has no effect" in lines and not any("device" in line for line in lines)
