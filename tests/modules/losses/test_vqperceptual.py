"""Loss of the VQ autoencoder. tests/golden/numerics/gan_losses.npz: figures of the published implementation."""

import math

import numpy as np
import pytest
import torch

from ldm.modules.losses import VQLPIPSWithDiscriminator
from ldm.modules.losses.vqperceptual import codebook_use, measure_perplexity
from ldm.util import get_obj_from_str
from tests.modules.losses.test_reconstruction import SMALL, Autoencoder
from tests.reference import GOLDEN, TOLERANCE, rel_error, seed_weights

CODEBOOK_LOSS = 0.37  # of Autoencoder.call


@pytest.fixture
def auto() -> Autoencoder:
    return Autoencoder("vq")


def test_agrees_with_the_published_figures(auto):
    reference = np.load(GOLDEN / "numerics/gan_losses.npz")
    loss = VQLPIPSWithDiscriminator(
        5, disc_weight=0.8, codebook_weight=1.0, disc_conditional=False, disc_in_channels=3, disc_num_layers=2
    )
    loss = seed_weights(loss).train()
    checked = 0
    for optimizer_idx in (0, 1):
        for step in (0, 10):
            value, log = auto.call(loss, optimizer_idx, step)
            key = f"vq_opt{optimizer_idx}_step{step}"
            assert rel_error(value, reference[key]) < TOLERANCE, key
            for name in (n for n in reference.files if n.startswith(key + "|")):
                assert rel_error(log[name.split("|")[1]], reference[name]) < TOLERANCE, name
                checked += 1
    assert checked == 22


def test_the_published_target_is_this_loss():
    assert get_obj_from_str("taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator") is VQLPIPSWithDiscriminator


def test_perplexity_is_the_exponential_of_the_entropy():
    codes = torch.tensor([[0, 0], [2, 3]])
    perplexity, cluster_usage = measure_perplexity(codes, 8)
    torch.testing.assert_close(perplexity, torch.tensor(math.exp(1.5 * math.log(2.0))))  # frequencies 1/2, 1/4, 1/4
    assert cluster_usage == 3
    for codes, both in ((torch.arange(8), 8.0), (torch.zeros(5, dtype=torch.int64), 1.0)):
        torch.testing.assert_close(torch.stack(measure_perplexity(codes, 8)), torch.tensor([both, both]))
    assert torch.isfinite(torch.stack(codebook_use(torch.zeros(8, dtype=torch.int64)))).all()


@pytest.mark.parametrize("n_classes", [None, 16])
def test_codebook_use_is_logged_if_codes_are_passed(auto, n_classes):
    loss = VQLPIPSWithDiscriminator(**SMALL, n_classes=n_classes)
    _, log = auto.call(loss, 0, 9, split="val", predicted_indices=torch.arange(8).repeat(4))
    names = {"total_loss", "quant_loss", "nll_loss", "rec_loss", "p_loss", "d_weight", "disc_factor", "g_loss"}
    assert set(log) == {f"val/{name}" for name in names | {"perplexity", "cluster_usage"}}
    torch.testing.assert_close(log["val/perplexity"], torch.tensor(8.0))
    assert log["val/cluster_usage"] == 8 and not any(value.requires_grad for value in log.values())
    assert "val/perplexity" not in auto.call(loss, 0, 9, split="val")[1]


def test_the_loss_is_the_sum_of_its_weighted_parts(auto):
    loss = VQLPIPSWithDiscriminator(**SMALL, codebook_weight=3.0, disc_weight=0.7, disc_factor=0.5)
    for step, factor in ((4, 0.0), (5, 0.5)):
        value, log = auto.call(loss, 0, step)
        assert log["train/disc_factor"] == factor and log["train/d_weight"] > 0 and log["train/g_loss"] != 0
        expected = log["train/nll_loss"] + 3.0 * CODEBOOK_LOSS + factor * log["train/d_weight"] * log["train/g_loss"]
        torch.testing.assert_close(value.detach(), expected)
        torch.testing.assert_close(log["train/total_loss"], expected)


def test_pixels_are_averaged_in_the_chosen_norm(auto):
    difference = auto.x - auto.decoder(auto.h).detach()
    for norm, expected in (("l1", difference.abs().mean()), ("l2", difference.square().mean())):
        loss = VQLPIPSWithDiscriminator(**SMALL, use_discriminator=False, pixel_loss=norm, pixelloss_weight=2.0)
        _, log = auto.call(loss, 0, 0)
        torch.testing.assert_close(log["train/nll_loss"], 2.0 * expected)
        assert log["train/rec_loss"] == log["train/nll_loss"] and log["train/p_loss"] == 0


def test_the_codebook_loss_is_averaged_and_optional(auto):
    loss = VQLPIPSWithDiscriminator(**SMALL, use_discriminator=False)
    value, log = loss(None, auto.x, auto.x, 0, 0)
    assert log["train/quant_loss"] == 0 and value == log["train/nll_loss"]
    _, log = loss(torch.tensor([1.0, 2.0]), auto.x, auto.x, 0, 0)
    assert log["train/quant_loss"] == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perceptual_loss": "dists"}, "perceptual_loss='dists': choose lpips"),
        ({"pixel_loss": "huber"}, "pixel_loss='huber': choose one of l1, l2"),
    ],
)
def test_invalid_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        VQLPIPSWithDiscriminator(**{**SMALL, **options})
