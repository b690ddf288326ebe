"""Samplers on Gaussian data, whose exact denoiser and probability flow are known in closed form."""

import numpy as np
import pytest
import torch

from ldm.models.diffusion.samplers.denoiser import SamplingOptions, SamplingRun
from ldm.models.diffusion.samplers.dpm_solver import multistep_tables
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from ldm.models.diffusion.samplers.spacing import levels_to_first_timestep, model_alphas_cumprod
from tests.models.diffusion.samplers.toy import GaussianConsistencyModel, GaussianModel, ToyModel
from tests.reference import randn, rel_error

SHAPE = (4, 6, 6)


def on_the_flow(model, alphas, u):
    """Where the exact probability flow of the data passes at a product of (1 - beta), for standard normal u."""
    return (alphas**0.5 * model.mean + (alphas * model.std**2 + 1 - alphas) ** 0.5 * u).float()


def error_between_fixed_times(name, steps, discretize="uniform", **options):
    """Relative error of a run that starts on the exact flow, at timestep 0, or at the first timestep of DDIM's grid.

    A k-sampler's last step goes on to the clean latent, where the noise level jumps: its error is measured before that step.
    """
    model, u = GaussianModel(), randn(3, 1, *SHAPE)
    sampler, eta = make_sampler(name, model, **options), 0.0 if SAMPLERS[name].takes_eta else None
    grid = sampler.checked_steps(steps, eta, discretize)
    to_clean = grid.alphas_prev[0] == 1.0
    x_T = on_the_flow(model, grid.alphas[-1], u)
    x, inter = sampler.sample(
        steps, 1, SHAPE, x_T=x_T, eta=eta, verbose=False, log_every_t=1, ddim_discretize=discretize
    )
    if to_clean:
        return rel_error(inter["x_inter"][-2], on_the_flow(model, grid.alphas[0], u))
    return rel_error(x, on_the_flow(model, grid.alphas_prev[0], u))


@pytest.mark.parametrize(
    "name, order, discretize, options",
    [
        ("ddim", 1, "uniform", {}),
        ("euler", 1, "logsnr", {}),
        ("euler", 1, "karras", {}),
        ("euler_ancestral", 1, "karras", {}),
        ("heun", 2, "logsnr", {}),
        ("heun", 2, "karras", {}),
        ("dpmpp_2m", 2, "karras", {}),
        ("dpmpp_2m_sde", 2, "logsnr", {}),
        ("dpm_solver", 1, "logsnr", {"order": 1}),
        ("dpm_solver", 2, "logsnr", {}),
        ("dpm_solver", 2, "karras", {}),
        ("dpm_solver_2s", 2, "logsnr", {}),
        ("dpm_solver_3s", 3, "logsnr", {}),
        ("unipc", 2, "logsnr", {"order": 1}),  # the corrector gains one order
        ("unipc", 3, "logsnr", {"variant": "bh1"}),
        ("unipc", 3, "karras", {}),
    ],
)
def test_deterministic_samplers_converge_at_their_order(name, order, discretize, options):
    # DDIM's grid is uniform in time, which is coarse near the end; 3n + 2 calls are blocks of 3, ..., 3, 2 for dpm_solver_3s.
    counts = {"ddim": (500, 1000), "dpm_solver_3s": (11, 23)}.get(name, (23, 47))
    coarse, fine = (error_between_fixed_times(name, steps, discretize, **options) for steps in counts)
    assert coarse / fine > 0.85 * (counts[1] / counts[0]) ** order


@pytest.mark.parametrize("name, fall", [("dpm_solver", 3.0), ("heun", 3.2), ("dpmpp_2m", 3.0)])
def test_the_grid_uniform_in_time_converges_with_many_steps(name, fall):
    coarse, fine = (error_between_fixed_times(name, steps) for steps in (250, 500))
    assert coarse > fall * fine


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(
    "name", [name for name, entry in SAMPLERS.items() if entry.takes_eta or entry.default_eta == 0.0]
)
def test_a_constant_prediction_is_followed_exactly(name, zero_terminal_snr):
    model, clean = ToyModel("x0", zero_terminal_snr=zero_terminal_snr), torch.full((1, *SHAPE), 0.5)
    model.apply_model = lambda x, t, c: clean
    sampler, x_T = make_sampler(name, model), randn(3, 1, *SHAPE)
    grid = sampler.checked_steps(9, 0.0, "trailing")
    _, inter = sampler.sample(9, 1, SHAPE, x_T=x_T, eta=0.0, verbose=False, log_every_t=1, ddim_discretize="trailing")
    eps = (x_T - grid.alphas[-1] ** 0.5 * clean) / (1 - grid.alphas[-1]) ** 0.5
    for x, alpha in zip(inter["x_inter"][1:], grid.alphas_prev[::-1]):
        assert torch.allclose(x, alpha**0.5 * clean + (1 - alpha) ** 0.5 * eps, atol=1e-4)


def test_order_three_multistep_converges_at_its_order_once_it_has_a_history():
    def error(steps):
        model, u = GaussianModel(), randn(3, 1, *SHAPE)
        sampler = make_sampler("dpm_solver_3m", model)
        grid = sampler.checked_steps(steps, spacing="logsnr")
        run = SamplingRun(model, grid, u, None, None, 1.0, SamplingOptions())
        k = steps - 1 - steps // 4
        x = on_the_flow(model, grid.alphas[k], u)
        run.history = [run.predict(on_the_flow(model, grid.alphas[k + n], u), k + n)[1] for n in (1, 2)]
        while k >= 0:
            x, _ = sampler.step(x, k, run)
            k -= 1
        return rel_error(x, on_the_flow(model, grid.alphas_prev[0], u))

    assert error(20) > 0.85 * 8 * error(40)


