"""Loss of the KL autoencoder. tests/golden/numerics/gan_losses.npz: figures of the published implementation."""

import numpy as np
import pytest
import torch

from ldm.modules.losses import LPIPSWithDiscriminator
from tests.modules.losses.test_reconstruction import SMALL, Autoencoder
from tests.reference import GOLDEN, TOLERANCE, rel_error, seed_weights

NO_GAN = {**SMALL, "use_discriminator": False, "kl_weight": 0.0}


@pytest.fixture
def auto() -> Autoencoder:
    return Autoencoder("kl")


def test_agrees_with_the_published_figures(auto):
    reference = np.load(GOLDEN / "numerics/gan_losses.npz")
    loss = seed_weights(LPIPSWithDiscriminator(disc_start=5, kl_weight=1e-6, disc_weight=0.5, logvar_init=0.2)).train()
    checked = 0
    for optimizer_idx in (0, 1):
        for step in (0, 10):
            value, log = auto.call(loss, optimizer_idx, step)
            key = f"kl_opt{optimizer_idx}_step{step}"
            assert rel_error(value, reference[key]) < TOLERANCE, key
            for name in (n for n in reference.files if n.startswith(key + "|")):
                assert rel_error(log[name.split("|")[1]], reference[name]) < TOLERANCE, name
                checked += 1
    assert checked == 22


def test_logs_have_their_split_in_the_name_and_no_graph(auto):
    _, log = auto.call(LPIPSWithDiscriminator(**SMALL), 0, 9, split="val")
    names = {"total_loss", "logvar", "kl_loss", "nll_loss", "rec_loss", "d_weight", "disc_factor", "g_loss"}
    assert set(log) == {f"val/{name}" for name in names}
    assert not any(value.requires_grad for value in log.values())


def test_without_a_discriminator_the_loss_is_nll_plus_weighted_kl(auto):
    loss = LPIPSWithDiscriminator(**{**NO_GAN, "kl_weight": 0.3})
    value, log = auto.call(loss, 0, 9)
    torch.testing.assert_close(value, log["train/nll_loss"] + 0.3 * log["train/kl_loss"])


def test_pixel_weight_and_pixel_weights_scale_the_nll(auto):
    loss = LPIPSWithDiscriminator(**NO_GAN)
    plain, log = auto.call(loss, 0, 0)
    double, _ = auto.call(LPIPSWithDiscriminator(**NO_GAN, pixelloss_weight=2.0), 0, 0)
    masked, masked_log = auto.call(loss, 0, 0, weights=torch.tensor(0.5))
    torch.testing.assert_close(double, 2 * plain)
    torch.testing.assert_close(masked, 0.5 * plain)
    assert masked_log["train/nll_loss"] == log["train/nll_loss"]


def test_logvar_is_fixed_unless_learn_logvar(auto):
    assert not LPIPSWithDiscriminator(**SMALL).logvar.requires_grad
    loss = LPIPSWithDiscriminator(**SMALL, learn_logvar=True, logvar_init=0.3)
    auto.call(loss, 0, 0)[0].backward()
    assert loss.logvar.grad is not None and loss.logvar.shape == ()
