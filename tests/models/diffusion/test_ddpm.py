"""Laws of DDPM and LatentDiffusion in training, and the published figures."""

import gzip
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.training import fixed_noise
from ldm.util import instantiate_from_config
from tests.models.diffusion.tiny import ATTEND, AUTOENCODER, CAPTIONS, CLASSES, batch, latent_diffusion, loader, unet
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error, seed_weights

LOSSES = np.load(GOLDEN / "numerics" / "losses.npz")
LOSS_CASES = {
    "crossattn": ("crossattn", ATTEND, CLASSES, {}),
    "crossattn_l1_elbo": (
        "crossattn",
        ATTEND,
        CLASSES,
        {"loss_type": "l1", "original_elbo_weight": 0.1, "l_simple_weight": 0.9},
    ),
    "crossattn_x0": ("crossattn", ATTEND, CLASSES, {"parameterization": "x0"}),
    "crossattn_logvar": ("crossattn", ATTEND, CLASSES, {"learn_logvar": True, "logvar_init": 0.3}),
    "concat": ("concat", {"in_channels": 8}, "__is_first_stage__", {"concat_mode": True}),
}
IDENTITY = {"target": "torch.nn.Identity"}
KEYS = {  # one way to train each conditioning key
    None: ({}, "__is_unconditional__", {}),
    "crossattn": (ATTEND, CAPTIONS, {"cond_stage_key": "caption", "cond_stage_trainable": True, "cond_dropout": 0.3}),
    "concat": ({"in_channels": 7}, IDENTITY, {"cond_stage_key": "low", "cond_dropout": 0.3}),
    "adm": ({"num_classes": 10}, IDENTITY, {"cond_stage_key": "class_label"}),
}


def fit(model, steps=2, **kwargs):
    model.learning_rate = 1e-3
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", val_check_interval=2, num_sanity_val_steps=0, **quiet, **kwargs
    )
    trainer.fit(model.train(), loader(), loader())
    return trainer


@pytest.mark.parametrize("name", LOSS_CASES)
def test_losses_meet_the_published_figures(name):
    key, unet_changes, cond, changes = LOSS_CASES[name]
    model = latent_diffusion(key, unet_changes, cond, **changes)
    z, noise, t = randn(210, 2, 4, 8, 8), randn(211, 2, 4, 8, 8), torch.tensor([13, 777])
    condition = {"crossattn": randn(212, 2, 1, 16), "concat": randn(213, 2, 4, 8, 8)}[key]
    for split in ("train", "val"):
        model.train(split == "train")
        loss, logs = model.p_losses(z, condition, t, noise=noise)
        assert rel_error(loss, LOSSES[f"{name}_{split}_loss"]) < TOLERANCE
        for part in ("loss_simple", "loss_vlb", "loss"):
            assert rel_error(logs[f"{split}/{part}"], LOSSES[f"{name}|{split}/{part}"]) < TOLERANCE


def test_a_small_model_end_to_end_meets_the_published_figures():
    figures = np.load(GOLDEN / "numerics" / "latent_diffusion.npz")
    model = latent_diffusion("crossattn", ATTEND, CLASSES)
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
    assert {name: rel_error(out, figures[name]) < TOLERANCE for name, out in outs.items()} == dict.fromkeys(outs, True)


def pixel_model(**changes):
    params = {
        "unet_config": unet(in_channels=3, out_channels=3),
        "timesteps": 30,
        "image_size": 8,
        "channels": 3,
        "use_ema": False,
    }
    return seed_weights(
        instantiate_from_config({"target": "ldm.models.diffusion.ddpm.DDPM", "params": params | changes})
    )


def test_the_ancestral_chain_meets_the_published_figures():
    model = pixel_model()
    torch.manual_seed(7)
    assert (
        rel_error(model.sample(batch_size=2), np.load(GOLDEN / "numerics" / "ddpm_ancestral.npz")["sample"]) < TOLERANCE
    )


