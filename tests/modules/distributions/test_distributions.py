"""The diagonal Gaussian. tests/golden/numerics/gaussian.npz: figures of the published implementation."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, normal_kl
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error


def make_pair() -> tuple[DiagonalGaussianDistribution, DiagonalGaussianDistribution]:
    return DiagonalGaussianDistribution(randn(222, 2, 8, 8, 8)), DiagonalGaussianDistribution(randn(223, 2, 8, 8, 8))


def test_agrees_with_the_published_figures():
    reference = np.load(GOLDEN / "numerics/gaussian.npz")
    p, q = make_pair()
    torch.manual_seed(3)
    out = {
        "kl": p.kl(),
        "kl_other": p.kl(q),
        "nll": p.nll(randn(224, 2, 4, 8, 8)),
        "sample": p.sample(),
        "mode": p.mode(),
    }
    assert set(out) == set(reference.files)
    for name, value in out.items():
        assert rel_error(value, reference[name]) < TOLERANCE, name


def test_kl_and_nll_are_those_of_torch():
    p, q = make_pair()
    p_torch, q_torch = Normal(p.mean, p.std), Normal(q.mean, q.std)
    standard = Normal(torch.zeros_like(p.mean), torch.ones_like(p.mean))
    x = randn(1, 2, 4, 8, 8)
    torch.testing.assert_close(p.kl(), kl_divergence(p_torch, standard).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(p.kl(q), kl_divergence(p_torch, q_torch).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(p.nll(x), -p_torch.log_prob(x).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(normal_kl(p.mean, p.logvar, 0.0, 0.0).sum(dim=(1, 2, 3)), p.kl())


def test_sample_uses_the_cpu_generator():
    p, _ = make_pair()
    torch.manual_seed(5)
    noise = torch.randn(p.mean.shape)
    torch.manual_seed(5)
    assert torch.equal(p.sample(), p.mean + p.std * noise)
    with torch.device("meta"):  # the default device has no influence
        assert torch.equal(p.sample(torch.Generator().manual_seed(5)), p.mean + p.std * noise)


def test_log_variance_is_clamped():
    p = DiagonalGaussianDistribution(torch.tensor([0.0, 1e4])[None, :, None, None])
    q = DiagonalGaussianDistribution(torch.tensor([0.0, -1e4])[None, :, None, None])
    assert p.logvar.item() == 20.0 and q.logvar.item() == -30.0
    assert torch.isfinite(p.kl()).all() and torch.isfinite(q.kl()).all()


def test_deterministic_is_its_mean():
    p = DiagonalGaussianDistribution(randn(6, 2, 8, 4, 4), deterministic=True)
    assert torch.equal(p.sample(), p.mode())
    assert p.kl().tolist() == [0.0] and p.nll(p.mean).tolist() == [0.0]


def test_half_precision_keeps_its_type_in_samples_and_sums_in_float32():
    p = DiagonalGaussianDistribution(randn(7, 2, 8, 32, 32).bfloat16())
    exact = DiagonalGaussianDistribution(p.parameters.float())
    assert p.sample().dtype == torch.bfloat16
    assert p.kl().dtype == torch.float32
    assert rel_error(p.kl(), exact.kl()) < 2e-3


def test_an_odd_number_of_channels_is_an_error():
    with pytest.raises(ValueError, match="double_z"):
        DiagonalGaussianDistribution(torch.zeros(1, 3, 2, 2))


def test_normal_kl_needs_a_tensor():
    with pytest.raises(TypeError, match="at least one"):
        normal_kl(0.0, 0.0, 0.0, 0.0)
