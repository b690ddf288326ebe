"""Every task on the kind of first stage that the released models have."""

import copy

import numpy as np
import pytest
from PIL import Image

from ldm.inference import draw_samples, enlarge, fill, load_model
from ldm.task_settings import FillSettings, SampleSettings, UpscaleSettings
from tests.tiny import FIRST_STAGE, save_model

VQ = copy.deepcopy(FIRST_STAGE)
VQ["target"] = "ldm.models.autoencoder.VQModelInterface"
VQ["params"]["n_embed"] = 32
VQ["params"]["ddconfig"]["double_z"] = False


@pytest.mark.parametrize("kind", ["unconditional", "class", "fill", "enlarge"])
def test_every_task_draws_with_a_vq_first_stage(tmp_path, kind):
    saved = save_model(tmp_path, kind, first_stage_config=VQ)
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    if kind == "fill":
        mask = Image.new("L", image.size)
        mask.paste(255, (4, 4, 12, 12))
        drawn = [fill(pipeline, image, mask, FillSettings(steps=2), progress=False).image for _ in range(2)]
        kept = np.asarray(mask) == 0
        assert np.array_equal(np.asarray(drawn[0])[kept], np.asarray(image)[kept]) and drawn[0].size == (24, 16)
    elif kind == "enlarge":
        drawn = [enlarge(pipeline, image, UpscaleSettings(steps=2), progress=False).image for _ in range(2)]
        assert drawn[0].size == (96, 64)
    else:
        settings = SampleSettings(n_samples=1, steps=2, classes=None if kind == "unconditional" else (1,))
        drawn = [next(iter(draw_samples(pipeline, settings, progress=False))).image for _ in range(2)]
        assert drawn[0].size == (32, 32)
    assert np.array_equal(*map(np.asarray, drawn)) and np.ptp(np.asarray(drawn[0])) > 0
