"""Laws of DDPM and LatentDiffusion in training and sampling, and the published values."""

import copy
import gzip
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from ldm.config.instantiate import ALIASES, ConfigError
from ldm.models.diffusion import ddpm
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.models.diffusion.modes import IDENTITY
from tests.models.diffusion.tiny import (
    ATTEND,
    AUTOENCODER,
    CAPTIONS,
    CLASSES,
    EVERYWHERE,
    QUIET,
    batch,
    fit,
    latent_diffusion,
    loader,
    unet,
)
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error, seed_weights

CLASS = {"cond_stage_key": "class_label"}
DDCONFIG = AUTOENCODER["params"]["ddconfig"]


def pixel_model(**changes):
    params = {
        "unet_config": unet(in_channels=3, out_channels=3),
        "timesteps": 30,
        "image_size": 8,
        "channels": 3,
        "use_ema": False,
    }
    config = {"target": "ldm.models.diffusion.ddpm.DDPM", "params": params | changes}
    return seed_weights(instantiate_from_config(config))


@pytest.fixture(scope="module")
def model():
    """A class-conditional model that no test trains."""
    return latent_diffusion("crossattn", ATTEND, CLASSES, use_ema=True, timesteps=3, **CLASS).eval()


def test_a_small_model_end_to_end_has_the_published_values():
    reference = np.load(GOLDEN / "numerics" / "latent_diffusion.npz")
    stage = {**AUTOENCODER, "params": {**AUTOENCODER["params"], "ddconfig": {**DDCONFIG, "ch_mult": [1, 2, 4]}}}
    model = latent_diffusion("crossattn", {**ATTEND, **EVERYWHERE}, CLASSES, first_stage_config=stage)
    posterior = model.encode_first_stage(torch.tanh(randn(214, 2, 3, 32, 32)))
    cond = model.get_learned_conditioning({"class_label": torch.tensor([1, 7])})
    y, _ = DDIMSampler(model).sample(
        S=5, batch_size=2, shape=(4, 8, 8), conditioning=cond, x_T=randn(215, 2, 4, 8, 8), verbose=False
    )
    outs = {
        "posterior": posterior.parameters,
        "latent": model.scale_factor * posterior.mode(),
        "conditioning": cond,
        "sample": y,
        "decoded": model.decode_first_stage(y),
    }
    assert {name: rel_error(out, reference[name]) < TOLERANCE for name, out in outs.items()} == dict.fromkeys(
        outs, True
    )


def test_ancestral_samples_have_the_published_values():
    model = pixel_model(unet_config=unet(in_channels=3, out_channels=3, **EVERYWHERE))
    torch.manual_seed(7)
    reference = np.load(GOLDEN / "numerics" / "ddpm_ancestral.npz")["sample"]
    assert rel_error(model.sample(batch_size=2), reference) < TOLERANCE


def test_stable_diffusion_v1_has_the_published_names_and_shapes():
    content = gzip.decompress((GOLDEN / "manifests" / "stable-diffusion-v1.json.gz").read_bytes())
    (name, wanted), *_ = json.loads(content).items()
    with torch.device("meta"):
        model = instantiate_from_config(OmegaConf.load(name).model)
    have = {key: list(value.shape) for key, value in model.state_dict().items()}
    for names in (wanted, have):  # an index that some versions of transformers saved
        names.pop("cond_stage_model.transformer.text_model.embeddings.position_ids", None)
    assert have == wanted


@pytest.mark.parametrize("name", [name for name in ALIASES if ".ddpm." in name])
def test_the_published_variants_are_attributes_of_the_module(name):
    cls = getattr(ddpm, name.rpartition(".")[2])
    assert issubclass(cls, ddpm.LatentDiffusion) and get_obj_from_str(name) is cls
    assert cls.__module__ != "ldm.models.diffusion.ddpm"


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'LatentDifusion'"):
        _ = ddpm.LatentDifusion
    with pytest.raises(ConfigError, match="did you mean 'LatentDiffusion'"):
        get_obj_from_str("ldm.models.diffusion.ddpm.LatentDifusion")


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("build", [pixel_model, lambda **c: latent_diffusion(None, {}, "__is_unconditional__", **c)])
def test_an_unconditional_model_trains_its_network_alone_and_logs_images(build):
    torch.manual_seed(0)
    model = build(use_ema=True, timesteps=30, log_every_t=10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(model)
    assert trainer.global_step == 2 and trainer.callback_metrics["val/loss_simple_ema"].isfinite()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("model.") for name in moved)
    assert {"inputs", "samples", "denoise_row", "diffusion_row"} <= set(model.eval().log_images(batch(), N=2))


