"""Laws of the loss: the published values, and how another weighting takes its place."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from ldm.config import instantiate
from ldm.models.diffusion.gaussian_diffusion import GaussianDiffusion
from ldm.models.diffusion.loss_weighting import (
    ELBOWeighting,
    LearnedLogVariance,
    LossWeighting,
    MinSNRWeighting,
    P2Weighting,
    SimpleLossWeighting,
    SoftMinSNRWeighting,
)
from tests.models.diffusion.tiny import ATTEND, CLASSES, EVERYWHERE, batch, fit, latent_diffusion
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
        model = latent_diffusion("concat", {"in_channels": 8, **EVERYWHERE}, "__is_first_stage__", **CASES[name])
    else:
        model = latent_diffusion("crossattn", {**ATTEND, **EVERYWHERE}, CLASSES, **CASES[name])
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


def diffusion(parameterization, timesteps=50, **schedule):
    """Tables of a noise schedule without a network."""
    tables = GaussianDiffusion()
    tables.parameterization, tables.v_posterior = parameterization, 0.0
    tables.register_schedule(timesteps=timesteps, linear_start=0.002, linear_end=0.3, **schedule)
    tables.register_buffer("logvar", torch.zeros(timesteps))
    return tables


def weights_of(weighting, tables):
    """Factors of the errors at all timesteps, from the gradient of the loss, (T,) float64."""
    errors = torch.ones(tables.num_timesteps, requires_grad=True)
    weighting(errors, torch.arange(len(errors)), tables)[0].backward()
    return len(errors) * errors.grad.double()


def snr_of(tables):
    """SNR before and at each timestep, float64, from the betas."""
    acp = (1 - tables.betas.double()).cumprod(0)
    snr = acp / (1 - acp)
    return torch.cat([snr.new_full((1,), torch.inf), snr[:-1]]), snr


CLOSED_FORMS = {
    "uniform": (SimpleLossWeighting(), lambda s: s**0, lambda s: s**0, lambda s: s**0),
    "min-SNR": (
        MinSNRWeighting(5.0),
        lambda s: s.clamp(max=5) / s,
        lambda s: s.clamp(max=5),
        lambda s: s.clamp(max=5) / (s + 1),
    ),
    "soft-min-SNR": (
        SoftMinSNRWeighting(3.0),
        lambda s: 3 / (s + 3),
        lambda s: 3 * s / (s + 3),
        lambda s: 3 * s / (s + 3) / (s + 1),
    ),
    "P2": (
        P2Weighting(gamma=0.5, k=2.0),
        lambda s: (2 + s) ** -0.5,
        lambda s: s * (2 + s) ** -0.5,
        lambda s: s / (s + 1) * (2 + s) ** -0.5,
    ),
}


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_weights_of_the_snr_have_their_closed_forms(name, parameterization):
    weighting, *forms = CLOSED_FORMS[name]
    tables = diffusion(parameterization)
    wanted = forms[("eps", "x0", "v").index(parameterization)](snr_of(tables)[1])
    torch.testing.assert_close(weights_of(weighting, tables), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_the_elbo_weights_are_differences_of_the_snr(parameterization):
    tables = diffusion(parameterization)
    before, snr = snr_of(tables)
    per_x0 = {"eps": snr, "x0": 1.0, "v": snr + 1}[parameterization]
    wanted = 50 / 2 * (before - snr) / per_x0  # VDM, the discrete-time loss
    wanted[0] = (50 / 2 / tables.betas[0].double() / per_x0)[0] if parameterization != "x0" else 25 / tables.betas[0]
    found = weights_of(ELBOWeighting(), tables)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    if parameterization == "eps":  # the published weights, DDPM eq. 12
        torch.testing.assert_close(found[1:], 50 * tables.lvlb_weights[1:].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "weighting", [ELBOWeighting, MinSNRWeighting, SoftMinSNRWeighting, P2Weighting, LearnedLogVariance]
)
@pytest.mark.parametrize(
    "parameterization, schedule",
    [
        ("x0", {"zero_terminal_snr": True}),
        ("v", {"zero_terminal_snr": True}),
        ("eps", {"given_betas": [1e-9] * 25 + [0.99] * 25}),
    ],
)
def test_no_weight_is_infinite_or_nan_at_the_ends_of_the_schedule(weighting, parameterization, schedule):
    tables, module = diffusion(parameterization, **schedule), weighting()
    assert float(tables.alphas_cumprod[-1]) == 0.0
    weights = weights_of(module, tables)
    assert weights.isfinite().all() and (weights >= 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    if weighting in (MinSNRWeighting, SoftMinSNRWeighting):
        assert abs(float(weights[-1]) - (parameterization == "eps")) < 1e-6


def test_a_learned_log_variance_weighs_all_noise_levels_alike_at_its_optimum():
    weighting, tables, t = LearnedLogVariance(), diffusion("eps"), torch.arange(50)
    errors = 0.01 + torch.linspace(1, 0, 50) ** 2  # of eps, small at much noise
    loss, _ = weighting(errors, t, tables)
    torch.testing.assert_close(loss, errors.mean())  # uniform at first
    optimizer = torch.optim.LBFGS(weighting.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss, _ = weighting(errors, t, tables)
        loss.backward()
        return loss

    optimizer.step(closure)
    u = weighting.log_variance(t, tables)
    assert (u - errors.log()).abs().max() < 0.1
    assert (weights_of(weighting, tables) * errors - 1).abs().max() < 0.1
    torch.testing.assert_close(weighting(errors, t, tables)[0], 1 + errors.log().mean(), atol=0.01, rtol=0)


def test_samples_with_an_empty_mask_or_without_weight_do_not_train_a_log_variance():
    tables = diffusion("eps")
    del tables.logvar
    tables.logvar = torch.nn.Parameter(torch.zeros(50))
    for weighting in (LearnedLogVariance(), SimpleLossWeighting(learn_logvar=True)):
        parameter = weighting.linear.bias if isinstance(weighting, LearnedLogVariance) else tables.logvar
        for errors, trained in (([0.0, 0.0], False), ([0.0, 2.0], True)):
            loss, _ = weighting(torch.tensor(errors), torch.tensor([3, 7]), tables)
            (gradient,) = torch.autograd.grad(loss, parameter)
            assert bool(gradient.any()) == trained and (len(gradient) == 1 or not gradient[3])


def test_a_learned_log_variance_is_trained_and_saved_with_the_model():
    config = {"target": "ldm.models.diffusion.loss_weighting.LearnedLogVariance", "params": {"channels": 8}}
    model = latent_diffusion("crossattn", ATTEND, CLASSES, cond_stage_key="class_label", loss_weighting_config=config)
    keys = {f"loss_weighting.{name}" for name in ("frequencies", "phases", "linear.weight", "linear.bias")}
    assert keys <= set(model.state_dict())
    before = model.loss_weighting.linear.weight.detach().clone()
    trainer = fit(model, steps=1)
    assert not torch.equal(model.loss_weighting.linear.weight, before) and "train/logvar" in trainer.callback_metrics


@pytest.mark.parametrize(
    "options, line",
    [
        ({}, "eps, l2"),
        (
            {"learn_logvar": True, "loss_type": "pseudo_huber"},
            "eps, pseudo_huber (c 0.1), SimpleLossWeighting(learn_logvar)",
        ),
        (
            {
                "parameterization": "v",
                "loss_weighting_config": {"target": "ldm.models.diffusion.loss_weighting.MinSNRWeighting"},
                "noise_config": {"params": {"offset_strength": 0.1}},  # its class is the only one
                "timestep_config": {
                    "target": "ldm.models.diffusion.timesteps.LogitNormalTimesteps",
                    "params": {"std": 2.0, "low_discrepancy": True},
                },
            },
            "v, l2, MinSNRWeighting(gamma 5.0), TrainingNoise(offset_strength 0.1), "
            "LogitNormalTimesteps(mean 0.0, std 2.0, low_discrepancy)",
        ),
    ],
)
def test_the_objective_is_described_with_what_differs_from_the_published_one(options, line):
    assert latent_diffusion("crossattn", ATTEND, CLASSES, **options).describe_objective() == line


@pytest.mark.parametrize("section", ["loss_weighting_config", "noise_config", "timestep_config"])
def test_a_section_of_another_kind_of_class_is_refused_with_the_choices(section):
    with pytest.raises(ValueError, match=f"{section}.target torch.nn.Identity: expected .* such as ldm.models"):
        latent_diffusion("crossattn", ATTEND, CLASSES, **{section: {"target": "torch.nn.Identity"}})
