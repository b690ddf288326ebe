"""Laws of the classifier of noisy latents and of guidance by it."""

import contextlib

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import write_weights
from ldm.models.diffusion.classifier import ClassifierGuidance, top_k_accuracy
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from ldm.util import instantiate_from_config
from tests.models.diffusion.modes import MODES
from tests.models.diffusion.samplers.toy import GaussianModel
from tests.models.diffusion.tiny import ATTEND, AUTOENCODER, CLASSES, batch, fit, unet
from tests.reference import randn, seed_weights


def diffusion_config(mode="class"):
    key, changes, cond, params = {"class": ("crossattn", ATTEND, CLASSES, {"cond_stage_key": "class_label"}), **MODES}[
        mode
    ]
    network = unet(**{**changes, "num_heads": -1, "num_head_channels": 16})
    base = {
        "conditioning_key": key,
        "timesteps": 100,
        "image_size": 8,
        "channels": 4,
        "scale_factor": 0.5,
        "use_ema": False,
    }
    stages = {"unet_config": network, "first_stage_config": AUTOENCODER, "cond_stage_config": cond}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**base, **stages, **params}}}


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """The folder of a run of a diffusion model: project YAML and checkpoint."""
    folder = tmp_path_factory.mktemp("diffusion")
    (folder / "configs").mkdir()
    (folder / "checkpoints").mkdir()
    OmegaConf.save(OmegaConf.create(diffusion_config()), folder / "configs" / "2026-01-01T00-00-00-project.yaml")
    model = seed_weights(instantiate_from_config(OmegaConf.create(diffusion_config()["model"])))
    write_weights(model.state_dict(), folder / "checkpoints" / "last.ckpt")
    return folder


def classifier(path, **changes):
    params = {"diffusion_path": str(path), "num_classes": 8, "log_steps": 2, **changes}
    torch.manual_seed(0)
    return instantiate_from_config(
        {"target": "ldm.models.diffusion.classifier.NoisyLatentImageClassifier", "params": params}
    )


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial_v2"])
def test_it_trains_validates_and_logs_images_and_leaves_the_diffusion_model_alone(diffusion, pool):
    model = classifier(diffusion, pool=pool)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(model, batch_size=4)
    assert trainer.global_step == 2
    assert all(
        trainer.callback_metrics[name].isfinite() for name in ("val/loss", "val/acc@1", "val/acc@5", "val/acc@1_t0050")
    )
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("model.") for name in moved)
    log = model.eval().log_images(batch(4), N=2)
    assert set(log) == {"inputs", "noisy", "labels", "predictions"} and all(
        torch.isfinite(image).all() for image in log.values()
    )


def test_a_run_folder_gives_the_weights_of_the_diffusion_model(diffusion):
    model = classifier(diffusion)
    wanted = seed_weights(instantiate_from_config(OmegaConf.create(diffusion_config()["model"])))
    name = "first_stage_model.encoder.conv_in.weight"
    assert torch.equal(model.diffusion_model.state_dict()[name], wanted.state_dict()[name])
    assert model.label_key == "class_label" and model.model.out_channels == 8


@pytest.mark.parametrize("place", ["a run's folder", "a file of weights", "its own file", "nowhere"])
def test_a_random_first_stage_is_refused(diffusion, tmp_path, place):
    yaml, weights = next(diffusion.glob("configs/*.yaml")), diffusion / "checkpoints" / "last.ckpt"
    if place == "its own file":
        write_weights(classifier(diffusion).state_dict(), tmp_path / "classifier.ckpt")
    model = {
        "a run's folder": lambda: classifier(diffusion),
        "a file of weights": lambda: classifier(yaml, diffusion_ckpt_path=str(weights)),
        "its own file": lambda: classifier(yaml, ckpt_path=str(tmp_path / "classifier.ckpt")),
        "nowhere": lambda: classifier(yaml),
    }[place]()
    refused = pytest.raises(ValueError, match=r"random weights .*: set model.params.diffusion_path")
    with refused if place == "nowhere" else contextlib.nullcontext():
        model.on_fit_start()


