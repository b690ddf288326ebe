"""Laws of the VQ autoencoder's loss. tests/golden/numerics/gan_losses.npz: figures of the published implementation."""

import math

import numpy as np
import pytest
import torch

from ldm.modules.losses import VQLPIPSWithDiscriminator
from ldm.modules.losses.vqperceptual import codebook_use, measure_perplexity
from ldm.util import get_obj_from_str
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error, seed_weights

SMALL = {"disc_start": 5, "perceptual_weight": 0, "disc_num_layers": 1, "disc_ndf": 8}
X = torch.tanh(randn(220, 2, 3, 32, 32))
CODEBOOK_LOSS = torch.tensor(0.37)


class Decoder:
    """A decoder of one layer, and its loss."""

    def __init__(self) -> None:
        self.layer = seed_weights(torch.nn.Conv2d(8, 3, 3, padding=1))

    def loss_of(self, loss, optimizer_idx, step, split="train", codebook_loss=CODEBOOK_LOSS, **kwargs):
        pictures = self.layer(randn(221, 2, 8, 32, 32))
        return loss(
            codebook_loss, X, pictures, optimizer_idx, step, last_layer=self.layer.weight, split=split, **kwargs
        )


@pytest.fixture
def decoder() -> Decoder:
    return Decoder()


def test_agrees_with_the_published_figures(decoder):
    reference = np.load(GOLDEN / "numerics/gan_losses.npz")
    loss = VQLPIPSWithDiscriminator(
        5, disc_weight=0.8, codebook_weight=1.0, disc_conditional=False, disc_in_channels=3, disc_num_layers=2
    )
    loss = seed_weights(loss).train()
    checked = 0
    for optimizer_idx in (0, 1):
        for step in (0, 10):
            value, log = decoder.loss_of(loss, optimizer_idx, step)
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
def test_codebook_use_is_logged_where_codes_are_given(decoder, n_classes):
    loss = VQLPIPSWithDiscriminator(**SMALL, n_classes=n_classes)
    _, log = decoder.loss_of(loss, 0, 9, split="val", predicted_indices=torch.arange(8).repeat(4))
    names = {"total_loss", "quant_loss", "nll_loss", "rec_loss", "p_loss", "d_weight", "disc_factor", "g_loss"}
    assert set(log) == {f"val/{name}" for name in names | {"perplexity", "cluster_usage"}}
    torch.testing.assert_close(log["val/perplexity"], torch.tensor(8.0))
    assert log["val/cluster_usage"] == 8 and not any(value.requires_grad for value in log.values())
    assert "val/perplexity" not in decoder.loss_of(loss, 0, 9, split="val")[1]


def test_the_loss_is_the_sum_of_its_weighted_parts(decoder):
    loss = VQLPIPSWithDiscriminator(**SMALL, codebook_weight=3.0, disc_weight=0.7, disc_factor=0.5)
    for step, factor in ((4, 0.0), (5, 0.5)):
        value, log = decoder.loss_of(loss, 0, step)
        assert log["train/disc_factor"] == factor and log["train/d_weight"] > 0 and log["train/g_loss"] != 0
        expected = log["train/nll_loss"] + 3.0 * CODEBOOK_LOSS + factor * log["train/d_weight"] * log["train/g_loss"]
        torch.testing.assert_close(value.detach(), expected)
        torch.testing.assert_close(log["train/total_loss"], expected)


def test_pixels_are_averaged_in_the_chosen_norm(decoder):
    off = {"use_discriminator": False}
    difference = X - decoder.layer(randn(221, 2, 8, 32, 32)).detach()
    for norm, expected in (("l1", difference.abs().mean()), ("l2", difference.square().mean())):
        _, log = decoder.loss_of(VQLPIPSWithDiscriminator(**SMALL, **off, pixel_loss=norm, pixelloss_weight=2.0), 0, 0)
        torch.testing.assert_close(log["train/nll_loss"], 2.0 * expected)
        assert log["train/rec_loss"] == log["train/nll_loss"] and log["train/p_loss"] == 0


def test_the_codebook_loss_is_averaged_and_may_be_missing(decoder):
    loss = VQLPIPSWithDiscriminator(**SMALL, use_discriminator=False)
    value, log = decoder.loss_of(loss, 0, 0, codebook_loss=None)
    assert log["train/quant_loss"] == 0 and value == log["train/nll_loss"]
    _, log = decoder.loss_of(loss, 0, 0, codebook_loss=torch.tensor([1.0, 2.0]))
    assert log["train/quant_loss"] == 1.5


def test_before_its_start_a_broken_discriminator_cannot_reach_the_generator(decoder):
    loss = VQLPIPSWithDiscriminator(**SMALL)
    torch.nn.init.constant_(loss.discriminator.main[0].weight, float("nan"))
    before, _ = decoder.loss_of(loss, 0, 4)
    after, _ = decoder.loss_of(loss, 0, 5)
    assert torch.isfinite(before) and not torch.isfinite(after)


def test_half_precision_pictures_are_averaged_in_float32():
    loss = VQLPIPSWithDiscriminator(**SMALL, use_discriminator=False)
    x, y = X.bfloat16(), X.flip(0).bfloat16()
    value, _ = loss(CODEBOOK_LOSS.bfloat16(), x, y, 0, 0)
    exact, _ = loss(CODEBOOK_LOSS.bfloat16().float(), x.float(), y.float(), 0, 0)
    assert value.dtype == torch.float32 and torch.equal(value, exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perceptual_loss": "dists"}, "perceptual_loss='dists': choose lpips"),
        ({"pixel_loss": "huber"}, "pixel_loss='huber': choose one of l1, l2"),
        ({"disc_start": None}, "disc_start is missing"),
    ],
)
def test_wrong_options_are_refused_when_building(options, message):
    with pytest.raises(ValueError, match=message):
        VQLPIPSWithDiscriminator(**{**SMALL, **options})


def test_another_optimizer_index_is_refused(decoder):
    with pytest.raises(ValueError, match="optimizer_idx=2"):
        decoder.loss_of(VQLPIPSWithDiscriminator(**SMALL), 2, 0)
