"""Samples of a model for its evaluation, written batch by batch: an interrupted run resumes to the same images."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.atomic import atomic_file, save_text
from ldm.config.model_info import ModelInfo
from ldm.evaluation.image_sets import DatasetImages
from ldm.evaluation.plan import without_places
from ldm.inference.pipeline import Pipeline
from ldm.inference.requests import ClassConditionalRequest, ConditionalRequest, TextToImageRequest
from ldm.inference.settings import MAX_SEED, Request
from ldm.inference.tasks.class_conditional import generate_samples
from ldm.inference.tasks.conditional import sample_conditional
from ldm.inference.tasks.text_to_image import text_to_image
from ldm.rng import mix

logger = logging.getLogger(__name__)

_BY_BATCH = ("prompt", "n_samples", "n_iter", "batch_size", "classes", "seed_mode")  # fields of one batch alone


class Sampling:
    """The samples of a request under the conditions of a set, in a random order, repeated; each has its own noise.

    conditions: of text-conditional models and of those that `sample_conditional` samples; the labels of
    class-conditional ones, which else take every class in turn. None for unconditional models.
    """

    def __init__(self, request: Request, info: ModelInfo, conditions: DatasetImages | None, batch_size: int) -> None:
        self.request, self.info, self.conditions, self.batch_size = request, info, conditions, batch_size
        self.order = np.random.default_rng(0).permutation(0 if conditions is None else len(conditions))
        if isinstance(request, (TextToImageRequest, ConditionalRequest)) and conditions is None:
            raise ValueError("--held_out: this model needs conditions; name a split of its data, e.g. validation")

    @property
    def record(self) -> dict[str, Any]:
        """The settings of every sample, as metadata."""
        record = {"task": self.request.task, **asdict(self.request)}
        record = {name: x for name, x in record.items() if name not in _BY_BATCH}
        return {**record, "batch_size": self.batch_size}

    def text(self, index: int) -> str | None:
        """The prompt of a sample; None for models without text."""
        if self.conditions is None or not self.info.takes_text:
            return None
        key = self.info.config["model"]["params"].get("cond_stage_key", "caption")
        value = self.conditions.sample(self._condition(index)).get(key)
        return value if isinstance(value, str) else None

    def label(self, index: int) -> int | None:
        """The class that a sample is to show; None without classes."""
        if self.conditions is not None:
            return self.conditions.label(self._condition(index))
        classes = self.info.n_classes
        if classes is None:
            return None
        every = [k for k in range(classes) if k != getattr(self.request, "null_class", None)]
        return every[index % len(every)]

    def _condition(self, index: int) -> int:
        return int(self.order[index % len(self.order)])

    def generate(self, pipeline: Pipeline, indices: range) -> list[np.ndarray]:
        """The samples of a batch, uint8 (H, W, 3), which depend on the indices alone."""
        first = mix(self.request.seed) + indices.start  # so that the samples of two seeds share no noise
        request = replace(self.request, seed=first % (MAX_SEED + 1))
        if isinstance(request, TextToImageRequest):
            images = text_to_image(pipeline, self._of_texts(request, indices), progress=False)
        elif isinstance(request, ClassConditionalRequest):
            images = generate_samples(pipeline, self._of_classes(request, indices), progress=False)
        else:
            assert isinstance(request, ConditionalRequest) and self.conditions is not None
            samples = [self.conditions.sample(self._condition(index)) for index in indices]
            batch = replace(request, n_samples=1, batch_size=len(indices))
            images = (each.image for each in sample_conditional(pipeline, samples, batch, progress=False))
        return [np.asarray(each.image.convert("RGB")) for each in images]

    def _of_texts(self, request: TextToImageRequest, indices: range) -> TextToImageRequest:
        texts = [self.text(index) for index in indices]
        prompts = [text for text in texts if text is not None]
        if len(prompts) < len(texts):
            assert self.conditions is not None
            raise ValueError(f"{self.conditions.name}: sample {indices[texts.index(None)]} has no text")
        return replace(request, prompt=prompts, n_samples=len(indices), n_iter=1, seed_mode="image")

    def _of_classes(self, request: ClassConditionalRequest, indices: range) -> ClassConditionalRequest:
        labels = [self.label(index) for index in indices]
        classes = tuple(label for label in labels if label is not None) or None
        classes = None if self.info.n_classes is None else classes
        return replace(request, n_samples=len(indices), batch_size=len(indices), classes=classes, seed_mode="image")


class SavedSamples:
    """Samples on disk, in files of a batch each; labels are those of their conditions."""

    def __init__(self, folder: Path, count: int, sampling: Sampling) -> None:
        self.folder, self.count, self.sampling = folder, count, sampling
        self.name, self.fingerprint = str(folder), ""
        self._read = lru_cache(maxsize=2)(self._open)

    def __len__(self) -> int:
        return self.count

    @property
    def batches(self) -> list[range]:
        size = self.sampling.batch_size
        return [range(first, min(first + size, self.count)) for first in range(0, self.count, size)]

    def file(self, batch: range) -> Path:
        return self.folder / f"{batch.start:06}-{batch.stop - 1:06}.npz"

    def image(self, index: int) -> np.ndarray:
        batch = self.batches[index // self.sampling.batch_size]
        return self._read(self.file(batch))[index - batch.start]

    def label(self, index: int) -> int | None:
        return self.sampling.label(index)

    @property
    def seconds(self) -> float:
        """Seconds of sampling of all batches, over all interruptions."""
        total = 0.0
        for batch in self.batches:
            with np.load(self.file(batch), allow_pickle=False) as file:
                total += float(file["seconds"])
        return total

    def _open(self, path: Path) -> np.ndarray:
        with np.load(path, allow_pickle=False) as file:
            return file["arr_0"]


def saved_samples(
    folder: Path,
    count: int,
    sampling: Sampling,
    identity: Mapping[str, Any],
    pipeline: Callable[[], Pipeline],
    progress: bool = True,
) -> SavedSamples:
    """`count` samples in a folder; batches that are there already are kept, and a model is loaded only for others.

    identity: of weights and conditions. Raises ValueError if the folder has samples of other settings.
    """
    settings = {**sampling.record, **identity}
    check_settings(folder / "settings.json", settings)
    samples = SavedSamples(folder, count, sampling)
    missing = [batch for batch in samples.batches if not samples.file(batch).is_file()]
    done = count - sum(map(len, missing))
    if missing and done:
        logger.info("%s: %d of %d samples are there, the others follow", folder, done, count)
    if not missing:
        return samples
    model = pipeline()
    with tqdm(total=count, initial=done, desc="samples", unit="image", disable=not progress) as bar:
        for batch in missing:
            start = time.perf_counter()
            images = np.stack(sampling.generate(model, batch))
            seconds = time.perf_counter() - start
            with atomic_file(samples.file(batch), images.nbytes) as temporary, temporary.open("wb") as file:
                np.savez(file, arr_0=images, seconds=np.float64(seconds))
            bar.update(len(batch))
    return samples


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings beside the samples; raise ValueError if others are there."""
    text = json.dumps(settings, indent=1, sort_keys=True, default=str) + "\n"
    if not path.is_file():
        save_text(path, text)
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged; delete {path.parent} to sample anew, or choose another --outdir") from error
    before, now = without_places(before), without_places(json.loads(text))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{path.parent} holds samples with {name} {before.get(name)}, now {now.get(name)}; choose another "
            "--outdir, or delete the folder"
        )
