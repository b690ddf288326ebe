"""Each way to condition a latent diffusion model trains, validates, logs images and samples with guidance."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from ldm.models.diffusion.conditioning import normalize_condition
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.layout2img import draw_layout
from ldm.modules.encoders.layout_tokens import Box, LayoutTokens
from ldm.util import instantiate_from_config
from tests.models.diffusion.tiny import ATTEND, AUTOENCODER, CAPTIONS, CLASSES, unet
from tests.reference import randn, seed_weights

ENCODERS = "ldm.modules.encoders.modules."
IDENTITY = {"target": "torch.nn.Identity"}
LAYOUT = LayoutTokens(40)
TOKENS = {"n_embed": 16, "n_layer": 1, "vocab_size": 8192, "max_seq_len": 92, "use_tokenizer": False}
CLIP = {
    "embed_dim": 16,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
}
BOXES = {"target": ENCODERS + "BERTEmbedder", "params": TOKENS}
MAPS = {"target": ENCODERS + "SpatialRescaler", "params": {"n_stages": 2, "in_channels": 5, "out_channels": 3}}
CLIP_TEXT = {"target": ENCODERS + "FrozenCLIPTextEmbedder", "params": {"clip_config": CLIP}}
CLIP_IMAGE = {"target": ENCODERS + "FrozenClipImageEmbedder", "params": {"clip_config": CLIP}}
TRAINED = {"cond_stage_trainable": True}

# {mode: (conditioning_key, changes of the UNet, condition stage, other parameters)}
MODES = {
    "class": ("crossattn", ATTEND, CLASSES, {"cond_stage_key": "class_label", **TRAINED}),
    "boxes": ("crossattn", ATTEND, BOXES, {"cond_stage_key": "coordinates_bbox", **TRAINED}),
    "segmentation": ("concat", {"in_channels": 7}, MAPS, {"cond_stage_key": "segmentation", **TRAINED}),
    "low resolution": ("concat", {"in_channels": 7}, IDENTITY, {"cond_stage_key": "LR_image"}),
    "masked image": (
        "concat",
        {"in_channels": 9},
        "__is_first_stage__",
        {"cond_stage_key": "masked_image", "concat_keys": ["mask"]},
    ),
    "hybrid": (
        "hybrid",
        {**ATTEND, "in_channels": 9},
        CAPTIONS,
        {"cond_stage_key": "caption", "concat_keys": ["mask", "masked_image"], **TRAINED},
    ),
    "adm": ("adm", {"num_classes": 11}, IDENTITY, {"cond_stage_key": "class_label"}),
    "crossattn-adm": (
        "crossattn-adm",
        {**ATTEND, "num_classes": 10},
        CAPTIONS,
        {"cond_stage_key": "caption", "adm_key": "class_label", **TRAINED},
    ),
    "hybrid-adm": (
        "hybrid-adm",
        {**ATTEND, "num_classes": 10, "in_channels": 7},
        CAPTIONS,
        {"cond_stage_key": "caption", "adm_key": "class_label", "concat_keys": ["LR_image"]},
    ),
    "CLIP text": ("crossattn", ATTEND, CLIP_TEXT, {"cond_stage_key": "caption"}),
    "CLIP image": ("crossattn", ATTEND, CLIP_IMAGE, {"cond_stage_key": "image"}),
}


class Everything(torch.utils.data.Dataset):
    """Eight samples with every condition there is."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.tanh(randn(index, 32, 32, 3))
        mask = torch.full((32, 32, 1), -1.0)
        mask[8:24, 8:24] = 1.0
        labels = torch.randint(0, 5, (32, 32), generator=torch.Generator().manual_seed(index))
        return {
            "image": image,
            "mask": mask,
            "masked_image": torch.where(mask > 0, -1.0, image),
            "LR_image": image[::4, ::4],
            "segmentation": torch.nn.functional.one_hot(labels, 5).float(),
            "coordinates_bbox": LAYOUT.encode([Box(index, (0.1, 0.2, 0.3, 0.4))]),
            "class_label": index,
            "human_label": f"class {index}",
            "caption": f"sample number {index}",
        }


def loader(batch_size=2):
    return torch.utils.data.DataLoader(Everything(), batch_size=batch_size)


def batch(size=2):
    return next(iter(loader(size)))


def build(mode, target="LatentDiffusion", **changes):
    key, unet_changes, cond, params = MODES[mode]
    base = {
        "conditioning_key": key,
        "timesteps": 100,
        "image_size": 8,
        "channels": 4,
        "monitor": "val/loss_simple_ema",
        "cond_dropout": 0.3,
        "unet_config": unet(**unet_changes),
        "first_stage_config": AUTOENCODER,
        "cond_stage_config": cond,
    }
    config = {"target": f"ldm.models.diffusion.ddpm.{target}", "params": {**base, **params, **changes}}
    return seed_weights(instantiate_from_config(OmegaConf.create(config)))


def fit(model, steps=2):
    model.learning_rate = 1e-3
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", val_check_interval=2, num_sanity_val_steps=0, limit_val_batches=1, **quiet
    )
    trainer.fit(model.train(), loader(), loader())
    return trainer


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_validates_logs_images_and_samples_with_guidance(mode):
    torch.manual_seed(0)
    model = build(mode, "Layout2ImgDiffusion" if mode == "boxes" else "LatentDiffusion")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(model)
    assert trainer.global_step == 2 and np.isfinite(trainer.callback_metrics["val/loss_simple_ema"])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("cond_stage_model.") for name in moved) == model.cond_stage_trainable
    assert all(name.startswith(("model.", "cond_stage_model.")) for name in moved)

    log = model.eval().log_images(batch(), N=2, ddim_steps=3, plot_denoise_rows=False)
    wanted = {"inputs", "reconstruction", "samples", "samples_cfg_scale_3.00", "diffusion_row"}
    wanted |= {"bbox_image"} if mode == "boxes" else {"conditioning"}
    wanted |= {f"conditioning_{name}" for name in model.concat_keys}
    assert wanted <= set(log) and all(picture.ndim == 4 and torch.isfinite(picture).all() for picture in log.values())
    assert not torch.equal(log["samples"], log["samples_cfg_scale_3.00"])