def test_validation_compares_raw_and_averaged_weights_under_the_same_noise_each_time(model):
    for name, parameter in model.model.named_parameters():  # equal weights: only other noise could change the loss
        getattr(model.model_ema, name.replace(".", "")).copy_(parameter.detach())
    logged = []
    model.log_validation = lambda logs, size: logged.append(logs)
    for number in (3, 3, 4):
        model.validation_step(batch(), number)
    first, again, other = logged
    raw = [name for name in first if not name.endswith("_ema")]
    assert raw and all(first[name] == first[f"{name}_ema"] == again[name] for name in raw)
    assert first["val/loss"] != other["val/loss"]


def test_num_timesteps_cond_noises_the_condition_on_its_own_schedule():
    model = latent_diffusion(
        "concat", {"in_channels": 7}, IDENTITY, cond_stage_key="LR_image", timesteps=100, num_timesteps_cond=5
    )
    assert model.cond_ids.tolist() == [0, 25, 50, 74, 99] + [99] * 95 and "cond_ids" not in model.state_dict()
    z, c = model.get_input(batch(), "image")
    seen = []
    model.p_losses = lambda z, c, t: seen.append((c, t))
    torch.manual_seed(5)
    model(z, c)
    torch.manual_seed(5)
    t = model.random_timesteps(2)
    noised = model.q_sample(c, model.cond_ids[t], torch.randn_like(c))
    assert torch.equal(seen[0][1], t) and torch.equal(seen[0][0], noised) and not torch.equal(noised, c)
    for value in (0, 101):
        with pytest.raises(ValueError, match=f"num_timesteps_cond {value}: "):
            latent_diffusion("crossattn", ATTEND, CLASSES, timesteps=100, num_timesteps_cond=value)


def test_the_first_stage_trains_nothing_and_stays_in_eval_mode(model):
    model.train()
    assert model.model.training
    for stage in (model.first_stage_model, model.cond_stage_model):
        assert not any(module.training for module in stage.modules())
    assert all(name.startswith("model.") for name, p in model.named_parameters() if p.requires_grad)
    model.eval()


def test_a_first_stage_is_untrained_until_its_own_weights_are_loaded_however_they_come():
    stage = instantiate_from_config(AUTOENCODER)
    parent = torch.nn.ModuleDict({"first_stage_model": stage, "other": torch.nn.Linear(2, 2)})
    every = stage.untrained_weights()
    assert len(every) > 20 and copy.deepcopy(stage).double().untrained_weights() == every
    parent.other.load_state_dict(parent.other.state_dict())
    parent.load_state_dict({"other.weight": torch.ones(2, 2)}, strict=False)
    assert stage.untrained_weights() == every
    stage.encoder.load_state_dict(stage.encoder.state_dict())
    assert stage.untrained_weights() == [name for name in every if not name.startswith("encoder.")]
    stage.load_state_dict(instantiate_from_config(AUTOENCODER).state_dict(), assign=True)
    assert stage.untrained_weights() == []


def test_training_on_an_untrained_first_stage_is_refused_before_the_first_step_unless_meant():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, **CLASS)
    model.first_stage_model = instantiate_from_config(AUTOENCODER)
    with pytest.raises(ValueError, match=r"first stage has random weights .*first_stage_config.params.ckpt_path"):
        fit(model)
    assert model.global_step == 0
    model.untrained_first_stage = True
    fit(model, steps=1)
    model = latent_diffusion("crossattn", ATTEND, CLASSES, **CLASS)
    stage = instantiate_from_config(AUTOENCODER)
    stage.load_state_dict(model.first_stage_model.state_dict())
    model.first_stage_model = stage
    fit(model, steps=1)


