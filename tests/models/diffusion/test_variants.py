"""Stable Diffusion's fine-tunes: inputs of their networks, and starts from a text-to-image model."""

import logging

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import CheckpointError, write_weights
from ldm.models.diffusion.condition_stage import ConditionStage
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.midas.api import MiDaSInference
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.reference import randn, seed_weights
from tests.tiny import KINDS, text_model_config

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
OUT = "model.diffusion_model.out.2.weight"
FIRST_EMA = "model_ema.diffusion_modelinput_blocks00weight"
TEXTS = ["a horse", "a red kite"]


def build(kind: str, **params):
    config = text_model_config(**{"cond_stage_trainable": False, **KINDS[kind], **params})
    return instantiate_from_config(OmegaConf.create(config)["model"]).eval()


def tiny(kind: str, **params):
    return seed_weights(build(kind, **params))


def batch():
    image = torch.tanh(randn(1, 2, 32, 32, 3))
    mask = torch.zeros(2, 32, 32, 1)
    mask[:, 8:16, 8:24] = 1.0
    return {
        "image": image,
        "caption": TEXTS,
        "mask": mask,
        "masked_image": image * (mask < 0.5),
        "depth": randn(2, 2, 64, 48).abs(),
        "lr": image[:, ::4, ::4],
        "edited": image,
        "edit": {"c_concat": image.flip(2), "c_crossattn": TEXTS},
    }


# -------------------------------------------------------------------------------------------- start from fewer channels


@pytest.mark.parametrize("averages", ["absent", "present"])
def test_weights_of_a_text_model_are_kept_and_the_new_channels_start_at_zero(tmp_path, averages, caplog):
    source = tiny("v2")
    for name, parameter in source.model.named_parameters():
        getattr(source.model_ema, name.replace(".", "")).copy_(0.9 * parameter.detach())
    weights = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if averages == "present" or not name.startswith("model_ema.")
    }
    write_weights(weights, tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO):
        model = build("sd-inpaint", finetune_keys=[FIRST, FIRST_EMA], ckpt_path=str(tmp_path / "a.safetensors"))
    state, factor = model.state_dict(), 0.9 if averages == "present" else 1.0
    for key, scale in ((FIRST, 1.0), (FIRST_EMA, factor)):
        assert torch.allclose(state[key][:, :4], scale * source.state_dict()[FIRST]) and state[key][:, 4:].eq(0).all()
        assert f"{key}: kept the first 4 input channels, 5 new ones start at zero" in caplog.text
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items() if name not in (FIRST, FIRST_EMA))
    x, t, text = randn(3, 2, 4, 8, 8), torch.tensor([3, 70]), model.get_learned_conditioning(TEXTS)
    cond = {"c_concat": [randn(4, 2, 5, 8, 8)], "c_crossattn": [text]}
    with torch.no_grad():
        assert torch.allclose(model.apply_model(x, t, cond), source.apply_model(x, t, text), atol=1e-5)
        with model.ema_scope(), source.ema_scope():
            if averages == "present":
                assert torch.allclose(model.apply_model(x, t, cond), source.apply_model(x, t, text), atol=1e-5)


