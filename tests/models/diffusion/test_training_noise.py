"""Laws of the noise of training: variances and covariances in closed form, and what the network and its target see."""

import pytest
import torch

from ldm.models.diffusion.training_noise import TrainingNoise
from ldm.rng import BatchSamples, Purpose, normal_like, samples_set
from tests.models.diffusion.tiny import ATTEND, CLASSES, latent_diffusion
from tests.reference import randn

NUMBER = 20_000


def noise_of(noise, height=8, width=6, channels=1, rows=NUMBER):
    with samples_set(BatchSamples(7, 0, range(rows), rows)):
        return noise(torch.zeros(rows, channels, height, width)).target


def covariance(noise):
    """Covariance of all positions of the first channel, (H * W, H * W)."""
    flat = noise[:, 0].flatten(1).double()
    return flat.T @ flat / len(flat)


def test_offset_noise_has_variance_one_plus_s_squared_and_covariance_s_squared():
    found, s = covariance(noise_of(TrainingNoise(offset_strength=0.5), 4, 4)), 0.5
    wanted = torch.eye(16, dtype=torch.float64) + s**2
    assert (found - wanted).abs().max() < 0.06


def test_the_offsets_of_channels_are_independent():
    noise = noise_of(TrainingNoise(offset_strength=2.0), 4, 4, channels=2, rows=4000).mean(dim=(2, 3))
    assert abs(torch.corrcoef(noise.T)[0, 1]) < 0.06


@pytest.mark.parametrize("discount", [0.3, 0.9])
def test_multires_noise_has_unit_variance_and_the_covariance_of_upsampled_noise(discount):
    wanted = torch.eye(48, dtype=torch.float64)
    for k in (1, 2):  # of a third level the width would be 0
        cells = (8 >> k) * (6 >> k)
        basis = torch.eye(cells, dtype=torch.float64).reshape(cells, 1, 8 >> k, 6 >> k)
        columns = torch.nn.functional.interpolate(basis, size=(8, 6), mode="bilinear").flatten(1)  # (cells, 48)
        wanted += discount ** (2 * k) * columns.T @ columns
    scale = wanted.diagonal().rsqrt()
    noise = TrainingNoise(multires_iterations=9, multires_discount=discount)
    assert (covariance(noise_of(noise)) - scale[:, None] * wanted * scale).abs().max() < 0.06


def test_noise_belongs_to_its_sample():
    noise, x = TrainingNoise(0.1, 3, 0.5, 0.1), torch.zeros(4, 2, 8, 8)
    with samples_set(BatchSamples(7, 1, [5, 3, 9, 0], 4)):
        all_rows = noise(x)
    with samples_set(BatchSamples(7, 1, [0, 3], 2)):
        some = noise(x[:2])
    assert torch.equal(all_rows.target[[3, 1]], some.target) and torch.equal(all_rows.seen[[3, 1]], some.seen)


def test_without_strength_the_noise_is_independent_normal_numbers():
    with samples_set(BatchSamples(7, 0, range(2), 2)):
        wanted = normal_like(torch.zeros(2, 4, 8, 8), Purpose.NOISE)
    with samples_set(BatchSamples(7, 0, range(2), 2)):
        found = TrainingNoise()(torch.zeros(2, 4, 8, 8))
    assert torch.equal(found.target, wanted) and torch.equal(found.seen, wanted)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_only_the_networks_input_is_perturbed_and_only_in_training(parameterization, monkeypatch):
    config = {
        "target": "ldm.models.diffusion.training_noise.TrainingNoise",
        "params": {"offset_strength": 0.2, "input_perturbation": 0.1},
    }
    model = latent_diffusion("crossattn", ATTEND, CLASSES, parameterization=parameterization, noise_config=config)
    seen = []
    monkeypatch.setattr(model, "apply_model", lambda x, t, cond: seen.append(x) or torch.zeros_like(x))
    x, t = randn(3, 2, 4, 8, 8), torch.tensor([100, 900])
    alpha, sigma = (
        table[t][:, None, None, None] for table in (model.sqrt_alphas_cumprod, model.sqrt_one_minus_alphas_cumprod)
    )
    with samples_set(BatchSamples(7, 0, range(2), 2)):
        plain = normal_like(x, Purpose.NOISE)
        eps = plain + 0.2 * normal_like(x[:, :, :1, :1], Purpose.OFFSET_NOISE)
        xi = normal_like(x, Purpose.INPUT_PERTURBATION)
    for training, noise, added in ((True, eps, 0.1 * xi), (False, plain, 0.0)):
        model.train(training)
        with samples_set(BatchSamples(7, 0, range(2), 2)):
            errors = model.denoising_errors(x, None, t)
        target = {"eps": noise, "x0": x, "v": alpha * noise - sigma * x}[parameterization]
        torch.testing.assert_close(seen.pop(), alpha * x + sigma * (noise + added))
        torch.testing.assert_close(errors, target.square().mean(dim=(1, 2, 3)))
