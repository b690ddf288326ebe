"""Laws of the KL autoencoder's loss. tests/golden/numerics/gan_losses.npz: figures of the published implementation."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.losses.reconstruction import adopt_weight, hinge_d_loss, vanilla_d_loss
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error, seed_weights

SMALL = {"disc_start": 5, "perceptual_weight": 0, "disc_num_layers": 1, "disc_ndf": 8}


class Picture:
    """A decoder of one layer, what it decodes, and a posterior."""

    def __init__(self) -> None:
        self.x = torch.tanh(randn(220, 2, 3, 32, 32))
        self.decoder = seed_weights(torch.nn.Conv2d(8, 3, 3, padding=1))
        self.h = randn(221, 2, 8, 32, 32)
        self.posterior = DiagonalGaussianDistribution(randn(222, 2, 8, 8, 8))

    def loss_of(self, loss, optimizer_idx, step, split="train", **kwargs):
        weight = self.decoder.weight
        return loss(
            self.x, self.decoder(self.h), self.posterior, optimizer_idx, step, last_layer=weight, split=split, **kwargs
        )


@pytest.fixture
def picture() -> Picture:
    return Picture()


def test_agrees_with_the_published_figures(picture):
    reference = np.load(GOLDEN / "numerics/gan_losses.npz")
    loss = seed_weights(LPIPSWithDiscriminator(disc_start=5, kl_weight=1e-6, disc_weight=0.5, logvar_init=0.2)).train()
    checked = 0
    for optimizer_idx in (0, 1):
        for step in (0, 10):
            value, log = picture.loss_of(loss, optimizer_idx, step)
            key = f"kl_opt{optimizer_idx}_step{step}"
            assert rel_error(value, reference[key]) < TOLERANCE, key
            for name in (n for n in reference.files if n.startswith(key + "|")):
                assert rel_error(log[name.split("|")[1]], reference[name]) < TOLERANCE, name
                checked += 1
    assert checked == 22


def test_logs_carry_their_split_and_no_graph(picture):
    _, log = picture.loss_of(LPIPSWithDiscriminator(**SMALL), 0, 9, split="val")
    names = {"total_loss", "logvar", "kl_loss", "nll_loss", "rec_loss", "d_weight", "disc_factor", "g_loss"}
    assert set(log) == {f"val/{name}" for name in names}
    assert not any(value.requires_grad for value in log.values())


def test_discriminator_losses_are_their_formulas():
    real, fake = randn(1, 2, 1, 3, 3), randn(2, 2, 1, 3, 3)
    torch.testing.assert_close(
        hinge_d_loss(real, fake), ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    )
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        vanilla_d_loss(real, fake), (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / 2
    )


def test_the_discriminator_joins_at_disc_start():
    assert [adopt_weight(0.7, step, threshold=2) for step in range(4)] == [0.0, 0.0, 0.7, 0.7]


def test_before_its_start_a_broken_discriminator_cannot_reach_the_generator(picture):
    loss = LPIPSWithDiscriminator(**SMALL)
    torch.nn.init.constant_(loss.discriminator.main[0].weight, float("nan"))
    before, _ = picture.loss_of(loss, 0, 4)
    after, _ = picture.loss_of(loss, 0, 5)
    assert torch.isfinite(before) and not torch.isfinite(after)
    before.backward()
    assert torch.isfinite(picture.decoder.weight.grad).all()


def test_before_its_start_the_discriminator_has_nothing_to_learn(picture):
    loss = LPIPSWithDiscriminator(**SMALL)
    before, log = picture.loss_of(loss, 1, 4)
    assert before.item() == 0.0 and not before.requires_grad
    assert set(log) == {"train/disc_loss", "train/logits_real", "train/logits_fake"}
    after, _ = picture.loss_of(loss, 1, 5)
    after.backward()
    assert after.item() > 0 and picture.decoder.weight.grad is None


def test_adaptive_weight_balances_the_gradients_at_the_last_layer(picture):
    loss = LPIPSWithDiscriminator(**SMALL, disc_weight=0.5)
    weight = picture.decoder.weight
    reconstruction = picture.decoder(picture.h)
    nll, g = (picture.x - reconstruction).abs().sum(), -loss.logits(reconstruction, None).mean()
    norms = [torch.autograd.grad(value, weight, retain_graph=True)[0].norm() for value in (nll, g)]
    d_weight = loss.calculate_adaptive_weight(nll, g, weight)
    torch.testing.assert_close(d_weight, 0.5 * (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4))
    assert not d_weight.requires_grad


def test_adaptive_weight_is_finite_where_the_generator_gets_no_gradient(picture):
    loss = LPIPSWithDiscriminator(**SMALL)
    weight = picture.decoder.weight
    nll = picture.decoder(picture.h).abs().sum()
    assert loss.calculate_adaptive_weight(nll, 0 * nll, weight).item() == 1e4


def test_under_autocast_the_loss_is_float32(picture):
    loss = LPIPSWithDiscriminator(**SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, log = picture.loss_of(loss, 0, 9)
        d_loss, _ = picture.loss_of(loss, 1, 9)
    assert value.dtype == d_loss.dtype == log["train/d_weight"].dtype == torch.float32


def test_half_precision_pictures_are_summed_in_float32(picture):
    loss = LPIPSWithDiscriminator(**SMALL, use_discriminator=False)
    x, reconstruction = (value.detach().bfloat16() for value in (picture.x, picture.decoder(picture.h)))
    value, _ = loss(x, reconstruction, picture.posterior, 0, 0)
    exact, _ = loss(x.float(), reconstruction.float(), picture.posterior, 0, 0)
    assert value.dtype == torch.float32 and torch.equal(value, exact)


def test_without_a_graph_there_is_no_weight_to_adapt(picture):
    with torch.no_grad():
        value, log = picture.loss_of(LPIPSWithDiscriminator(**SMALL), 0, 9, split="val")
    assert log["val/d_weight"] == 0 and log["val/g_loss"] != 0 and torch.isfinite(value)


@pytest.mark.parametrize("off", [{"disc_factor": 0.0}, {"disc_weight": 0.0}, {"use_discriminator": False}])
def test_switched_off_the_discriminator_costs_nothing(picture, off):
    loss = LPIPSWithDiscriminator(**{**SMALL, **off})
    assert not loss.adversarial
    if loss.discriminator is not None:
        loss.discriminator.register_forward_hook(lambda *_: pytest.fail("the discriminator ran"))
    value, log = picture.loss_of(loss, 0, 9)
    assert log["train/d_weight"] == log["train/g_loss"] == log["train/disc_factor"] == 0
    torch.testing.assert_close(value, log["train/nll_loss"] + loss.kl_weight * log["train/kl_loss"])
    names = [name for name in loss.state_dict() if name.startswith("discriminator.")]
    assert bool(names) == ("use_discriminator" not in off)


def test_perceptual_weight_zero_builds_no_perceptual_network():
    loss = LPIPSWithDiscriminator(**SMALL)
    assert loss.perceptual_loss is None and not any("perceptual" in name for name in loss.state_dict())
    loss.load_pretrained()


def test_pixel_weight_and_pixel_weights_scale_the_nll(picture):
    plain, log = picture.loss_of(LPIPSWithDiscriminator(**SMALL, use_discriminator=False, kl_weight=0.0), 0, 0)
    double, _ = picture.loss_of(
        LPIPSWithDiscriminator(**SMALL, use_discriminator=False, kl_weight=0.0, pixelloss_weight=2.0), 0, 0
    )
    masked, masked_log = picture.loss_of(
        LPIPSWithDiscriminator(**SMALL, use_discriminator=False, kl_weight=0.0), 0, 0, weights=torch.tensor(0.5)
    )
    torch.testing.assert_close(double, 2 * plain)
    torch.testing.assert_close(masked, 0.5 * plain)
    assert masked_log["train/nll_loss"] == log["train/nll_loss"]


def test_logvar_is_fixed_unless_it_is_to_be_learned(picture):
    assert not LPIPSWithDiscriminator(**SMALL).logvar.requires_grad
    loss = LPIPSWithDiscriminator(**SMALL, learn_logvar=True, logvar_init=0.3)
    picture.loss_of(loss, 0, 0)[0].backward()
    assert loss.logvar.grad is not None and loss.logvar.shape == ()


def test_a_conditional_discriminator_wants_its_condition(picture):
    loss = LPIPSWithDiscriminator(**SMALL, disc_conditional=True, disc_in_channels=5)
    value, _ = picture.loss_of(loss, 1, 9, cond=randn(3, 2, 2, 32, 32))
    assert torch.isfinite(value)
    with pytest.raises(ValueError, match="cond is missing"):
        picture.loss_of(loss, 1, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disc_loss": "wgan"}, "'wgan': choose one of hinge, vanilla"),
        ({"perceptual_init": "none"}, "'none': choose one of pretrained, random"),
        ({"disc_start": None}, "disc_start is missing"),
        ({"disc_factor": -1.0}, "disc_factor=-1.0"),
    ],
)
def test_wrong_options_are_refused_when_building(options, message):
    with pytest.raises(ValueError, match=message):
        LPIPSWithDiscriminator(**{**SMALL, **options})


def test_another_optimizer_index_is_refused(picture):
    with pytest.raises(ValueError, match="optimizer_idx=2"):
        picture.loss_of(LPIPSWithDiscriminator(**SMALL), 2, 0)


def test_importing_the_modules_stays_cheap():
    code = (
        "import sys, ldm.modules.losses, ldm.modules.ema, ldm.modules.diffusionmodules.model, ldm.lr_scheduler;"
        "print([name for name in ('pytorch_lightning', 'torchvision', 'torchmetrics') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]"