def test_a_resumed_run_has_the_first_stage_of_its_checkpoint(tmp_path):
    model = latent_diffusion("crossattn", ATTEND, CLASSES, **CLASS)
    fit(model, steps=1).save_checkpoint(tmp_path / "1.ckpt")
    resumed = latent_diffusion("crossattn", ATTEND, CLASSES, **CLASS)
    resumed.first_stage_model = instantiate_from_config(AUTOENCODER).requires_grad_(False)  # its own file is gone
    resumed.learning_rate = 1e-3
    trainer = pl.Trainer(**QUIET, max_steps=2, limit_val_batches=0)
    trainer.fit(resumed.train(), loader(2), ckpt_path=tmp_path / "1.ckpt", weights_only=True)
    assert trainer.global_step == 2
    wanted = model.first_stage_model.state_dict()
    assert all(torch.equal(x, wanted[key]) for key, x in resumed.first_stage_model.state_dict().items())


def test_a_trained_encoder_is_an_optimizers_too():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, cond_stage_trainable=True, learn_logvar=True)
    stages = [*model.model.parameters(), *model.cond_stage_model.parameters(), model.logvar]
    assert [id(p) for p in model.trainable_parameters()] == [id(p) for p in stages]  # the published order


# -------------------------------------------------------------------------------------------------------------- batches


def test_the_published_input_is_a_list_to_unpack(model):
    z, c = model.get_input(batch(), "image")
    assert z.shape == (2, 4, 8, 8) and c.shape == (2, 1, 16)
    out = model.get_input(batch(4), "image", return_first_stage_outputs=True, return_original_cond=True, bs=3)
    z, c, x, reconstruction, raw = out
    assert isinstance(out, list)
    assert len(z) == len(c) == len(x) == len(reconstruction) == len(raw["class_label"]) == 3


def test_a_batch_without_the_key_names_those_that_it_has(model):
    message = r"no 'jpg', it has LR_image, caption, .*: set first_stage_key or .*, or let the dataset return 'jpg'"
    with pytest.raises(ValueError, match=message):
        model.get_input(batch(), "jpg")


def test_a_checkpoint_records_the_condition_dropout():
    content = {}
    latent_diffusion("crossattn", ATTEND, CLASSES, cond_dropout=0.1).on_save_checkpoint(content)
    assert content["latent_diffusion"] == {
        "cond_dropout": 0.1,
        "parameterization": "eps",
        "conditioning_key": "crossattn",
        "scale_factor": 0.18215,
    }


def test_an_absent_conditioning_key_follows_concat_mode():
    def key(cond, unet_changes, **changes):
        return latent_diffusion(None, unet_changes, cond, **changes).model.conditioning_key

    assert key(CLASSES, ATTEND, concat_mode=False) == "crossattn"
    assert key(IDENTITY, {"in_channels": 8}) == "concat"
    assert key("__is_unconditional__", {}) is None


# ------------------------------------------------------------------------------------------------------------- sampling