def test_validation_encodes_a_batch_once_whatever_the_number_of_noise_levels(diffusion, monkeypatch):
    model, encoded, levels = classifier(diffusion, log_steps=5), [], []
    get_latents, losses = model.get_latents, model.losses
    monkeypatch.setattr(model, "get_latents", lambda batch: encoded.append(0) or get_latents(batch))
    monkeypatch.setattr(model, "losses", lambda x, labels, t: levels.append(t.tolist()) or losses(x, labels, t))
    monkeypatch.setattr(model, "log_dict", lambda *_, **__: None)
    model.eval().validation_step(batch(4), 0)
    assert len(encoded) == 1 and levels[1:] == [[t] * 4 for t in (0, 20, 40, 60, 80)]


def test_the_diffusion_model_stays_frozen_and_in_evaluation_mode(diffusion):
    model = classifier(diffusion).train()
    assert model.model.training and not any(module.training for module in model.diffusion_model.modules())
    assert not any(p.requires_grad for p in model.diffusion_model.parameters())


def test_it_learns_what_it_is_shown(diffusion):
    model = classifier(diffusion, pool="spatial_v2")
    data = batch(8)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-3)
    model.train()
    torch.manual_seed(0)
    losses = []
    for _ in range(18):
        loss, _ = model.shared_step(data, torch.zeros(8, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_segmentation_maps_are_labels_of_every_latent_pixel(tmp_path):
    config = diffusion_config("segmentation")
    config["model"]["params"]["untrained_first_stage"] = True
    OmegaConf.save(OmegaConf.create(config), tmp_path / "model.yaml")
    model = classifier(tmp_path / "model.yaml", num_classes=5)
    data = batch(4)
    labels = model.get_labels(data, (8, 8))
    assert labels.shape == (4, 8, 8) and torch.equal(labels, data["segmentation"].argmax(-1)[:, ::4, ::4])
    trainer = fit(model, batch_size=4)
    assert trainer.callback_metrics["val/acc@1"].isfinite()
    assert model.eval().log_images(data, N=2)["labels"].shape == (2, 3, 8, 8)


def test_accuracy_counts_the_best_k():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.1, 0.3]])
    assert (
        float(top_k_accuracy(scores, torch.tensor([2, 0]), 1)) == 0.5
        and float(top_k_accuracy(scores, torch.tensor([2, 0]), 2)) == 1.0
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_classes": 3}, "labels from 0 to 7, but num_classes is 3"),
        ({"label_key": "label"}, "the batch has no 'label'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(diffusion, changes, message):
    model = classifier(diffusion, **changes)
    with pytest.raises(ValueError, match=message):
        model.shared_step(batch(8))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"diffusion_path": "nowhere"}, "expected a YAML file or a run folder"),
        ({"log_steps": 101}, "log_steps 101: choose 1 to 100"),
    ],
)
def test_wrong_settings_are_refused(diffusion, changes, message):
    with pytest.raises(ValueError, match=message):
        classifier(diffusion, **changes)


# ------------------------------------------------------------------------------------------------------------ guidance


def alphas_at(model, t):
    """Products of (1 - beta) at t (B,), whole or between two timesteps, (B, 1, 1, 1)."""
    position = t.float()
    low = position.floor().long()
    log_alpha = model.alphas_cumprod.log()
    high = (low + 1).clamp(max=len(log_alpha) - 1)
    return torch.lerp(log_alpha[low], log_alpha[high], position - low).exp()[:, None, None, None]


class TwoGaussians:
    """Exact p(label | x_t) of two equal classes N(-1, s^2) and N(+1, s^2), for each value by itself."""

    def __init__(self, model, std=0.3):
        self.model, self.std = model, std

    def __call__(self, x, t):
        alpha2 = alphas_at(self.model, t)
        variance = alpha2 * self.std**2 + 1 - alpha2
        logit = 2 * alpha2.sqrt() * x / variance  # log N(x; alpha, v) - log N(x; -alpha, v)
        return torch.stack([torch.zeros_like(logit), logit], dim=1)[:, :, 0]  # (B, 2, H, W) of one channel


