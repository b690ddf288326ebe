"""Each way to condition a latent diffusion model, from batch to network, and its unconditional condition."""

import pytest
import torch

from ldm.models.diffusion.condition_stage import drop_condition
from ldm.models.diffusion.conditioning import (
    ROUTES,
    Route,
    compose_condition,
    main_part,
    map_main,
    normalize_condition,
)
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.models.diffusion.modes import MODES, build
from tests.models.diffusion.tiny import ATTEND, CAPTIONS, CLASSES, batch, fit, latent_diffusion
from tests.reference import randn


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def model(mode):
    """A model of each mode after two training steps; its weights from before are `before`."""
    torch.manual_seed(0)
    model = build(mode, "Layout2ImgDiffusion" if mode == "boxes" else "LatentDiffusion")
    model.before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(model)
    assert trainer.global_step == 2 and trainer.callback_metrics["val/loss_simple_ema"].isfinite()
    return model.eval()


def test_each_mode_trains_the_network_and_its_trainable_encoder_alone(model):
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, model.before[name])}
    assert any(name.startswith("cond_stage_model.") for name in moved) == model.cond_stage_trainable
    assert moved and all(name.startswith(("model.", "cond_stage_model.")) for name in moved)


def test_each_mode_logs_its_condition_and_guided_samples(mode, model):
    log = model.log_images(batch(), N=2, ddim_steps=3, plot_denoise_rows=False)
    wanted = {"inputs", "reconstruction", "samples", "samples_cfg_scale_3.00", "diffusion_row"}
    wanted |= {"bbox_image"} if mode == "boxes" else {"conditioning"}
    wanted |= {f"conditioning_{name}" for name in model.concat_keys}
    assert wanted <= set(log) and all(image.ndim == 4 and torch.isfinite(image).all() for image in log.values())
    assert log["samples"].shape == log["inputs"].shape == (2, 3, 32, 32)
    assert not torch.equal(log["samples"], log["samples_cfg_scale_3.00"])


def test_a_frozen_encoder_gets_each_distinct_caption_of_a_batch_once(monkeypatch):
    model = latent_diffusion("crossattn", ATTEND, CAPTIONS).train()
    captions, seen, encode = ["a", "", "b", "", "a"], [], model.cond_stage_model.encode
    expected = encode(captions)
    monkeypatch.setattr(model.cond_stage_model, "encode", lambda texts: seen.extend(texts) or encode(texts))
    images = {"image": torch.zeros(5, 32, 32, 3), "caption": captions}
    _, cond = model.get_input(images, "image", cond_key="caption")
    encoded = normalize_condition(cond, "crossattn")["c_crossattn"]
    encoded = encoded[0] if isinstance(encoded, list) else encoded
    assert seen == ["a", "", "b"] and torch.allclose(encoded, expected, atol=1e-6)


def test_guidance_with_equal_halves_is_the_plain_call(model):
    z, c = model.get_input(batch(), "image", force_c_encode=True)
    x_T = randn(1, *z.shape)

    def sample(**kwargs):
        return DDIMSampler(model).sample(2, 2, (4, 8, 8), c, x_T=x_T, verbose=False, **kwargs).samples

    guided = sample(unconditional_guidance_scale=4.0, unconditional_conditioning=c)
    assert torch.allclose(guided, sample(), atol=1e-4)


def test_the_unconditional_condition_differs_in_the_main_part_alone(model):
    z, c, raw = model.get_input(batch(), "image", force_c_encode=True, return_original_cond=True)
    key = model.model.conditioning_key
    main = main_part(key)
    with_condition, without = (normalize_condition(cond, key) for cond in (c, model.unconditional_like(c, raw, len(z))))
    assert set(with_condition) == set(without)
    for part in with_condition:
        ours, theirs = ([p] if torch.is_tensor(p) else p for p in (with_condition[part], without[part]))
        same = [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]
        assert same == [part != main or position > 0 for position in range(len(same))]


def test_a_mask_follows_the_encoded_image_and_keeps_its_values():
    model = build("masked image")
    z, c = model.get_input(batch(), "image")
    image, mask = c["c_concat"]
    assert image.shape == z.shape and mask.shape == (2, 1, 8, 8)
    assert torch.equal(mask[:, :, 2:6, 2:6], torch.ones(2, 1, 4, 4)) and mask[:, :, :2].unique().tolist() == [-1]


@pytest.fixture(scope="module")
def hybrid():
    return build("hybrid", scale_factor=0.5, cond_dropout=0.9)


def test_a_masked_image_next_to_a_caption_is_a_scaled_latent_of_the_first_stage(hybrid):
    data = batch()
    torch.manual_seed(1)
    wanted = hybrid.get_first_stage_encoding(hybrid.encode_first_stage(hybrid.get_images(data, "masked_image")))
    torch.manual_seed(1)
    mask, image = hybrid.further_parts(data, (8, 8))["c_concat"]
    assert mask.shape == (2, 1, 8, 8) and torch.equal(image, wanted)


def test_dropping_the_condition_never_changes_the_batch_or_further_parts(hybrid):
    torch.manual_seed(0)
    data = batch(8)
    _, c, raw = hybrid.train().get_input(data, "image", return_original_cond=True)
    assert "" in c["c_crossattn"][0] and data["caption"] == [f"sample number {i}" for i in range(8)] == raw
    assert torch.equal(c["c_concat"][0], hybrid.further_parts(data, (8, 8))["c_concat"][0])
    assert "" not in hybrid.eval().get_input(data, "image")[1]["c_crossattn"][0]