def test_the_ancestral_sampler_takes_the_first_conditions_and_refuses_too_few(model):
    x, _ = model.sample_log(randn(0, 4, 1, 16), 2, ddim=False, ddim_steps=None)
    assert x.shape == (2, 4, 8, 8)
    assert model.sample_log(randn(0, 2, 1, 16), 2, ddim=True, ddim_steps=2)[0].shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="condition is for 2 samples, batch_size is 16"):
        model.sample(randn(0, 2, 1, 16))
    with pytest.raises(ValueError, match="timesteps 4: choose 0 to 3"):
        model.sample(batch_size=2, timesteps=4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parameterization": "score"}, "choose one of eps, x0, v"),
        ({"loss_type": "l3"}, "expected one of l1, l2, pseudo_huber"),
        ({"cond_dropout": 1.5}, r"cond_dropout 1.5: expected a number in \[0, 1\)"),
        ({"scale_by_std": True}, "scale_by_std measures it"),
        ({"beta_schedule": "exponential"}, "choose one of linear"),
        ({"cond_dropot": 0.1}, "did you mean 'cond_dropout'"),
        ({"use_positional_encodings": True}, "not supported"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        latent_diffusion("crossattn", ATTEND, CAPTIONS, **changes)


# -------------------------------------------------------------------------------------------- loss types, masked loss


@pytest.mark.parametrize("c", [0.001, 0.1, 30.0])
def test_pseudo_huber_has_its_closed_form_between_l1_and_l2(c):
    model = pixel_model(loss_type="pseudo_huber", huber_c=c)
    pred, target = randn(1, 2, 3, 4, 4), randn(2, 2, 3, 4, 4)
    d = (pred - target).double()
    found = model.get_loss(pred, target, mean=False)
    torch.testing.assert_close(found.double(), 2 * c * ((d**2 + c**2).sqrt() - c), rtol=1e-4, atol=1e-7)
    assert torch.equal(model.get_loss(pred, target), found.mean())
    if c > 1:
        torch.testing.assert_close(found.double(), d**2, rtol=0.02, atol=0)
    if c < 0.01:
        torch.testing.assert_close(found.double(), 2 * c * d.abs(), rtol=0.02, atol=2 * c**2)


def test_huber_c_of_another_loss_is_refused():
    with pytest.raises(ValueError, match=r"huber_c 0.2: loss_type l1 does not use it"):
        pixel_model(loss_type="l1", huber_c=0.2)


def test_a_masked_loss_is_the_mean_over_the_mask_averaged_to_the_latents_size():
    errors = randn(3, 2, 4, 8, 8).square()
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, :16] = 1.0  # the upper half
    mask[1, :, :4, :2] = 0.5  # a quarter of the first cell
    found = ddpm.masked_mean(errors, mask)
    torch.testing.assert_close(found, torch.stack([errors[0, :, :4].mean(), errors[1, :, 0, 0].mean()]))
    torch.testing.assert_close(ddpm.masked_mean(errors, torch.ones(2, 1, 32, 32)), errors.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(ddpm.masked_mean(errors, 2 * mask - 1), ddpm.masked_mean(errors, (mask > 0.5).float()))


def test_a_mask_of_zeros_gives_no_loss_and_no_gradient():
    errors = randn(3, 2, 4, 8, 8).square().requires_grad_()
    mask = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    loss = ddpm.masked_mean(errors, mask)
    loss.sum().backward()
    assert loss[0] == 0 and (errors.grad[0] == 0).all() and (errors.grad[1] > 0).all()


def test_masks_of_the_batch_are_weights_of_the_loss():
    model, samples = latent_diffusion("crossattn", ATTEND, CLASSES, loss_mask_key="loss_mask", **CLASS), batch()
    plain = latent_diffusion("crossattn", ATTEND, CLASSES, **CLASS)
    losses = []
    for each, mask in ((plain, None), (model, 0.3), (model, 0.0)):
        torch.manual_seed(4)
        given = {} if mask is None else {"loss_mask": torch.full((2, 32, 32, 1), mask)}
        losses.append(each.shared_step({**samples, **given})[0])
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[2] == 0
    with pytest.raises(ValueError, match=r"no 'loss_mask', .* set loss_mask_key"):
        model.shared_step(samples)


def test_a_model_in_pixel_space_takes_weights_and_masks_of_the_batch():
    model, image = pixel_model(loss_mask_key="mask"), randn(5, 2, 8, 8, 3)
    half = torch.zeros(2, 8, 8, 1)
    half[:, :4] = 1.0
    losses = []
    for mask, weight in (
        (half, None),
        (1 - half, None),
        (torch.ones_like(half), None),
        (half, torch.tensor([3.0, 3.0])),
    ):
        torch.manual_seed(1)
        given = {} if weight is None else {"loss_weight": weight}
        losses.append(model.shared_step({"image": image, "mask": mask, **given})[0])
    torch.testing.assert_close((losses[0] + losses[1]) / 2, losses[2])
    torch.testing.assert_close(losses[3], 3 * losses[0])


def test_a_learned_weighting_is_refused_for_adapters():
    weighting = {"target": "ldm.models.diffusion.loss_weighting.LearnedLogVariance"}
    with pytest.raises(ValueError, match="loss_weighting_config: LearnedLogVariance has parameters"):
        latent_diffusion("crossattn", ATTEND, CLASSES, loss_weighting_config=weighting, adapters={"rank": 2})


def test_a_compiled_network_keeps_its_keys_and_gradients_with_recomputed_activations():
    """Traced by the backend `eager`: the others compile the same graph."""
    found = []
    for compiled in (False, True):
        network = {"channel_mult": [1], "attention_resolutions": [], "use_checkpoint": True}
        model = pixel_model(unet_config=unet(in_channels=3, out_channels=3, **network))
        keys = list(model.state_dict())
        if compiled:
            model.compile_network("eager")
        x, t = randn(1, 2, 3, 8, 8), torch.tensor([3, 20])
        loss, _ = model.train().p_losses(x, t, randn(2, 2, 3, 8, 8))
        loss.backward()
        assert list(model.state_dict()) == keys
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(rel_error(b, a) < 1e-5 for a, b in zip(*found, strict=True))