def test_stable_diffusion_v1_has_the_published_names_and_shapes():
    (name, wanted), *_ = json.loads(
        gzip.decompress((GOLDEN / "manifests" / "stable-diffusion-v1.json.gz").read_bytes())
    ).items()
    with torch.device("meta"):
        model = instantiate_from_config(OmegaConf.load(name).model)
    have = {key: list(value.shape) for key, value in model.state_dict().items()}
    for names in (wanted, have):  # an index that some versions of transformers saved
        names.pop("cond_stage_model.transformer.text_model.embeddings.position_ids", None)
    assert have == wanted


@pytest.mark.parametrize("key", KEYS)
def test_each_conditioning_key_trains_validates_logs_images_and_samples(key):
    unet_changes, cond, changes = KEYS[key]
    torch.manual_seed(0)
    model = latent_diffusion(key, unet_changes, cond, use_ema=True, **changes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(model)
    assert trainer.global_step == 2 and np.isfinite(trainer.callback_metrics["val/loss_simple_ema"])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name in before if name.startswith("model.")}
    if model.cond_stage_trainable:
        trained |= {name for name in before if name.startswith("cond_stage_model.")}
    assert moved and moved <= trained
    model.eval()
    log = model.log_images(batch(), N=2, ddim_steps=3)
    wanted = {"inputs", "reconstruction", "samples", "denoise_row", "diffusion_row"}
    if key == "crossattn":
        wanted |= {"conditioning", "samples_cfg_scale_3.00"}
    assert wanted <= set(log) and all(torch.isfinite(picture).all() and picture.ndim == 4 for picture in log.values())
    assert log["samples"].shape == log["inputs"].shape == (2, 3, 32, 32)


def test_pixel_diffusion_trains_and_logs():
    model = pixel_model(use_ema=True)
    trainer = fit(model)
    assert np.isfinite(trainer.callback_metrics["val/loss_simple_ema"])
    assert {"inputs", "samples", "denoise_row"} <= set(model.eval().log_images(batch(), N=2))


def test_a_condition_reaches_only_the_samples_that_keep_it():
    model = latent_diffusion(
        "crossattn", ATTEND, CLASSES, cond_stage_key="class_label", cond_stage_trainable=True, cond_dropout=0.5
    )
    null = model.cond_stage_model.n_classes - 1
    torch.manual_seed(0)
    model.train()
    labels = torch.cat([model.encode_batch(batch(8)).cond["class_label"] for _ in range(20)])
    share = float((labels == null).float().mean())
    assert 0.35 < share < 0.65
    model.eval()
    assert (model.encode_batch(batch(8)).cond["class_label"] != null).all()


def test_dropping_never_changes_the_batch():
    model = latent_diffusion(
        "crossattn", ATTEND, CAPTIONS, cond_stage_key="caption", cond_stage_trainable=True, cond_dropout=0.9
    ).train()
    data = batch(4)
    encoded = model.encode_batch(data)
    assert data["caption"] == [f"sample number {i}" for i in range(4)] == encoded.raw_cond and "" in encoded.cond


@pytest.mark.parametrize(
    "cond, changes", [(CLASSES, {"cond_stage_key": "class_label"}), (CAPTIONS, {"cond_stage_key": "caption"})]
)
def test_the_unconditional_condition_is_what_dropping_trains_on(cond, changes):
    model = latent_diffusion("crossattn", ATTEND, cond, **changes)
    null = model.cond_stage_model.unconditional_input(3)
    assert torch.equal(model.get_unconditional_conditioning(3), model.get_learned_conditioning(null))


def test_averages_move_on_optimizer_steps_not_on_micro_batches():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, cond_stage_key="class_label", use_ema=True)
    fit(model, steps=2, accumulate_grad_batches=2)
    assert int(model.model_ema.num_updates) == 2


