"""img2img with every strength, several numbers of steps and all samplers: its ends are the first stage's round trip and noise alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.inference import Pipeline, image_to_image, load_model
from ldm.inference.task_settings import ImageToImageRequest
from ldm.models.diffusion.samplers.registry import SAMPLERS
from tests.tiny import save_text_model

STRENGTHS = [k / 20 for k in range(21)]
STEPS = (1, 5, 20, 50)


def run(names: Iterable[str] = SAMPLERS) -> Iterator[str]:
    """One line for each sampler."""
    with tempfile.TemporaryDirectory() as folder:
        saved = save_text_model(Path(folder))
        pipeline = load_model(saved.config, saved.ckpt, device="cpu", precision="full")
        for name in names:
            drawn = sum(check(pipeline, name, steps) for steps in STEPS)
            ends = "0 is the first stage's round trip, 1 does not depend on the picture"
            yield f"{name}: {drawn} pictures of {len(STRENGTHS)} strengths in {', '.join(map(str, STEPS))} steps; {ends}"


def check(pipeline: Pipeline, name: str, steps: int) -> int:
    """Draw every strength -> how many; AssertionError where an end is not what it should be."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    image, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)

    def draw(image: Image.Image, strength: float, sampler: str = name) -> np.ndarray:
        settings = ImageToImageRequest(height=8, width=16, steps=steps, n_samples=1, strength=strength, sampler=sampler)
        return np.asarray(next(image_to_image(pipeline, image, "a cat", settings, progress=False)).image)

    round_trip = draw(image, 0.0, "ddim")
    for strength in STRENGTHS:
        result, walked = draw(image, strength), int(strength * steps)
        assert result.shape == pixels.shape
        assert np.array_equal(result, round_trip) == (walked == 0), (name, steps, strength)
        if walked == steps:
            assert np.array_equal(result, draw(other, strength)), (name, steps, strength)
    return len(STRENGTHS)