@pytest.mark.parametrize("mode", MODES)
def test_guidance_with_equal_sides_is_the_plain_call(mode):
    model = build(mode)
    encoded = model.encode_batch(batch(), force_c_encode=True)
    x_T = randn(1, *encoded.z.shape)

    def draw(**kwargs):
        return DDIMSampler(model).sample(2, 2, (4, 8, 8), encoded.cond, x_T=x_T, verbose=False, **kwargs).samples

    guided = draw(unconditional_guidance_scale=4.0, unconditional_conditioning=encoded.cond)
    assert torch.allclose(guided, draw(), atol=1e-4)


@pytest.mark.parametrize("mode", ["hybrid", "crossattn-adm", "hybrid-adm", "masked image"])
def test_no_condition_keeps_the_further_parts(mode):
    model = build(mode)
    z, c, _, raw_c = model.encode_batch(batch(), force_c_encode=True)
    null = model.unconditional_like(c, raw_c, len(z))
    key = model.model.conditioning_key
    with_condition, without = normalize_condition(c, key), normalize_condition(null, key)
    assert set(with_condition) == set(without)
    main = "c_crossattn" if "c_crossattn" in c else "c_concat"
    assert not torch.equal(with_condition[main][0], without[main][0])
    for part in set(c) - {main}:
        ours, theirs = with_condition[part], without[part]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_the_mask_follows_the_encoded_picture_and_keeps_its_values():
    model = build("masked image")
    encoded = model.encode_batch(batch())
    picture, mask = encoded.cond["c_concat"]
    assert picture.shape == encoded.z.shape and mask.shape == (2, 1, 8, 8)
    assert torch.equal(mask[:, :, 2:6, 2:6], torch.ones(2, 1, 4, 4)) and mask[:, :, :2].unique().tolist() == [-1]


def test_a_masked_picture_beside_a_caption_is_a_scaled_latent_of_the_first_stage():
    model = build("hybrid", scale_factor=0.5)
    data = batch()
    mask, picture = model.encode_batch(data).cond["c_concat"]
    torch.manual_seed(1)
    wanted = model.get_first_stage_encoding(model.encode_first_stage(model.get_images(data, "masked_image")))
    torch.manual_seed(1)
    again = model.further_parts(data, (8, 8))["c_concat"][1]
    assert mask.shape == (2, 1, 8, 8) and picture.shape == wanted.shape and torch.equal(again, wanted)


def test_dropping_the_condition_never_touches_the_further_parts():
    model = build("hybrid", cond_dropout=0.9).train()
    torch.manual_seed(0)
    c = model.encode_batch(batch(8)).cond
    assert "" in c["c_crossattn"][0] and torch.equal(
        c["c_concat"][0], model.further_parts(batch(8), (8, 8))["c_concat"][0]
    )


def test_the_last_class_of_the_networks_table_means_none():
    model = build("adm")
    assert model.get_unconditional_conditioning(3).tolist() == [10, 10, 10]
    with pytest.raises(ValueError, match="no unconditional input"):
        build("low resolution").get_unconditional_conditioning(3)


def test_layouts_are_read_in_the_datasets_way_where_it_has_one():
    reader = build("boxes", "Layout2ImgDiffusion", class_names=["cat", "dog"]).layout_reader()
    assert reader[0].num_classes == 2 and reader[1](1) == "dog"
    model = build("boxes", "Layout2ImgDiffusion")
    assert model.layout_reader()[0].num_classes == 8191
    dataset = Everything()
    dataset.conditional_builders = {"coordinates_bbox": LAYOUT}
    dataset.get_textual_label_for_category_no = "thing {}".format

    class Trainer:
        datamodule = type("Module", (), {"datasets": {"train": dataset}})

    model._trainer = Trainer
    layout, name = model.layout_reader()
    assert layout is LAYOUT and name(3) == "thing 3"


def test_a_drawn_layout_shows_its_boxes():
    empty, full = (
        draw_layout(LAYOUT.encode(boxes), LAYOUT, (64, 48)) for boxes in ([], [Box(1, (0.1, 0.1, 0.5, 0.5))])
    )
    assert empty.shape == full.shape == (3, 48, 64) and (empty == 1).all() and (full < 1).any() and full.min() >= -1
    assert (full[:, 30:, 40:] == 1).all()


@pytest.mark.parametrize(
    "mode, changes, message",
    [
        ("class", {"concat_keys": ["mask"]}, "'crossattn' takes no channels"),
        ("class", {"adm_key": "class_label"}, "'crossattn' takes no further labels"),
        ("adm", {"adm_key": "class_label"}, "'adm' takes no further labels"),
    ],
)
def test_parts_that_the_key_has_no_place_for_are_refused(mode, changes, message):
    with pytest.raises(ValueError, match=message):
        build(mode, **changes)


def test_layout_models_read_layouts_alone():
    with pytest.raises(ValueError, match="Layout2ImgDiffusion requires 'coordinates_bbox'"):
        build("boxes", "Layout2ImgDiffusion", cond_stage_key="caption")
