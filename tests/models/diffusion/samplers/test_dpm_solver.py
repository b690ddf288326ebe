"""DPM-Solver++: the published numbers, diffusers' trajectories, its orders on exact data, and its tables."""

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler

from ldm.models.diffusion.dpm_solver.sampler import DPMSolverSampler
from ldm.models.diffusion.samplers.denoiser import SamplingOptions, SamplingRun
from ldm.models.diffusion.samplers.dpm_solver import blocks, multistep_tables, singlestep_tables
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.models.diffusion.samplers.spacing import levels_to_first_timestep, model_alphas_cumprod
from tests.models.diffusion.samplers.against_diffusers import assert_follows
from tests.models.diffusion.samplers.published import assert_published
from tests.models.diffusion.samplers.toy import (
    SHAPE,
    GaussianModel,
    ToyModel,
    assert_order,
    error_between_fixed_times,
    on_the_flow,
)
from tests.reference import randn, rel_error


@pytest.mark.parametrize("name", ["dpm_10_cfg", "dpm_20_cfg", "dpm_50_cfg"])
def test_samples_are_the_published_ones(name):
    assert_published(name, DPMSolverSampler(ToyModel()))


@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras", "trailing"])
@pytest.mark.parametrize(
    "options, scheduler",
    [
        ({"order": 1}, DPMSolverMultistepScheduler),
        ({"order": 2}, DPMSolverMultistepScheduler),
        ({"order": 2, "method": "singlestep"}, DPMSolverSinglestepScheduler),
    ],
)
def test_trajectories_are_those_of_diffusers(options, scheduler, spacing):
    # Order 3 differs: diffusers halves the curvature (multistep) and weighs a block's stages as order 2 (singlestep).
    for count in (1, 2, 3, 8, 15):
        lower = scheduler is DPMSolverMultistepScheduler or count % 2 == 1  # even counts: ours ends with a block of 2
        config = {"solver_order": options["order"], "final_sigmas_type": "sigma_min", "lower_order_final": lower}
        assert_follows("dpm_solver", scheduler, count, spacing, options, **config)


@pytest.mark.parametrize(
    "name, order, spacing, options",
    [
        ("dpm_solver", 1, "logsnr", {"order": 1}),
        ("dpm_solver", 2, "logsnr", {}),
        ("dpm_solver", 2, "karras", {}),
        ("dpm_solver_2s", 2, "logsnr", {}),
        ("dpm_solver_3s", 3, "logsnr", {}),
    ],
)
def test_runs_converge_at_their_order(name, order, spacing, options):
    counts = (11, 23) if name == "dpm_solver_3s" else (23, 47)  # 3n + 2 calls are blocks of 3, ..., 3, 2
    assert_order(name, order, spacing, counts, **options)


def test_steps_uniform_in_time_converge_when_there_are_many():
    coarse, fine = (error_between_fixed_times("dpm_solver", steps) for steps in (250, 500))
    assert coarse > 3.0 * fine


@pytest.mark.parametrize("exact, rough", [("dpm_solver_3m", "dpm_solver"), ("dpm_solver_3s", "dpm_solver_2s")])
def test_order_three_is_more_exact_than_order_two(exact, rough):
    assert error_between_fixed_times(exact, 50, "logsnr") < 0.4 * error_between_fixed_times(rough, 50, "logsnr")


def test_multistep_order_three_converges_at_its_order_once_it_has_a_history():
    def error(count):
        model, u = GaussianModel(), randn(3, 1, *SHAPE)
        sampler = make_sampler("dpm_solver_3m", model)
        steps = sampler.checked_steps(count, spacing="logsnr")
        run = SamplingRun(model, steps, u, None, None, 1.0, SamplingOptions())
        k = count - 1 - count // 4
        x = on_the_flow(model, steps.alphas[k], u)
        run.history = [run.predict(on_the_flow(model, steps.alphas[k + n], u), k + n)[1] for n in (1, 2)]
        while k >= 0:
            x, _ = sampler.step(x, k, run)
            k -= 1
        return rel_error(x, on_the_flow(model, steps.alphas_prev[0], u))

    assert error(20) > 0.85 * 8 * error(40)


def integral(levels, k, s, polynomial):
    """alpha_k times the integral of e^(lam - lam_k) polynomial(lam) from level s to level k: the exact move to x_k."""
    lam = np.linspace(levels.lam[s], levels.lam[k], 20001)
    return np.trapezoid(np.exp(lam - levels.lam[k]) * polynomial(lam), lam) * levels.alpha[k]


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_multistep_order_three_is_exact_for_predictions_quadratic_in_lam(spacing):
    levels = levels_to_first_timestep(spacing, 9, model_alphas_cumprod(ToyModel()))
    tables, k = multistep_tables(levels), 4
    polynomial = np.polynomial.Polynomial([0.3, -0.2, 0.15])
    m = polynomial(levels.lam)
    new, old = (tables[name][k] for name in ("third_new", "third_old"))
    step = tables["move"][k] * m[k + 1] + new * (m[k + 1] - m[k + 2]) + old * (m[k + 2] - m[k + 3])
    assert abs(step - integral(levels, k, k + 1, polynomial)) < 1e-7


def test_stages_of_a_block_of_three_are_exact_for_predictions_linear_in_lam():
    levels = levels_to_first_timestep("karras", 8, model_alphas_cumprod(ToyModel()))
    tables, s = singlestep_tables(levels, 3), 8  # blocks of 3, 3, 2
    polynomial = np.polynomial.Polynomial([0.3, -0.2])
    m = polynomial(levels.lam)
    assert tables["stage"][::-1].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    for k in (7, 6, 5):
        step = tables["move_s"][k] * m[s] + tables["correct"][k] * (m[k + 1] - m[s])
        exact = polynomial if k < 7 else np.polynomial.Polynomial([m[s]])
        assert abs(step - integral(levels, k, s, exact)) < 1e-7
        assert tables["keep_s"][k] == levels.sigma[k] / levels.sigma[s]


@pytest.mark.parametrize(
    "S, order, sizes",
    [
        *[(1, 1, [1]), (4, 2, [2, 2]), (5, 2, [2, 2, 1])],
        *[(1, 3, [1]), (2, 3, [2]), (3, 3, [2, 1]), (4, 3, [3, 1]), (5, 3, [3, 2]), (6, 3, [3, 2, 1])],
    ],
)
def test_blocks_share_out_the_calls_as_published(S, order, sizes):
    assert blocks(S, order) == sizes
    assert blocks(S + 1, order, first_alone=True) == [1, *sizes] and blocks(1, order, first_alone=True) == [1]


@pytest.mark.parametrize("name", ["dpm_solver_2s", "dpm_solver_3s"])
def test_image_to_image_that_starts_within_a_block_takes_first_order_steps_to_its_end(name):
    model = ToyModel()
    sampler, first = make_sampler(name, model), make_sampler("dpm_solver", model, order=1)
    steps = sampler.checked_steps(9)
    k = next(k for k in range(9) if steps.coefs["stage"][k] == 1)
    x, runs = randn(0, 2, *SHAPE), []
    for s in (sampler, first):
        run = SamplingRun(model, s.checked_steps(9), x, randn(3, 2, 4, 1, 1), None, 1.0, SamplingOptions())
        runs.append(s.step(x, k, run)[0])
    assert rel_error(*runs) < 1e-6


@pytest.mark.parametrize(
    "options, message",
    [({"order": 4}, "order 4: choose one of 1, 2, 3"), ({"method": "adaptive"}, "'adaptive': choose one of multistep")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DPMSolverSampler(ToyModel(), **options)
