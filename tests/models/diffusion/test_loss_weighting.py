"""Laws of the loss: the published values, and how another weighting takes its place."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from ldm.config import instantiate
from ldm.models.diffusion.loss_weighting import LossWeighting
from tests.models.diffusion.tiny import ATTEND, CLASSES, batch, fit, latent_diffusion
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error

LOSSES = np.load(GOLDEN / "numerics" / "losses.npz")
CASES = {
    "crossattn": {},
    "crossattn_l1_elbo": {"loss_type": "l1", "original_elbo_weight": 0.1, "l_simple_weight": 0.9},
    "crossattn_x0": {"parameterization": "x0"},
    "crossattn_logvar": {"learn_logvar": True, "logvar_init": 0.3},
    "concat": {"concat_mode": True},
}


@pytest.mark.parametrize("name", CASES)
def test_losses_have_the_published_values(name):
    if name == "concat":
        model = latent_diffusion("concat", {"in_channels": 8}, "__is_first_stage__", **CASES[name])
    else:
        model = latent_diffusion("crossattn", ATTEND, CLASSES, **CASES[name])
    z, noise, t = randn(210, 2, 4, 8, 8), randn(211, 2, 4, 8, 8), torch.tensor([13, 777])
    condition = randn(213, 2, 4, 8, 8) if name == "concat" else randn(212, 2, 1, 16)
    for split in ("train", "val"):
        model.train(split == "train")
        loss, logs = model.p_losses(z, condition, t, noise=noise)
        assert rel_error(loss, LOSSES[f"{name}_{split}_loss"]) < TOLERANCE
        for part in ("loss_simple", "loss_vlb", "loss"):
            assert rel_error(logs[f"{split}/{part}"], LOSSES[f"{name}|{split}/{part}"]) < TOLERANCE
        assert ({f"{split}/loss_gamma", "logvar"} <= set(logs)) == (name == "crossattn_logvar")


def test_learned_logvar_is_trained_and_saved_under_its_published_name():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, cond_stage_key="class_label", learn_logvar=True)
    before = model.logvar.detach().clone()
    fit(model, steps=1)
    assert not torch.equal(model.logvar, before) and "logvar" in model.state_dict()


class WithLearnedScale(LossWeighting):
    """A weighting from another package: weights by the signal-to-noise ratio, times a trained scale."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit, self.scale = limit, nn.Parameter(torch.ones(()))

    def forward(self, errors, t, diffusion):
        snr = diffusion.log_snr(t).exp().clamp(max=self.limit)
        return (self.scale * snr * errors).mean(), {"snr": snr.mean()}


def test_another_weighting_is_one_class_named_in_the_config(monkeypatch):
    monkeypatch.setattr(instantiate, "_user_prefixes", [__name__])
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    config = {"target": f"{__name__}.WithLearnedScale", "params": {"limit": 5.0}}
    options = {"cond_stage_key": "class_label", "parameterization": "v", "loss_weighting_config": config}
    model = latent_diffusion("crossattn", ATTEND, CLASSES, **options)
    with torch.no_grad():
        model.loss_weighting.scale.fill_(2.0)
    t, errors = torch.tensor([1, 900]), torch.tensor([3.0, 5.0])
    acp = model.alphas_cumprod[t]
    loss, _ = model.loss_weighting(errors, t, model)
    torch.testing.assert_close(loss, (2.0 * (acp / (1 - acp)).clamp(max=5.0) * errors).mean())
    trainer = fit(model, steps=1)
    assert {"train/snr", "train/loss", "val/snr"} <= set(trainer.callback_metrics)
    assert model.loss_weighting.scale != 2.0 and "loss_weighting.scale" in model.state_dict()
    assert torch.isfinite(model.eval().shared_step(batch())[0])


def test_arguments_of_the_published_loss_are_refused_beside_another_weighting():
    config = {"target": "ldm.models.diffusion.loss_weighting.SimpleLossWeighting"}
    for name, value in {"l_simple_weight": 0.5, "original_elbo_weight": 0.1, "learn_logvar": True}.items():
        with pytest.raises(ValueError, match=f"{name} {value}: .*remove it or loss_weighting_config"):
            latent_diffusion("crossattn", ATTEND, CLASSES, loss_weighting_config=config, **{name: value})


def test_loss_weights_of_a_batch_are_factors_of_its_samples_errors():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, cond_stage_key="class_label")
    samples = batch()
    losses = []
    for weights in (None, [1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.5, 3.0]):
        given = {} if weights is None else {"loss_weight": torch.tensor(weights)}
        torch.manual_seed(4)
        losses.append(model.shared_step({**{key: value[:2] for key, value in samples.items()}, **given})[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    torch.testing.assert_close(losses[2] + losses[3], losses[0])
    torch.testing.assert_close(0.5 * losses[2] + 3.0 * losses[3], losses[4])