def test_multistep_tables_of_order_three_are_exact_for_predictions_quadratic_in_lam():
    levels = levels_to_first_timestep("logsnr", 9, model_alphas_cumprod(ToyModel()))
    tables, lam, k = multistep_tables(levels), levels.lam, 4
    polynomial = np.polynomial.Polynomial([0.3, -0.2, 0.15])
    m = polynomial(lam)
    fine = np.linspace(lam[k + 1], lam[k], 20001)
    integral = np.trapezoid(np.exp(fine - lam[k]) * polynomial(fine), fine) * levels.alpha[k]
    step = (
        tables["move"][k] * m[k + 1]
        + tables["third_new"][k] * (m[k + 1] - m[k + 2])
        + tables["third_old"][k] * (m[k + 2] - m[k + 3])
    )
    assert abs(step - integral) < 1e-7


@pytest.mark.parametrize(
    "exact, rough", [("plms", "ddim"), ("dpm_solver_3m", "dpm_solver"), ("dpm_solver_3s", "dpm_solver_2s")]
)
def test_higher_orders_are_more_exact(exact, rough):
    grid = "uniform" if exact == "plms" else "logsnr"
    assert error_between_fixed_times(exact, 50, grid) < 0.4 * error_between_fixed_times(rough, 50, grid)


@pytest.mark.parametrize(
    "name, steps, grid, tolerance",
    [
        ("ddim", 500, "uniform", 0.01),
        ("ancestral", 1000, "uniform", 0.01),
        ("ancestral", 500, "trailing", 0.015),  # the posterior's variance of fewer steps is a little small
        ("euler_ancestral", 300, "logsnr", 0.01),
        ("dpmpp_2m_sde", 50, "karras", 0.01),
        ("dpmpp_2m_sde", 60, "logsnr", 0.01),
    ],
)
def test_stochastic_samplers_reproduce_mean_and_deviation(name, steps, grid, tolerance):
    torch.manual_seed(0)
    x = (
        make_sampler(name, GaussianModel())
        .sample(steps, 16, (4, 16, 16), eta=1.0, verbose=False, ddim_discretize=grid)
        .samples
    )
    assert abs(float(x.mean()) - 0.7) < tolerance and abs(float(x.std()) - 0.3) < tolerance


def test_the_exact_weight_of_the_sde_reproduces_mean_and_deviation():
    torch.manual_seed(0)
    sampler = make_sampler("dpmpp_2m_sde", GaussianModel(), solver="heun")
    x = sampler.sample(50, 16, (4, 16, 16), eta=0.6, verbose=False, ddim_discretize="karras").samples
    assert abs(float(x.mean()) - 0.7) < 0.01 and abs(float(x.std()) - 0.3) < 0.01


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_draws_the_data_from_an_exact_consistency_model(steps):
    model = GaussianConsistencyModel()
    x_T = on_the_flow(model, float(model.alphas_cumprod[-1]), randn(9, 16, 4, 16, 16))
    torch.manual_seed(0)
    x = make_sampler("lcm", model).sample(steps, 16, (4, 16, 16), x_T=x_T, verbose=False).samples
    assert abs(float(x.mean()) - 0.7) < 0.01 and abs(float(x.std()) - 0.3) < 0.01


def test_lcm_meets_its_formula():
    model, x_T = ToyModel(), randn(1, 2, *SHAPE)
    torch.manual_seed(4)
    x, inter = make_sampler("lcm", model).sample(
        4, 2, SHAPE, torch.zeros(2, 4, 1, 1), x_T=x_T, verbose=False, log_every_t=1
    )
    assert [int(t[0]) for _, t in model.calls] == [
        999,
        759,
        499,
        259,
    ]  # four of the 50 distilled timesteps 999, 979, ... 19
    torch.manual_seed(4)
    expected = x_T
    for t, t_next in ((999, 759), (759, 499), (499, 259), (259, None)):
        alpha, sigma = model.sqrt_alphas_cumprod[t], model.sqrt_one_minus_alphas_cumprod[t]
        x0 = (expected - sigma * model.apply_model(expected, torch.full((2,), t), torch.zeros(2, 4, 1, 1))) / alpha
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5
        expected = c_skip * expected + c_out * x0
        if t_next is not None:
            noise = torch.randn_like(x_T)
            expected = (
                model.sqrt_alphas_cumprod[t_next] * expected + model.sqrt_one_minus_alphas_cumprod[t_next] * noise
            )
    assert rel_error(x, expected) < 1e-5
    assert torch.equal(inter["pred_x0"][-1], x)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpm_solver", "dpm_solver_3s", "unipc"])
def test_image_to_image_of_exact_samples_reproduces_mean_and_deviation(name):
    torch.manual_seed(0)
    sampler = make_sampler(name, GaussianModel())
    sampler.make_schedule(60, "logsnr", verbose=False)
    x0 = 0.7 + 0.3 * torch.randn(16, 4, 16, 16)
    x = sampler.decode(sampler.stochastic_encode(x0, torch.full((16,), 40)), None, 40, verbose=False)
    assert abs(float(x.mean()) - 0.7) < 0.01 and abs(float(x.std()) - 0.3) < 0.01
    assert float((x - x0).std()) > 0.1  # another picture of the same distribution
