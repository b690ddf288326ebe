"""Noise levels between timesteps."""

import numpy as np
import pytest

from ldm.models.diffusion.samplers.spacing import NoiseLevels, levels_to_first_timestep, noise_levels
from tests.models.diffusion.samplers.toy import ToyModel

ALPHAS = ToyModel().alphas_cumprod.double().numpy()


def test_alpha_sigma_and_lam_are_signal_noise_and_half_their_log_ratio():
    levels = NoiseLevels(np.arange(4), np.array([1.0, 0.8, 0.1, 0.0]))
    assert levels.alpha**2 + levels.sigma**2 == pytest.approx(1.0) and levels.alpha[1] == 0.8**0.5
    assert levels.lam[1:3] == pytest.approx(np.log(levels.alpha[1:3] / levels.sigma[1:3]))
    assert levels.lam[0] == np.inf and levels.lam[3] == -np.inf


@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras"])
@pytest.mark.parametrize("count", [2, 5, 40])
def test_levels_are_even_in_their_own_measure_between_the_first_and_the_last_timestep(spacing, count):
    levels = noise_levels(spacing, count, ALPHAS)
    measure = {"uniform": levels.t, "logsnr": levels.lam, "karras": (levels.sigma / levels.alpha) ** (1 / 7)}[spacing]
    assert np.diff(measure) == pytest.approx((measure[-1] - measure[0]) / (count - 1))
    assert levels.t[[0, -1]] == pytest.approx([0, 999]) and levels.alphas[[0, -1]] == pytest.approx(ALPHAS[[0, -1]])
    assert np.log(levels.alphas) == pytest.approx(np.interp(levels.t, np.arange(1000), np.log(ALPHAS)))


@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras", "trailing"])
def test_a_single_level_is_the_last_timestep(spacing):
    levels = noise_levels(spacing, 1, ALPHAS)
    assert levels.t == pytest.approx([999]) and levels.alphas == pytest.approx(ALPHAS[[-1]])


def test_trailing_levels_are_timesteps_of_the_schedule():
    levels = noise_levels("trailing", 4, ALPHAS)
    assert levels.t.tolist() == [249, 499, 749, 999] and np.array_equal(levels.alphas, ALPHAS[levels.t])


@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras", "trailing"])
def test_steps_to_the_first_timestep_have_one_end_more_than_starts(spacing):
    levels = levels_to_first_timestep(spacing, 6, ALPHAS)
    assert len(levels.t) == 6 and len(levels.alphas) == 7
    assert levels.alphas[0] == pytest.approx(ALPHAS[0]) and levels.t[-1] == pytest.approx(999)
    assert np.log(levels.alphas[1:]) == pytest.approx(np.interp(levels.t, np.arange(1000), np.log(ALPHAS)))
    assert (np.diff(levels.alphas) < 0).all()


def test_an_unknown_spacing_and_an_infinite_log_snr_are_refused():
    with pytest.raises(ValueError, match="'cubic': choose one of uniform, logsnr, karras, trailing"):
        noise_levels("cubic", 4, ALPHAS)
    zero_snr = ToyModel("v", zero_terminal_snr=True).alphas_cumprod.double().numpy()
    for spacing in ("uniform", "logsnr", "karras"):
        with pytest.raises(ValueError, match="log-SNR of a zero-terminal-SNR schedule is infinite; choose 'trailing'"):
            noise_levels(spacing, 4, zero_snr)
    assert noise_levels("trailing", 4, zero_snr).alphas[-1] == 0.0