def test_the_network_alone_and_a_file_of_the_same_kind_load_too(tmp_path):
    source, own = tiny("v2"), tiny("sd-inpaint")
    write_weights(
        {name: tensor for name, tensor in source.state_dict().items() if name.startswith("model.")},
        tmp_path / "net.ckpt",
    )
    model = build(
        "sd-inpaint", finetune_keys=[FIRST, FIRST_EMA], ckpt_path=str(tmp_path / "net.ckpt"), load_only_unet=True
    )
    assert (
        torch.equal(model.state_dict()[FIRST][:, :4], source.state_dict()[FIRST])
        and model.state_dict()[FIRST][:, 4:].eq(0).all()
    )
    bare = {name.removeprefix("model."): tensor for name, tensor in source.model.state_dict(prefix="model.").items()}
    write_weights(bare, tmp_path / "bare.ckpt")
    model = build("sd-inpaint", finetune_keys=[FIRST], ckpt_path=str(tmp_path / "bare.ckpt"), load_only_unet=True)
    assert torch.equal(model.state_dict()[FIRST][:, :4], source.state_dict()[FIRST])
    write_weights(own.state_dict(), tmp_path / "own.ckpt")
    again = build("sd-inpaint", finetune_keys=[FIRST, FIRST_EMA], ckpt_path=str(tmp_path / "own.ckpt"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in own.state_dict().items())


def test_a_file_that_does_not_fit_is_refused_unless_its_keys_are_named(tmp_path):
    write_weights(tiny("v2").state_dict(), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="have other shapes"):
        build("sd-inpaint", finetune_keys=None, ckpt_path=str(tmp_path / "a.ckpt"))
    with pytest.raises(CheckpointError, match="they cannot share 6 input channels"):
        build("sd-inpaint", finetune_keys=[FIRST, FIRST_EMA], keep_finetune_dims=6, ckpt_path=str(tmp_path / "a.ckpt"))


# -------------------------------------------------------------------------------------------------- what they are given


def test_inpainting_concatenates_mask_and_masked_latent():
    model, data = tiny("sd-inpaint"), batch()
    torch.manual_seed(0)
    z, c = model.get_input(data, "image")
    torch.manual_seed(0)
    with torch.no_grad():
        model.encode_first_stage(data["image"].permute(0, 3, 1, 2)).sample()
        masked = 0.5 * model.encode_first_stage(data["masked_image"].permute(0, 3, 1, 2)).sample()
    mask, latent = c["c_concat"]
    assert z.shape == (2, 4, 8, 8) and torch.equal(mask, data["mask"].permute(0, 3, 1, 2)[:, :, ::4, ::4])
    assert torch.allclose(latent, masked, atol=1e-5)
    assert torch.equal(c["c_crossattn"][0], model.get_learned_conditioning(TEXTS))


def test_the_image_log_decodes_a_range_of_the_concat_channels():
    model = tiny("sd-inpaint", c_concat_log_start=1, c_concat_log_end=5)
    log = model.log_images(batch(), N=2, ddim_steps=1, plot_denoise_rows=False, unconditional_guidance_scale=3.0)
    assert log["c_concat_decoded"].shape == (2, 3, 32, 32) and {"conditioning_mask", "samples_cfg_scale_3.00"} <= set(
        log
    )


def test_depth_is_given_or_estimated_and_spans_each_samples_range(monkeypatch):
    model, data = tiny("depth"), batch()
    _, c = model.get_input(data, "image")
    (depth,) = c["c_concat"]
    assert depth.shape == (2, 1, 8, 8) and torch.allclose(depth.amin((1, 2, 3)), -torch.ones(2))
    assert torch.allclose(depth.amax((1, 2, 3)), torch.ones(2), atol=5e-3)
    scaled = model.get_input({**data, "depth": 1000 * data["depth"]}, "image")[1]["c_concat"][0]
    assert torch.allclose(scaled, depth, atol=5e-3)
    data["midas_in"] = data["image"]
    del data["depth"]
    monkeypatch.setattr(MiDaSInference, "forward", lambda self, x: x[:, :1])
    estimated = model.get_input(data, "image")[1]["c_concat"][0]
    assert torch.equal(estimated, model.normalized_depth(data["image"].permute(0, 3, 1, 2)[:, :1], (8, 8)))
    assert "depth" in model.log_images(data, N=1, ddim_steps=1, plot_denoise_rows=False)


def test_a_missing_depth_map_is_an_error_with_the_next_step():
    data = batch()
    del data["depth"]
    data["midas_in"] = data["image"]
    with pytest.raises(
        ValueError, match=r"weights is not set. Set .* a folder with transformers' DPT \(Intel/dpt-hybrid-midas"
    ):
        tiny("depth").get_input(data, "image")
    with pytest.raises(ValueError, match="the batch has no 'depth'; add it, or set depth_stage_config"):
        tiny("depth", depth_stage_config=None).get_input(data, "image")
    with pytest.raises(ValueError, match="a depth map has one channel, these have 3"):
        tiny("depth").get_input({**data, "depth": data["image"]}, "image")


def test_the_upscaler_takes_the_low_resolution_image_with_noise_of_the_given_level():
    model, data = tiny("x4"), batch()
    _, c = model.get_input(data, "image")
    level, (noised,) = c["c_adm"], c["c_concat"]
    assert level.dtype == torch.int64 and noised.shape == (2, 3, 8, 8) and level.min() >= 0 and level.max() < 350
    given = tiny("x4", noise_level_key="level")
    _, c = given.get_input({**data, "level": torch.tensor([0, 349])}, "image")
    error = (c["c_concat"][0] - data["lr"].permute(0, 3, 1, 2)).flatten(1).std(dim=1)
    assert c["c_adm"].tolist() == [0, 349] and error[0] < 0.05 < 0.3 < error[1]
    with pytest.raises(ValueError, match="lr: images of 32x32 pixels, expected 8x8"):
        model.get_input({**data, "lr": data["image"]}, "image")
    with pytest.raises(ValueError, match="LatentUpscaleDiffusion requires hybrid-adm"):
        tiny("x4", conditioning_key="hybrid")


def test_an_edit_model_sees_the_unscaled_mode_of_the_image_before():
    model, data = tiny("edit", scale_factor=0.5), batch()
    z, c = model.get_input(data, "edited")
    before = data["edit"]["c_concat"].permute(0, 3, 1, 2).contiguous()
    assert torch.equal(c["c_concat"][0], model.encode_first_stage(before).mode()) and z.shape == (2, 4, 8, 8)
    assert torch.equal(c["c_crossattn"][0], model.get_learned_conditioning(TEXTS))
    first = {"edited": data["edited"].permute(0, 3, 1, 2), "edit": {"c_concat": before, "c_crossattn": TEXTS}}
    torch.manual_seed(0)
    published = model.get_input(first, "edited")
    torch.manual_seed(0)
    again = model.get_input(data, "edited")
    assert torch.equal(published[0], again[0]) and torch.equal(published[1]["c_concat"][0], c["c_concat"][0])
    images = model.log_images(data, N=1, ddim_steps=1, plot_denoise_rows=False)
    assert torch.equal(images["before"], before[:1]) and "samples_cfg_scale_3.00" in images


def test_an_edit_model_drops_instruction_image_and_both_as_often_as_each_other(monkeypatch):
    model = tiny("edit", cond_dropout=0.1, cond_stage_trainable=True).train()
    chance = torch.tensor([0.0, 0.0999, 0.1001, 0.1999, 0.2001, 0.2999, 0.3001, 0.9])
    monkeypatch.setattr("ldm.models.diffusion.ddpm.rng.uniform", lambda rows, purpose, device: chance)
    image = torch.tanh(randn(1, 1, 32, 32, 3)).expand(8, 32, 32, 3)
    _, c = model.get_input({"edited": image, "edit": {"c_concat": image, "c_crossattn": ["a"] * 8}}, "edited")
    text = [text == "" for text in c["c_crossattn"][0]]
    latent = [not sample.any() for sample in c["c_concat"][0]]
    assert text == [True, True, True, True, False, False, False, False]
    assert latent == [False, False, True, True, True, True, False, False]
    with pytest.raises(ValueError, match=r"cond_dropout 0.4: expected a number in \[0, 0.33\]"):
        build("edit", cond_dropout=0.4)


def test_an_edit_model_has_the_keys_of_stable_diffusion_and_starts_from_its_weights(tmp_path):
    source = tiny("text")
    for name, parameter in source.model.named_parameters():
        getattr(source.model_ema, name.replace(".", "")).copy_(0.9 * parameter.detach())
    write_weights(source.state_dict(), tmp_path / "a.ckpt")
    start = {"finetune_keys": [FIRST, FIRST_EMA], "ckpt_path": str(tmp_path / "a.ckpt")}
    model, fresh = build("edit", **start), build("edit", load_ema=False, **start)
    assert list(model.state_dict()) == list(source.state_dict())
    for each, scale in ((model, 0.9), (fresh, 1.0)):
        state = each.state_dict()
        assert torch.equal(state[FIRST][:, :4], source.state_dict()[FIRST]) and state[FIRST][:, 4:].eq(0).all()
        assert torch.allclose(state[FIRST_EMA], scale * state[FIRST])
        assert torch.allclose(state["model_ema.diffusion_modelout2weight"], scale * source.state_dict()[OUT])
    x, t = randn(3, 2, 4, 8, 8), torch.tensor([3, 70])
    text = model.get_learned_conditioning(TEXTS)
    with torch.no_grad():
        edited = model.apply_model(x, t, {"c_concat": [randn(4, 2, 4, 8, 8)], "c_crossattn": [text]})
        assert torch.allclose(edited, source.apply_model(x, t, text), atol=1e-5)


def test_an_edit_model_is_conditioned_on_an_image_and_an_instruction():
    with pytest.raises(ValueError, match="conditioning_key 'concat': LatentEditDiffusion requires hybrid"):
        build("edit", conditioning_key="concat")
    data = batch()
    del data["edit"]["c_crossattn"]
    with pytest.raises(ValueError, match="the batch has no 'c_crossattn', it has c_concat"):
        build("edit").get_input(data, "edited")
    assert issubclass(
        get_obj_from_str("stable_diffusion.ldm.models.diffusion.ddpm_edit.LatentDiffusion"), ConditionStage
    )


@pytest.mark.parametrize("kind", ["v2", "v2-v", "sd-inpaint", "depth", "x4"])
def test_guidance_changes_the_text_under_the_same_further_parts(kind):
    model = tiny(kind)
    _, c, raw = model.get_input(batch(), "image", return_original_cond=True)
    uncond = model.unconditional_like(c, raw, 2)
    options = {"verbose": False, "x_T": randn(9, 2, 4, 8, 8), "unconditional_guidance_scale": 4.0}
    with torch.no_grad():
        guided = DDIMSampler(model).sample(2, 2, (4, 8, 8), c, unconditional_conditioning=uncond, **options).samples
        plain = DDIMSampler(model).sample(2, 2, (4, 8, 8), c, unconditional_conditioning=c, **options).samples
    assert guided.isfinite().all() and not torch.allclose(guided, plain)
    if isinstance(uncond, dict):
        assert all(a is b for a, b in zip(uncond["c_concat"], c["c_concat"], strict=True))


@pytest.mark.parametrize("patch, noised", [(None, False), (2, False), (None, True)])
def test_an_upscaling_fine_tune_takes_low_resolution_images_as_channels(patch, noised):
    side, channels = 8 * (patch or 1), 3 * (patch or 1) ** 2
    low = KINDS["x4"]["low_scale_config"] if noised else None
    network = KINDS["x4"]["unet_config"] if noised else KINDS["sd-inpaint"]["unet_config"]
    network = {**network, "params": {**network["params"], "in_channels": 4 + channels}}
    model = tiny(
        "sd-inpaint",
        target="LatentUpscaleFinetuneDiffusion",
        concat_keys=["lr"],
        reshuffle_patch_size=patch,
        low_scale_config=low,
        low_scale_key="lr" if noised else None,
        conditioning_key="hybrid-adm" if noised else "hybrid",
        unet_config=network,
    )
    images = torch.tanh(randn(7, 2, side, side, 3))
    z, c = model.get_input({**batch(), "lr": images}, "image")
    assert c["c_concat"][0].shape == (2, channels, 8, 8) and ("c_adm" in c) is noised
    if patch is None and not noised:
        assert torch.equal(c["c_concat"][0], images.permute(0, 3, 1, 2))
    if patch:
        assert torch.equal(c["c_concat"][0][:, 0], images[:, :8, :8, 0])
    assert model.apply_model(z, torch.tensor([3, 5]), c).isfinite().all()
    with pytest.raises(ValueError, match="lr: images of 3x3 pixels, expected 8x8"):
        model.get_input({**batch(), "lr": images[:, : 3 * (patch or 1), : 3 * (patch or 1)]}, "image")
