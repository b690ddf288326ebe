"""The adversarial and perceptual terms that the losses of KL and VQ autoencoders share."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator, VQLPIPSWithDiscriminator
from ldm.modules.losses.reconstruction import adopt_weight, hinge_d_loss, vanilla_d_loss
from tests.reference import randn, seed_weights

SMALL = {"disc_start": 5, "perceptual_weight": 0, "disc_num_layers": 1, "disc_ndf": 8}


class Autoencoder:
    """Decoder of one layer with the inputs of a loss."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.loss_class = LPIPSWithDiscriminator if kind == "kl" else VQLPIPSWithDiscriminator
        self.x = torch.tanh(randn(220, 2, 3, 32, 32))
        self.decoder = seed_weights(torch.nn.Conv2d(8, 3, 3, padding=1))
        self.h = randn(221, 2, 8, 32, 32)
        self.posterior = DiagonalGaussianDistribution(randn(222, 2, 8, 8, 8))

    def build(self, **options):
        return self.loss_class(**{**SMALL, **options})

    def call(self, loss, optimizer_idx, step, x=None, reconstruction=None, **kwargs):
        x = self.x if x is None else x
        reconstruction = self.decoder(self.h) if reconstruction is None else reconstruction
        args = (x, reconstruction, self.posterior) if self.kind == "kl" else (torch.tensor(0.37), x, reconstruction)
        return loss(*args, optimizer_idx, step, last_layer=self.decoder.weight, **kwargs)


@pytest.fixture(params=["kl", "vq"])
def auto(request) -> Autoencoder:
    return Autoencoder(request.param)


def test_discriminator_losses_are_their_formulas():
    real, fake = randn(1, 2, 1, 3, 3), randn(2, 2, 1, 3, 3)
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    torch.testing.assert_close(hinge_d_loss(real, fake), hinge)
    bce = F.binary_cross_entropy_with_logits
    vanilla = (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / 2
    torch.testing.assert_close(vanilla_d_loss(real, fake), vanilla)


def test_the_discriminator_joins_at_disc_start():
    assert [adopt_weight(0.7, step, threshold=2) for step in range(4)] == [0.0, 0.0, 0.7, 0.7]


def test_a_broken_discriminator_does_not_affect_the_generator_before_disc_start(auto):
    loss = auto.build()
    torch.nn.init.constant_(loss.discriminator.main[0].weight, float("nan"))
    before, _ = auto.call(loss, 0, 4)
    after, _ = auto.call(loss, 0, 5)
    assert torch.isfinite(before) and not torch.isfinite(after)
    before.backward()
    assert torch.isfinite(auto.decoder.weight.grad).all()


def test_the_discriminator_is_not_trained_before_disc_start(auto):
    loss = auto.build()
    before, log = auto.call(loss, 1, 4)
    assert before.item() == 0.0 and not before.requires_grad
    assert set(log) == {"train/disc_loss", "train/logits_real", "train/logits_fake"}
    after, _ = auto.call(loss, 1, 5)
    after.backward()
    assert after.item() > 0 and auto.decoder.weight.grad is None


def test_adaptive_weight_balances_the_gradients_at_the_last_layer():
    auto = Autoencoder("kl")
    loss, weight = auto.build(disc_weight=0.5), auto.decoder.weight
    reconstruction = auto.decoder(auto.h)
    nll, g = (auto.x - reconstruction).abs().sum(), -loss.logits(reconstruction, None).mean()
    norms = [torch.autograd.grad(value, weight, retain_graph=True)[0].norm() for value in (nll, g)]
    d_weight = loss.calculate_adaptive_weight(nll, g, weight)
    torch.testing.assert_close(d_weight, 0.5 * (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4))
    assert not d_weight.requires_grad
    assert auto.build().calculate_adaptive_weight(nll, 0 * nll, weight).item() == 1e4  # finite without a gradient of g
    with pytest.raises(ValueError, match="last_layer is missing"):
        loss.calculate_adaptive_weight(nll, g, None)


def test_under_autocast_and_with_half_precision_images_the_loss_is_float32(auto):
    loss = auto.build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, log = auto.call(loss, 0, 9)
        d_loss, _ = auto.call(loss, 1, 9)
    assert value.dtype == d_loss.dtype == log["train/d_weight"].dtype == torch.float32
    loss = auto.build(use_discriminator=False)
    x, reconstruction = auto.x.bfloat16(), auto.decoder(auto.h).detach().bfloat16()
    value, _ = auto.call(loss, 0, 0, x, reconstruction)
    exact, _ = auto.call(loss, 0, 0, x.float(), reconstruction.float())
    assert value.dtype == torch.float32 and torch.equal(value, exact)


def test_without_a_graph_the_adaptive_weight_is_zero(auto):
    with torch.no_grad():
        value, log = auto.call(auto.build(), 0, 9, split="val")
    assert log["val/d_weight"] == 0 and log["val/g_loss"] != 0 and torch.isfinite(value)


@pytest.mark.parametrize("off", [{"disc_factor": 0.0}, {"disc_weight": 0.0}, {"use_discriminator": False}])
def test_a_disabled_discriminator_never_runs(auto, off):
    loss = auto.build(**off)
    assert not loss.adversarial
    if loss.discriminator is not None:
        loss.discriminator.register_forward_hook(lambda *_: pytest.fail("the discriminator ran"))
    _, log = auto.call(loss, 0, 9)
    assert log["train/d_weight"] == log["train/g_loss"] == log["train/disc_factor"] == 0
    names = [name for name in loss.state_dict() if name.startswith("discriminator.")]
    assert bool(names) == ("use_discriminator" not in off)


def test_perceptual_weight_zero_builds_no_perceptual_network(auto):
    loss = auto.build()
    assert loss.perceptual_loss is None and not any("perceptual" in name for name in loss.state_dict())
    loss.load_pretrained()


def test_a_conditional_discriminator_needs_its_condition(auto):
    loss = auto.build(disc_conditional=True, disc_in_channels=5)
    value, _ = auto.call(loss, 1, 9, cond=randn(3, 2, 2, 32, 32))
    assert torch.isfinite(value)
    with pytest.raises(ValueError, match="cond is missing"):
        auto.call(loss, 1, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disc_loss": "wgan"}, "'wgan': choose one of hinge, vanilla"),
        ({"perceptual_init": "none"}, "'none': choose one of pretrained, random"),
        ({"disc_start": None}, "disc_start is missing"),
        ({"disc_factor": -1.0}, "disc_factor=-1.0"),
    ],
)
def test_invalid_options_are_errors(auto, options, message):
    with pytest.raises(ValueError, match=message):
        auto.build(**options)


def test_another_optimizer_index_is_an_error(auto):
    with pytest.raises(ValueError, match="optimizer_idx=2"):
        auto.call(auto.build(), 2, 0)


def test_importing_the_losses_and_networks_imports_no_heavy_library():
    code = (
        "import sys, ldm.modules.losses, ldm.modules.ema, ldm.modules.diffusionmodules.model, ldm.lr_scheduler;"
        "print([name for name in ('pytorch_lightning', 'torchvision', 'torchmetrics') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]"