def test_the_ema_scope_restores_bitwise_even_when_nested_or_broken():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, use_ema=True)
    with torch.no_grad():
        for p in model.model.parameters():
            p.add_(1.0)
    before = [p.detach().clone() for p in model.model.parameters()]
    with pytest.raises(RuntimeError), model.ema_scope(), model.ema_scope("inner"):
        assert not any(torch.equal(p, b) for p, b in zip(model.model.parameters(), before))
        raise RuntimeError
    assert all(torch.equal(p, b) for p, b in zip(model.model.parameters(), before))


def test_validation_uses_the_same_noise_each_time_and_disturbs_no_random_numbers():
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    with fixed_noise(5, torch.device("cpu")):
        first = torch.randn(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    with fixed_noise(5, torch.device("cpu")):
        assert torch.equal(torch.randn(3), first)


def test_frozen_stages_stay_frozen_in_training_mode():
    model = latent_diffusion("crossattn", ATTEND, CLASSES).train()
    assert model.training and model.model.training
    assert not model.first_stage_model.training and not model.cond_stage_model.training
    assert not any(
        p.requires_grad for p in [*model.first_stage_model.parameters(), *model.cond_stage_model.parameters()]
    )


def test_scale_by_std_gives_latents_of_unit_deviation():
    model = latent_diffusion(
        "crossattn", ATTEND, CLASSES, cond_stage_key="class_label", scale_factor=1.0, scale_by_std=True
    )
    fit(model, steps=1)
    z = torch.cat([model.encode_batch(data).z for data in loader(2)])
    assert abs(float(z.std()) - 1) < 0.05 and float(model.scale_factor) != 1.0
    assert "scale_factor" in model.state_dict()


def test_learned_logvar_is_trained_and_saved():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, cond_stage_key="class_label", learn_logvar=True)
    before = model.logvar.detach().clone()
    fit(model, steps=1)
    assert not torch.equal(model.logvar, before) and "logvar" in model.state_dict()


def test_the_condition_stage_can_be_the_first_stage():
    model = latent_diffusion("concat", {"in_channels": 8}, "__is_first_stage__", cond_stage_key="image")
    assert model.cond_stage_model is model.first_stage_model
    encoded = model.encode_batch(batch())
    assert encoded.cond.shape == encoded.z.shape
    shared = [name for name in model.state_dict() if name.startswith("cond_stage_model.")]
    assert len(shared) == len([name for name in model.state_dict() if name.startswith("first_stage_model.")])


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


def test_the_published_input_has_what_downstream_code_unpacks():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, cond_stage_key="class_label")
    z, c = model.get_input(batch(), "image")
    assert z.shape == (2, 4, 8, 8) and c.shape == (2, 1, 16)
    z, c, x, reconstruction, raw = model.get_input(
        batch(4), "image", return_first_stage_outputs=True, return_original_cond=True, bs=3
    )
    assert len(z) == len(c) == len(x) == len(reconstruction) == len(raw["class_label"]) == 3


def test_a_batch_without_the_key_names_those_that_are_there():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, first_stage_key="jpg")
    with pytest.raises(ValueError, match="no 'jpg', it has caption, class_label, human_label, image, low"):
        model.shared_step(batch())