def test_a_condition_is_dropped_for_the_share_of_samples_that_was_asked_for():
    model = build("class", cond_dropout=0.5).train()
    null = model.cond_stage_model.n_classes - 1
    torch.manual_seed(0)
    labels = torch.cat([model.get_input(batch(8), "image")[1]["class_label"] for _ in range(20)])
    assert 0.35 < float((labels == null).float().mean()) < 0.65


def test_dropping_replaces_only_the_chosen_samples():
    dropped = torch.tensor([True, False, True])
    assert drop_condition(["a", "b", "c"], ["", "", ""], dropped) == ["", "b", ""]
    labels = drop_condition({"class_label": torch.tensor([1, 2, 3])}, {"class_label": torch.tensor([9, 9, 9])}, dropped)
    assert labels["class_label"].tolist() == [9, 2, 9]
    images = drop_condition(torch.ones(3, 2, 4, 4), torch.zeros(3, 2, 4, 4), dropped)
    assert images.mean(dim=(1, 2, 3)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("cond, key", [(CLASSES, "class_label"), (CAPTIONS, "caption")])
def test_the_unconditional_condition_is_the_one_that_dropping_trains(cond, key):
    model = latent_diffusion("crossattn", ATTEND, cond, cond_stage_key=key)
    null = model.cond_stage_model.unconditional_input(3)
    assert torch.equal(model.get_unconditional_conditioning(3), model.get_learned_conditioning(null))
    if key == "caption":
        for label in ("blurry", ["blurry"]):
            c = model.get_unconditional_conditioning(3, label)
            assert torch.equal(c, model.get_learned_conditioning(["blurry"] * 3))
        with pytest.raises(ValueError, match="null_label is for 2 samples: pass one, or one for each of the 3"):
            model.get_unconditional_conditioning(3, ["a", "b"])


def test_the_last_class_of_the_networks_table_means_none():
    assert build("adm").get_unconditional_conditioning(3).tolist() == [10, 10, 10]
    with pytest.raises(ValueError, match="no unconditional input"):
        build("low resolution").get_unconditional_conditioning(3)


class WithStrength(LatentDiffusion):
    """A model of another package: `further_parts` is all that it changes."""

    def further_parts(self, batch, size, bs=None):
        return {**super().further_parts(batch, size, bs), "c_strength": self.batch_value(batch, "class_label")[:bs]}


def test_a_part_of_another_name_needs_only_further_parts(monkeypatch):
    def call(net, x, t, c):
        return net(x, t, context=c["c_crossattn"][0]) * c["c_strength"].reshape(-1, 1, 1, 1)

    monkeypatch.setitem(ROUTES, "with-strength", Route(("c_crossattn", "c_strength"), None, call))
    model = latent_diffusion(
        "with-strength", ATTEND, CAPTIONS, cond_stage_key="caption", cond_stage_trainable=True, cond_dropout=0.5
    )
    model.__class__ = WithStrength
    assert fit(model).global_step == 2
    z, c, raw = model.eval().get_input(batch(), "image", force_c_encode=True, return_original_cond=True)
    uncond = model.unconditional_like(c, raw, len(z))
    assert torch.equal(uncond["c_strength"], c["c_strength"]) and c["c_strength"].tolist() == [0, 1]
    assert not torch.equal(uncond["c_crossattn"][0], c["c_crossattn"][0])
    options = {"unconditional_guidance_scale": 4.0, "unconditional_conditioning": uncond, "verbose": False}
    assert DDIMSampler(model).sample(2, 2, (4, 8, 8), c, **options).samples.isfinite().all()


def test_a_main_part_of_another_name_keeps_its_form(monkeypatch):
    monkeypatch.setitem(ROUTES, "own", Route(("c_own", "c_adm"), None, lambda net, x, t, c: net(x, t)))
    composed = compose_condition("a", "own", {"c_adm": "label"})
    assert composed == {"c_own": "a", "c_adm": "label"}
    assert map_main(str.upper, composed, "own") == {"c_own": "A", "c_adm": "label"}


def test_the_condition_stage_can_be_the_first_stage():
    model = latent_diffusion("concat", {"in_channels": 8}, "__is_first_stage__", cond_stage_key="image")
    assert model.cond_stage_model is model.first_stage_model
    z, c = model.get_input(batch(), "image")
    assert c.shape == z.shape
    names = list(model.state_dict())
    blocks = [[name for name in names if name.startswith(f"{block}_stage_model.")] for block in ("first", "cond")]
    assert len(blocks[0]) == len(blocks[1]) > 0


@pytest.mark.parametrize(
    "mode, changes, message",
    [
        ("class", {"concat_keys": ["mask"]}, "'crossattn' takes no channels"),
        ("class", {"adm_key": "class_label"}, "'crossattn' takes no further labels"),
        ("adm", {"adm_key": "class_label"}, "'adm' takes no further labels"),
    ],
)
def test_parts_that_the_key_does_not_take_are_refused(mode, changes, message):
    with pytest.raises(ValueError, match=message):
        build(mode, **changes)
