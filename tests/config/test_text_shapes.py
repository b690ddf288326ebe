"""Shapes of the pretrained text encoders."""

import json

import pytest

from ldm.config.text_shapes import clip_shape, open_clip_shape


def test_some_values_of_a_known_shape_may_be_replaced():
    assert clip_shape()["hidden_size"] == 768 and clip_shape(overrides={"hidden_size": 16})["hidden_size"] == 16
    assert open_clip_shape()["width"] == 1024 and open_clip_shape(overrides={"width": 16})["width"] == 16
    assert clip_shape()["hidden_size"] == 768, "the known shape itself stays"


def test_a_local_folder_has_the_shape_of_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 32, "other": 1}}))
    shape = clip_shape(str(tmp_path))
    assert shape["hidden_size"] == 32 and shape["num_hidden_layers"] == 12 and "other" not in shape


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: clip_shape("openai/nothing"), "neither a folder with a config.json nor one of"),
        (lambda: clip_shape(overrides={"hiden_size": 1}), "text_config: hiden_size: not one of vocab_size"),
        (lambda: open_clip_shape("ViT-X"), "arch 'ViT-X': choose one of ViT-H-14"),
    ],
)
def test_an_unknown_name_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
