"""Every size from 64 to 256 pixels by 8 is drawn or refused with one that is; every number of prompts gives as many pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ldm.inference import load_model, text_to_image
from ldm.inference.settings import ModelInfo, TextToImageRequest, model_info, read_config
from ldm.paths import ROOT
from tests.tiny import save_text_model

SIDES = range(64, 257, 8)
CONFIGS = (
    "stable-diffusion/v1-inference",
    "latent-diffusion/txt2img-1p4B-eval",
    "retrieval-augmented-diffusion/768x768",
)


def run(parts: Iterable[str] = ("refusals", "pictures", "prompts")) -> Iterator[str]:
    """One line for each part."""
    if "refusals" in parts:
        for name in CONFIGS:
            taken, refused = count(model_info(read_config(ROOT / f"configs/{name}.yaml")))
            yield f"{name}: {taken} sizes taken, {refused} refused with the nearest that are taken"
    with tempfile.TemporaryDirectory() as folder:
        saved = save_text_model(Path(folder))
        pipeline = load_model(saved.config, saved.ckpt, device="cpu", precision="full")
        drawn = 0
        for height in SIDES if "pictures" in parts else ():
            for width in SIDES:
                settings = TextToImageRequest(height=height, width=width, steps=1, n_samples=1, n_iter=1, scale=1.0)
                (picture,) = text_to_image(pipeline, "a cat", settings, progress=False)
                assert picture.image.size == (width, height)
                drawn += 1
        if drawn:
            yield f"a model that takes multiples of 8: {drawn} of {len(SIDES) ** 2} sizes drawn"
        for n_prompts in range(1, 8) if "prompts" in parts else ():
            for n_iter in (1, 2, 3):
                settings = TextToImageRequest(height=8, width=8, steps=1, n_samples=3, n_iter=n_iter)
                pictures = list(
                    text_to_image(pipeline, [f"prompt {k}" for k in range(n_prompts)], settings, progress=False)
                )
                assert len(pictures) == n_prompts * n_iter
                assert [picture.info["prompt"] for picture in pictures] == [
                    f"prompt {k}" for k in range(n_prompts)
                ] * n_iter
        if "prompts" in parts:
            yield "1 to 7 prompts, 3 at once, 1 to 3 times: as many pictures as prompts x times"


def count(info: ModelInfo) -> tuple[int, int]:
    """(sizes taken, sizes refused); AssertionError where a refusal's advice is not taken."""
    taken = refused = 0
    for height in SIDES:
        for width in SIDES:
            try:
                TextToImageRequest(height=height, width=width).checked(info)
            except ValueError as error:
                words = str(error).split("nearest are ")[1].split()
                TextToImageRequest(height=int(words[1]), width=int(words[3])).checked(info)
                refused += 1
            else:
                taken += 1
    return taken, refused
