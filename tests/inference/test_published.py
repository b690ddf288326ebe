"""Functions of the published txt2img.py that research code imports."""

import numpy as np
import torch
from PIL import Image

from ldm.inference.published import chunk, load_model_from_config, numpy_to_pil, put_watermark
from ldm.output.watermark import Watermark
from tests.tiny import save_text_model


def test_a_watermark_is_put_by_ours_or_by_the_packages_encoder():
    class Encoder:
        def encode(self, bgr, method):
            assert method == "dwtDct" and bgr[0, 0].tolist() == [3, 2, 1]
            return bgr

    image = Image.fromarray(np.tile(np.array([1, 2, 3], np.uint8), (256, 256, 1)))
    assert put_watermark(image) is image
    assert np.array_equal(np.asarray(put_watermark(image, Encoder())), np.asarray(image))
    watermark = Watermark()
    assert watermark.agreement(watermark.read(put_watermark(image, watermark))) > 120


def test_chunks_and_images():
    assert list(chunk(range(5), 2)) == [(0, 1), (2, 3), (4,)]
    images = numpy_to_pil(np.stack([np.zeros((2, 2, 3)), np.ones((2, 2, 3))]))
    assert [image.getpixel((0, 0)) for image in images] == [(0, 0, 0), (255, 255, 255)]


def test_a_model_is_loaded_from_config_and_checkpoint(tmp_path):
    saved = save_text_model(tmp_path)
    model = load_model_from_config(saved.config, saved.ckpt, verbose=True)
    assert not model.training
    name = "first_stage_model.decoder.conv_in.weight"
    assert torch.equal(model.state_dict()[name], saved.model.state_dict()[name])
