"""Class images of DreamBooth: counted, resumable, with their own metadata."""

import logging

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.config.instantiate import ConfigError, instantiate_from_config
from ldm.output.images import read_metadata
from ldm.training.class_images import generate_class_images
from tests.tiny import save_text_model, text_model_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("base"))


def config_of(base, root, **model):
    prior = {"root": str(root), "prompt": "a cat", "count": 5, "steps": 2, "batch_size": 2, "size": 32}
    return OmegaConf.create(
        {
            **text_model_config(ckpt_path=base and str(base.ckpt), **model),
            "data": {
                "target": "main.DataModuleFromConfig",
                "params": {
                    "batch_size": 2,
                    "train": {
                        "target": "ldm.data.dreambooth.DreamBooth",
                        "params": {
                            "instance": {"target": "ldm.data.digits.Digits"},
                            "prior": {"target": "ldm.data.dreambooth.ClassImages", "params": prior},
                        },
                    },
                },
            },
        }
    )


def pixels(folder):
    return {path.name: Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))}


def test_missing_images_are_generated_once_and_those_present_count(base, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert generate_class_images(config_of(base, whole), 3, "cpu") == 5
    assert f"{whole}: 0 of 5, generating 5" in caplog.text
    assert generate_class_images(config_of(base, whole), 3, "cpu") == 0
    images = pixels(whole)
    assert list(images) == [f"class-{k:05}.png" for k in range(5)] and len(set(images.values())) == 5
    part.mkdir()
    Image.new("RGB", (40, 30)).save(part / "mine.png")
    assert generate_class_images(config_of(base, part), 3, "cpu") == 4
    assert pixels(part).items() - {("mine.png", pixels(part)["mine.png"])} == set(list(images.items())[:4])


def test_a_stopped_generation_continues_with_the_same_images(base, tmp_path):
    generate_class_images(config_of(base, tmp_path), 3, "cpu")
    images = pixels(tmp_path)
    for number in (0, 3, 4):
        (tmp_path / f"class-{number:05}.png").unlink()
    assert generate_class_images(config_of(base, tmp_path), 3, "cpu") == 3
    assert pixels(tmp_path) == images


def test_an_image_records_its_settings_and_carries_no_watermark(base, tmp_path):
    generate_class_images(config_of(base, tmp_path), 3, "cpu")
    info = read_metadata(tmp_path / "class-00003.png")
    assert info["prompt"] == "a cat" and info["seed"] + info["image_index"] == 3 + 3 and info["watermark"] is None
    assert info["ckpt"] == str(base.ckpt) and info["use_ema"]


def test_adapters_of_an_earlier_run_take_part_in_the_generation(base, tmp_path):
    options = {"adapters": {"rank": 2}, "use_ema": False}
    model = instantiate_from_config(text_model_config(ckpt_path=str(base.ckpt), **options)["model"])
    for layer in model.adapters.layers().values():
        torch.nn.init.normal_(layer.up)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "run.ckpt")
    for name, ckpt in (("base", base.ckpt), ("run", tmp_path / "run.ckpt")):
        config = config_of(base, tmp_path / name, **options)
        config.model.params.ckpt_path = str(ckpt)
        generate_class_images(config, 3, "cpu")
    assert pixels(tmp_path / "base").keys() == pixels(tmp_path / "run").keys()
    assert not set(pixels(tmp_path / "base").values()) & set(pixels(tmp_path / "run").values())


def test_adapters_are_no_part_of_the_model_that_generates(base, tmp_path):
    tokens = {"token": "<me>", "init": "cat"}
    config = config_of(base, tmp_path / "a", token_embeddings=tokens, use_ema=False)
    generate_class_images(config, 3, "cpu")
    generate_class_images(config_of(base, tmp_path / "b"), 3, "cpu")
    assert pixels(tmp_path / "a") == pixels(tmp_path / "b")  # both by the EMA weights


def test_images_of_another_prompt_are_refused_before_anything_is_generated(base, tmp_path):
    generate_class_images(config_of(base, tmp_path), 3, "cpu")
    (tmp_path / "class-00009.png").write_text("not an image")
    images = sorted(tmp_path.iterdir())
    config = config_of(base, tmp_path)
    config.data.params.train.params.prior.params.prompt = "a dog"
    with pytest.raises(ConfigError, match=r"prompt 'a dog': .*class-00000.png was generated with 'a cat'; set .*root"):
        generate_class_images(config, 3, "cpu")
    assert sorted(tmp_path.iterdir()) == images
    config.data.params.train.params.prior.params.prompt = " "
    with pytest.raises(ConfigError, match=r"prior.params.prompt ' ': is blank"):
        generate_class_images(config, 3, "cpu")


def test_without_weights_or_with_an_impossible_size_nothing_is_generated(base, tmp_path):
    with pytest.raises(ConfigError, match=r"prior\.params\.count 5: .* lacks 5 images; set model\.params\.ckpt_path"):
        generate_class_images(config_of(None, tmp_path), 3, "cpu")
    config = config_of(base, tmp_path)
    config.data.params.train.params.prior.params.size = 30
    with pytest.raises(
        ConfigError, match=r"data.params.train.params.prior: its images cannot be generated: .*multiples of"
    ):
        generate_class_images(config, 3, "cpu")
