"""img2img with all strengths, several step counts and all samplers: from the first stage's round trip to pure noise."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.inference import Pipeline, image_to_image, load_model
from ldm.inference.requests import ImageToImageRequest
from ldm.models.diffusion.samplers.registry import SAMPLERS
from tests.tiny import save_text_model

STRENGTHS = [k / 20 for k in range(21)]
STEPS = (1, 5, 20, 50)


def run(names: Iterable[str] = SAMPLERS) -> Iterator[str]:
    """Yield one line per sampler."""
    with tempfile.TemporaryDirectory() as folder:
        saved = save_text_model(Path(folder))
        pipeline = load_model(saved.config, saved.ckpt, device="cpu", precision="full")
        for name in names:
            count = sum(check(pipeline, name, steps) for steps in STEPS)
            steps = ", ".join(map(str, STEPS))
            ends = "0 is the first stage's round trip, 1 does not depend on the image"
            yield f"{name}: {count} images of {len(STRENGTHS)} strengths in {steps} steps; {ends}"


def check(pipeline: Pipeline, name: str, steps: int) -> int:
    """Generate every strength and return their number; AssertionError if strength 0 or 1 is wrong."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    image, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)

    def generate(image: Image.Image, strength: float, sampler: str = name) -> np.ndarray:
        size = {"height": 8, "width": 16, "n_samples": 1}
        request = ImageToImageRequest(prompt="a cat", steps=steps, strength=strength, sampler=sampler, **size)
        return np.asarray(next(image_to_image(pipeline, image, request, progress=False)).image)

    round_trip = generate(image, 0.0, "ddim")
    for strength in STRENGTHS:
        result, steps_run = generate(image, strength), int(strength * steps)
        assert result.shape == pixels.shape
        assert np.array_equal(result, round_trip) == (steps_run == 0), (name, steps, strength)
        if steps_run == steps:
            assert np.array_equal(result, generate(other, strength)), (name, steps, strength)
    return len(STRENGTHS)
