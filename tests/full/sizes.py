"""Every size from 64 to 256 pixels by 8 is generated or refused with a valid one; N prompts give N images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ldm.config.model_info import ModelInfo, read_model_info
from ldm.inference import load_model, text_to_image
from ldm.inference.requests import RetrievalRequest, TextToImageRequest
from ldm.paths import ROOT
from tests.tiny import save_text_model

SIDES = range(64, 257, 8)
CONFIGS = (
    "stable-diffusion/v1-inference",
    "latent-diffusion/txt2img-1p4B-eval",
    "retrieval-augmented-diffusion/768x768",
)


def run(parts: Iterable[str] = ("refusals", "images", "prompts")) -> Iterator[str]:
    """Yield one line per part."""
    if "refusals" in parts:
        for name in CONFIGS:
            cls = RetrievalRequest if name.startswith("retrieval") else TextToImageRequest
            accepted, refused = count(read_model_info(ROOT / f"configs/{name}.yaml"), cls)
            yield f"{name}: {accepted} sizes accepted, {refused} refused with the nearest valid size"
    with tempfile.TemporaryDirectory() as folder:
        saved = save_text_model(Path(folder))
        pipeline = load_model(saved.config, saved.ckpt, device="cpu", precision="full")
        done = 0
        for height in SIDES if "images" in parts else ():
            for width in SIDES:
                size = {"height": height, "width": width, "steps": 1, "n_samples": 1, "n_iter": 1, "scale": 1.0}
                (generated,) = text_to_image(pipeline, TextToImageRequest(prompt="a cat", **size), progress=False)
                assert generated.image.size == (width, height)
                done += 1
        if done:
            yield f"a model for multiples of 8: {done} of {len(SIDES) ** 2} sizes generated"
        for n_prompts in range(1, 8) if "prompts" in parts else ():
            for n_iter in (1, 2, 3):
                prompts = [f"prompt {k}" for k in range(n_prompts)]
                request = TextToImageRequest(prompt=prompts, height=8, width=8, steps=1, n_samples=3, n_iter=n_iter)
                images = list(text_to_image(pipeline, request, progress=False))
                assert [generated.info["prompt"] for generated in images] == prompts * n_iter
        if "prompts" in parts:
            yield "1 to 7 prompts, batches of 3, 1 to 3 iterations: prompts x iterations images"


def count(info: ModelInfo, cls: type[TextToImageRequest]) -> tuple[int, int]:
    """Return the numbers of accepted and refused sizes; AssertionError if the size advised by a refusal is refused."""
    accepted = refused = 0
    for height in SIDES:
        for width in SIDES:
            try:
                cls(height=height, width=width).checked(info)
            except ValueError as error:
                words = str(error).split("nearest are ")[1].split()
                cls(height=int(words[1]), width=int(words[3])).checked(info)
                refused += 1
            else:
                accepted += 1
    return accepted, refused