def test_inpainting_logs_keep_what_the_mask_keeps():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, cond_stage_key="class_label")
    log = model.log_images(batch(), N=2, ddim_steps=4, inpaint=True, return_keys=["mask", "samples_inpainting"])
    assert set(log) == {"mask", "samples_inpainting"} and sorted(log["mask"].unique().tolist()) == [-1, 1]
    with pytest.raises(ValueError, match="return_keys"):
        model.log_images(batch(), N=2, sample=False, return_keys=["sampels"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parameterization": "score"}, "choose one of eps, x0, v"),
        ({"loss_type": "l3"}, "choose one of l1, l2"),
        ({"cond_dropout": 1.5}, r"fraction in \[0, 1\)"),
        ({"scale_by_std": True}, "scale_by_std measures it"),
        ({"beta_schedule": "exponential"}, "choose one of linear"),
        ({"cond_dropot": 0.1}, "did you mean 'cond_dropout'"),
        ({"use_positional_encodings": True}, "not supported"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        latent_diffusion("crossattn", ATTEND, CLASSES, **changes)


def test_the_first_stage_trains_nothing_and_needs_no_loss():
    assert AUTOENCODER["params"]["lossconfig"]["target"] == "torch.nn.Identity"
    model = latent_diffusion(None, {}, "__is_unconditional__")
    assert all(name.startswith("model.") for name, p in model.named_parameters() if p.requires_grad)


def test_training_without_a_learning_rate_says_so():
    with pytest.raises(ValueError, match="learning_rate is not set"):
        latent_diffusion(None, {}, "__is_unconditional__").configure_optimizers()


def test_a_null_label_for_one_sample_serves_the_batch():
    model = latent_diffusion("crossattn", ATTEND, CAPTIONS, cond_stage_key="caption")
    for label in ("blurry", ["blurry"]):
        c = model.get_unconditional_conditioning(3, label)
        assert torch.equal(c, model.get_learned_conditioning(["blurry"] * 3))
    with pytest.raises(ValueError, match="null_label is for 2 samples: pass one, or one for each of the 3"):
        model.get_unconditional_conditioning(3, ["a", "b"])


def test_a_file_without_a_scale_factor_leaves_it_to_be_measured(tmp_path):
    model = latent_diffusion("crossattn", ATTEND, CLASSES, cond_stage_key="class_label")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "fixed.ckpt")
    measured = {"cond_stage_key": "class_label", "scale_factor": 1.0, "scale_by_std": True}
    tuned = latent_diffusion("crossattn", ATTEND, CLASSES, ckpt_path=str(tmp_path / "fixed.ckpt"), **measured)
    fit(tuned, steps=1)
    assert float(tuned.scale_factor) != 1.0
    torch.save({"state_dict": tuned.state_dict()}, tmp_path / "measured.ckpt")
    again = latent_diffusion("crossattn", ATTEND, CLASSES, ckpt_path=str(tmp_path / "measured.ckpt"), **measured)
    fit(again, steps=1)
    assert torch.equal(again.scale_factor, tuned.scale_factor)
    with pytest.raises(ValueError, match=r"set model\.params\.scale_factor="):
        latent_diffusion("crossattn", ATTEND, CLASSES, ckpt_path=str(tmp_path / "measured.ckpt"))


def test_averages_stand_still_where_the_scaler_skipped_the_step():
    model = latent_diffusion(None, {}, "__is_unconditional__", use_ema=True)

    class Scaler:
        scales = iter([1024.0, 512.0, 512.0, 512.0])

        def get_scale(self):
            return next(self.scales)

    class Trainer:
        precision_plugin = type("Precision", (), {"scaler": Scaler()})()

    model._trainer = Trainer()
    step = lambda: model.optimizer_step(0, 0, type("Optimizer", (), {"step": lambda self, closure=None: None})(), None)  # noqa: E731
    step()
    assert int(model.model_ema.num_updates) == 0
    step()
    assert int(model.model_ema.num_updates) == 1


def test_image_logs_go_through_the_hook_that_downstream_models_override():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, cond_stage_key="class_label")
    seen = []
    published = model.get_input
    model.get_input = lambda *args, **kwargs: seen.append(kwargs["bs"]) or published(*args, **kwargs)
    model.log_images(batch(), N=2, sample=False)
    assert seen == [2]


def test_the_ancestral_chain_takes_the_first_conditions_and_refuses_too_few():
    model = latent_diffusion("crossattn", ATTEND, CLASSES, timesteps=3)
    x, _ = model.sample_log(randn(0, 4, 1, 16), 2, ddim=False, ddim_steps=None)
    assert x.shape == (2, 4, 8, 8)
    assert model.sample_log(randn(0, 2, 1, 16), 2, ddim=True, ddim_steps=2)[0].shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="condition is for 2 samples, batch_size is 16"):
        model.sample(randn(0, 2, 1, 16))
