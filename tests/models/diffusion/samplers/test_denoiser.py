"""Options of a run, and the guided prediction."""

import numpy as np
import pytest
import torch

from ldm.models.diffusion.samplers.denoiser import SamplingOptions, SamplingRun, Steps
from ldm.models.diffusion.samplers.registry import SAMPLERS
from tests.models.diffusion.samplers.toy import COND, GUIDED, UNCOND, X_T, GaussianModel, ToyModel, sample
from tests.reference import rel_error


class Corrector:
    """Scales the noise, and keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def modify_score(self, model, eps, x, t, c, gain):
        self.calls.append((model, x, t, c))
        return eps * gain


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_score_corrector_changes_the_noise_whatever_the_parameterization(name):
    options = {"conditioning": None, "score_corrector": Corrector(), "corrector_kwargs": {"gain": 0.9}}
    samples = [sample(name, GaussianModel(kind), **options).samples for kind in ("eps", "v")]
    assert rel_error(*samples) < 1e-3
    assert rel_error(samples[0], sample(name, GaussianModel(), conditioning=None).samples) > 1e-3


def test_a_score_corrector_gets_the_model_the_latent_its_timesteps_and_the_condition():
    model, corrector = ToyModel(), Corrector()
    _, inter = sample("ddim", model, 3, score_corrector=corrector, corrector_kwargs={"gain": 0.9}, log_every_t=1)
    assert [t.tolist() for _, _, t, _ in corrector.calls] == [[667, 667], [334, 334], [1, 1]]
    assert all(m is model and c is COND for m, _, _, c in corrector.calls)
    eps = model.apply_model(X_T, torch.tensor([667, 667]), COND) * 0.9
    x0 = (X_T - model.sqrt_one_minus_alphas_cumprod[667] * eps) / model.sqrt_alphas_cumprod[667]
    assert torch.allclose(inter["pred_x0"][1], x0, atol=1e-5)


@pytest.mark.parametrize("name", ["cond", "uncond", "scale"])
def test_a_step_cannot_change_the_condition_that_the_network_has_joined(name):
    steps = Steps(*(np.array([value]) for value in (1, 0.9, 0.99, 0.0)))
    run = SamplingRun(ToyModel(), steps, X_T, COND, UNCOND, 5.0, SamplingOptions())
    assert (run.cond, run.uncond, run.scale) == (COND, UNCOND, 5.0)
    with pytest.raises(AttributeError, match=name):
        setattr(run, name, None)


@pytest.mark.parametrize("name", SAMPLERS)
def test_pure_noise_is_not_corrected(name):
    corrector = Corrector()
    model = GaussianModel("v", zero_terminal_snr=True)
    options = {"score_corrector": corrector, "corrector_kwargs": {"gain": 0.9}, "ddim_discretize": "trailing"}
    x, inter = sample(name, model, 5, conditioning=None, log_every_t=1, **options)
    plain = sample(name, model, 5, conditioning=None, log_every_t=1, ddim_discretize="trailing").intermediates
    assert torch.isfinite(x).all() and torch.equal(inter["pred_x0"][1], plain["pred_x0"][1])
    times = {int(t[0]) for _, _, t, _ in corrector.calls}
    assert len(times) == 4 and 999 not in times


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_rescales_guidance(name):
    rescaled, guided = (sample(name, ToyModel(), **GUIDED, guidance_rescale=g).samples for g in (0.7, 0.0))
    assert rel_error(rescaled, guided) > 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_guides_within_the_interval_of_noise_levels_and_calls_the_network_once_elsewhere(name):
    class Counted(ToyModel):
        def apply_model(self, x, t, c):
            level = float((1 / self.alphas_cumprod[int(t[0])] - 1).sqrt())
            calls.append((level, x.shape[0]))
            return super().apply_model(x, t, c)

    results = {}
    for interval in ((), (0.0, 1e9), (0.5, 3.0), (1e8, 1e9)):
        calls = []
        results[interval] = sample(name, Counted(), **GUIDED, guidance_interval=interval).samples
        low, high = interval or (0.0, 1e9)
        batch = results[interval].shape[0]
        assert all(rows == (2 * batch if low < level <= high else batch) for level, rows in calls)
    assert torch.equal(results[()], results[0.0, 1e9]) and rel_error(results[0.5, 3.0], results[()]) > 1e-4
    unguided = sample(name, ToyModel(), conditioning=GUIDED.get("conditioning", COND)).samples
    assert torch.equal(results[1e8, 1e9], unguided) and rel_error(results[0.5, 3.0], unguided) > 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_predictions_within_the_dynamic_threshold(name):
    class Wide(ToyModel):
        def apply_model(self, x, t, c):
            return 9.0 * x

    highest = []
    for threshold in (0.9, None):
        seen = []
        callback = lambda x0, i: seen.append(float(x0.abs().max()))  # noqa: B023, E731
        sample(name, Wide("x0"), dynamic_threshold=threshold, img_callback=callback)
        highest.append(max(seen))
    assert highest[0] <= 1.0001 and highest[1] > 2.0


def test_the_noise_follows_from_a_thresholded_prediction():
    model = ToyModel("x0")
    model.apply_model = lambda x, t, c: torch.full_like(x, 9.0)
    x, inter = sample("euler", model, 1, dynamic_threshold=0.9)
    assert torch.equal(x, torch.ones_like(x)) and torch.equal(inter["pred_x0"][-1], x)
    _, inter = sample("euler", model, 2, dynamic_threshold=0.9, log_every_t=1, ddim_discretize="trailing")
    alpha, prev = model.alphas_cumprod[999], model.alphas_cumprod[499]
    eps = (X_T - alpha.sqrt()) / (1 - alpha).sqrt()
    assert torch.allclose(inter["x_inter"][1], prev.sqrt() + (1 - prev).sqrt() * eps, atol=1e-5)


def test_clipping_and_quantization_act_on_the_prediction():
    model = ToyModel("x0")
    model.apply_model = lambda x, t, c: 3.0 * x
    model.first_stage_model = torch.nn.Module()
    model.first_stage_model.quantize = lambda x0: ((2 * x0).round() / 2, None)
    seen = []
    options = {"conditioning": None, "img_callback": lambda x0, i: seen.append(x0)}
    sample("ddim", model, 1, clip_denoised=True, **options)
    sample("ddim", model, 1, quantize_x0=True, **options)
    sample("plms", model, 1, clip_denoised=True, quantize_x0=True, **options)
    assert torch.equal(seen[0], (3 * X_T).clamp(-1, 1)) and torch.equal(seen[1], (6 * X_T).round() / 2)
    assert set(seen[2].unique().tolist()) == {-1.0, -0.5, 0.0, 0.5, 1.0}
    with pytest.raises(ValueError, match="quantize_x0 needs a model whose first stage has a codebook"):
        sample("ddim", ToyModel(), 1, quantize_x0=True)


def test_temperature_repetition_and_dropout_act_on_the_noise_of_the_steps():
    def noise(**options):  # of the first of two steps of a sampler whose network sees nothing
        model = ToyModel("x0")
        model.apply_model = lambda x, t, c: torch.zeros_like(x)
        _, inter = sample("euler_ancestral", model, 2, log_every_t=1, **options)
        still = sample("euler_ancestral", model, 2, log_every_t=1, temperature=0.0).intermediates
        return inter["x_inter"][1] - still["x_inter"][1]

    plain, half, same, dropped = noise(), noise(temperature=0.5), noise(repeat_noise=True), noise(noise_dropout=0.5)
    assert torch.allclose(half, plain / 2, atol=1e-6)
    assert torch.allclose(same[0], same[1], atol=1e-6) and torch.allclose(same[0], plain[0], atol=1e-6)
    zeros = dropped.abs() < 1e-6
    assert 0.3 < float(zeros.float().mean()) < 0.7 and torch.allclose(dropped[~zeros], 2 * plain[~zeros], atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"noise_dropout": 1.0}, r"noise_dropout 1.0: choose a probability in \[0, 1\)"),
        ({"noise_dropout": -0.1}, "noise_dropout -0.1"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale 1.5: choose 0 \(off\) to 1"),
        ({"guidance_rescale": -0.5}, "guidance_rescale -0.5"),
        ({"guidance_interval": (3.0, 1.0)}, r"guidance_interval \[3.0, 1.0\]: choose two noise levels LOW < HIGH"),
        ({"guidance_interval": (3.0,)}, r"guidance_interval \[3.0\]: choose two"),
        ({"dynamic_threshold": 0.0}, r"dynamic_threshold 0.0: choose None \(off\) or a quantile in \(0, 1\]"),
        ({"dynamic_threshold": 1.1}, "dynamic_threshold 1.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


def test_options_at_the_ends_of_their_ranges_are_accepted():
    SamplingOptions(noise_dropout=0.0, guidance_rescale=1.0, dynamic_threshold=1.0)
    SamplingOptions(noise_dropout=0.99, guidance_rescale=0.0, dynamic_threshold=0.01)