class Mixture(GaussianModel):
    """The exact denoiser of both classes together."""

    def apply_model(self, x, t, c):
        low, high = (GaussianModel(self.parameterization, mean, 0.3).apply_model(x, t, None) for mean in (-1.0, 1.0))
        alpha2 = alphas_at(self, t)
        share = torch.sigmoid(2 * alpha2.sqrt() * x / (alpha2 * 0.3**2 + 1 - alpha2))
        return torch.lerp(low, high, share)


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_by_an_exact_classifier_turns_the_mixture_into_the_class(name, parameterization):
    model = Mixture(parameterization)
    labels = torch.ones(4, 16, 16, dtype=torch.long)
    options = {
        "x_T": randn(3, 4, 1, 16, 16),
        "ddim_discretize": "logsnr" if "logsnr" in SAMPLERS[name].spacings else "uniform",
    }

    def sample(**kwargs):
        torch.manual_seed(0)
        return (
            make_sampler(name, model)
            .sample(40, 4, (1, 16, 16), torch.zeros(4), verbose=False, **options, **kwargs)
            .samples
        )

    plain = sample()
    assert abs(float(plain.mean())) < 0.15 and float(plain.std()) > 0.9
    guided = sample(score_corrector=ClassifierGuidance(TwoGaussians(model), labels, 1.0))
    least = 0.15 if name == "lcm" else 0.24  # lcm contracts with a denoiser that is no consistency model
    assert abs(float(guided.mean()) - 1.0) < 0.1 and least < float(guided.std()) < 0.36


def test_the_gradient_is_that_of_the_chosen_label():
    model = Mixture()
    x, t = randn(5, 2, 1, 4, 4), torch.tensor([100, 700])
    guidance = ClassifierGuidance(TwoGaussians(model), torch.stack([torch.ones(4, 4), torch.zeros(4, 4)]).long())
    alpha2 = model.alphas_cumprod[t][:, None, None, None]
    slope = 2 * alpha2.sqrt() / (alpha2 * 0.09 + 1 - alpha2)
    p = torch.sigmoid(slope * x)
    wanted = torch.stack([(slope * (1 - p))[0], (-slope * p)[1]])
    with torch.no_grad():
        assert torch.allclose(guidance.gradient(x, t), wanted, atol=1e-5)
        eps = guidance.modify_score(model, torch.zeros_like(x), x, t)
    assert torch.allclose(eps, -(1 - alpha2).sqrt() * wanted, atol=1e-5)


def test_a_scale_of_zero_changes_nothing_and_labels_must_fit():
    guidance = ClassifierGuidance(None, torch.zeros(2, dtype=torch.long), 0.0)
    x = randn(1, 2, 1, 4, 4)
    assert guidance.modify_score(Mixture(), x, x, torch.tensor([1, 2])) is x
    with pytest.raises(ValueError, match="2 labels for 3 samples"):
        guidance.modify_score(Mixture(), x, randn(1, 3, 1, 4, 4), torch.tensor([1, 2, 3]))


def test_a_trained_classifier_guides_a_latent_diffusion_model_next_to_classifier_free_guidance(diffusion):
    model = classifier(diffusion).eval()
    seed_weights(model.model)
    z = model.diffusion_model
    cond, null = (z.get_learned_conditioning({"class_label": torch.full((2,), label)}) for label in (3, 9))
    guidance = ClassifierGuidance(model, torch.tensor([1, 7]), 5.0)

    def sample(**kwargs):
        both = {"unconditional_guidance_scale": 2.0, "unconditional_conditioning": null}
        return (
            DDIMSampler(z)
            .sample(4, 2, (4, 8, 8), cond, x_T=randn(1, 2, 4, 8, 8), verbose=False, **both, **kwargs)
            .samples
        )

    plain, guided = sample(), sample(score_corrector=guidance)
    t = torch.zeros(2, dtype=torch.long)

    def log_p(x):
        return model(x, t).log_softmax(1).gather(1, guidance.labels[:, None]).mean()

    assert torch.isfinite(guided).all() and log_p(guided) > log_p(plain)
