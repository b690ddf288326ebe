"""Keys of a config that must change together."""

import logging

import pytest

from ldm.config.consistency import check_consistency
from ldm.config.instantiate import ConfigError
from ldm.config.merge import merge
from ldm.config.validate import check_config
from ldm.paths import ROOT

TEXT2IMAGE = "configs/quickstart/text2image.yaml"
FOLDER = "configs/recipes/text-to-image-folder.yaml"
SMALL_FOLDER = "configs/recipes/text-to-image-small-folder.yaml"
AUTOENCODER = "configs/recipes/autoencoder-folder.yaml"
CONCAT = "models/ldm/semantic_synthesis256/config.yaml"
LORA, TOKENS = "configs/quickstart/lora.yaml", "configs/quickstart/textual-inversion.yaml"
CONTROL, NET = "configs/quickstart/controlnet.yaml", "model.params.control_stage_config.params"
UNET, STAGE = "model.params.unet_config.params", "model.params.first_stage_config.params"


def check(file, *overrides):
    check_config(merge([ROOT / file], overrides), weights=False)


@pytest.mark.parametrize(
    "file, override, paths",
    [
        (TEXT2IMAGE, f"{UNET}.in_channels=3", (f"{UNET}.in_channels 3", "model.params.channels is 4")),
        (TEXT2IMAGE, f"{UNET}.out_channels=3", (f"{UNET}.out_channels 3", "model.params.channels is 4")),
        (TEXT2IMAGE, "model.params.channels=8", (f"{STAGE}.embed_dim 4", "model.params.channels is 8")),
        (
            TEXT2IMAGE,
            f"{UNET}.context_dim=17",
            (f"{UNET}.context_dim 17", "CaptionEmbedder) returns vectors of width 64"),
        ),
        (
            TEXT2IMAGE,
            f"{UNET}.model_channels=20",
            (f"{UNET}.model_channels 20", f"{UNET}.channel_mult", "multiples of 32"),
        ),
        (TEXT2IMAGE, f"{STAGE}.ddconfig.ch=20", (f"{STAGE}.ddconfig.ch 20", "multiples of 32")),
        (SMALL_FOLDER, f"{STAGE}.ddconfig.ch=18", (f"{STAGE}.ddconfig.ch 18", "multiples of 4, ")),
        (
            TEXT2IMAGE,
            "model.params.image_size=7",
            ("image_size 7: expected a multiple of 2", f"{UNET}.channel_mult [2, 2]"),
        ),
        (
            CONTROL,
            f"{NET}.model_channels=64",
            (f"{NET}.model_channels 64", f"{UNET}.model_channels is 32"),
        ),
        (
            CONTROL,
            f"{NET}.hint_block_channels=[16,32]",
            (f"{NET}.hint_block_channels [16, 32]: expected 3 numbers", "ch_mult [1, 1, 1]"),
        ),
        *(
            (file, f"+model.params.{name}=true", (f"model.params.{name} true", section, "trains on a frozen base"))
            for name in ("cond_stage_trainable", "learn_logvar")
            for file, section in ((LORA, "adapters"), (TOKENS, "token_embeddings"))
        ),
        (CONTROL, f"{UNET}.in_channels=3", (f"{UNET}.in_channels 3", "model.params.channels is 4")),
        (CONCAT, f"{UNET}.in_channels=3", (f"{UNET}.in_channels 3", "conditioning_key concat adds 3 channels")),
        (CONCAT, f"{UNET}.in_channels=7", (f"{UNET}.in_channels 7", "conditioning_key concat adds 3 channels")),
        (
            FOLDER,
            "data.params.train.params.size=260",
            ("train.params.size: images of 260x260", "multiples of 64", "nearest are 256x256 or 320x320"),
        ),
        (
            FOLDER,
            "+data.params.train.params.buckets={step: 8}",
            ("train.params.buckets.step: images of 8x8", "multiples of 64", "nearest are 64x64"),
        ),
        (
            AUTOENCODER,
            "data.params.train.params.crop_size=30",
            ("crop_size: images of 30x30", "multiples of 8 ", "24x24 or 32x32"),
        ),
        (AUTOENCODER, "model.params.ddconfig.out_ch=1", ("disc_in_channels 3", "ddconfig.out_ch is 1")),
    ],
)
def test_keys_that_exclude_each_other_are_refused_with_both_paths_and_values(file, override, paths):
    check(file)
    with pytest.raises(ConfigError) as error:
        check(file, override)
    assert all(words in str(error.value) for words in paths) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "file, override, words",
    [
        (
            FOLDER,
            "data.params.train.params.size=128",
            ("model.params.image_size 32 (latent cells of 8", "image_size=16"),
        ),
        (
            AUTOENCODER,
            "model.params.ddconfig.resolution=128",
            ("resolution 128: ", "crop_size is 256", "resolution=256"),
        ),
        (TEXT2IMAGE, f"{UNET}.attention_resolutions=[2,16]", ("attention_resolutions [16]", "the levels are 1, 2")),
        (AUTOENCODER, "model.params.ddconfig.attn_resolutions=[48]", ("[48]: never occurs", "levels are 256, 128")),
    ],
)
def test_sizes_that_differ_are_logged(file, override, words, caplog):
    with caplog.at_level(logging.WARNING, "ldm"):
        check(file)
        assert not caplog.messages
        check(file, override)
    (message,) = caplog.messages
    assert all(each in message for each in words), message


def test_networks_of_other_packages_use_the_same_names_as_they_like():
    own = {"target": "own.Net", "params": {"ddconfig": {"ch": 3, "ch_mult": "deep"}, "model_channels": 5}}
    unet = {**own, "params": {"model_channels": 5, "channel_mult": [1, 2, 4, 8]}}
    data = {"params": {"train": {"target": "ldm.data.folder.ImageFolder", "params": {"size": 30}}}}
    check_consistency({"model": own, "data": data})
    latent = {"first_stage_config": own, "cond_stage_config": "__is_unconditional__", "unet_config": unet}
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    check_consistency({"model": {"target": target, "params": {**latent, "image_size": 30}}, "data": data})


def test_a_masked_loss_needs_masks_and_masks_need_it(caplog):
    place = "data.params.{}.params.masks=/masks"
    key = "model.params.loss_mask_key=loss_mask"
    with pytest.raises(ConfigError, match=r"loss_mask_key loss_mask: set data\.params\.validation\.params\.masks to"):
        check(FOLDER, key, place.format("train"))
    with caplog.at_level(logging.WARNING):
        check(FOLDER, key, place.format("train"), place.format("validation"))
        assert not caplog.records
        check(FOLDER, place.format("train"))
    assert "data.params.train.params.masks has no effect: set model.params.loss_mask_key=loss_mask" in caplog.text
