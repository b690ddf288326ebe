"""Samples of any conditional model: the model's own `get_input` builds the conditions from a dataset or named files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from ldm.config.merge import merge
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.image import from_tensor
from ldm.data.order import SeededDataset
from ldm.inference.pipeline import Conditioned, Pipeline, progress_bar
from ldm.inference.randomness import Randomness
from ldm.inference.requests import ConditionalRequest
from ldm.inference.runs import SavedRun
from ldm.models.diffusion.conditioning import normalize_condition
from ldm.models.diffusion.image_log import condition_images
from ldm.output.images import GeneratedImage
from ldm.rng import preserve_rng, seed_generators
from ldm.visualize import to_image

FIRST = 8  # samples of a dataset if their indices are not given

Sample = Mapping[str, Any]
"""A sample as a dataset returns it: images (H, W, C) in [-1, 1], texts, labels."""


class ReadBatch(dict[str, Any]):
    """A batch that records which of its keys are read."""

    def __init__(self, batch: Mapping[str, Any]) -> None:
        super().__init__(batch)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)


class ConditionalSample(NamedTuple):
    """A generated image, and the input and the conditions that it was generated from, as the network sees them."""

    image: GeneratedImage
    shown: dict[str, Image.Image]


def read_samples(
    run: SavedRun, overrides: Sequence[str], split: str, indices: Sequence[int] | None, seed: int
) -> list[Sample]:
    """Return samples of a run's dataset; random crops, flips and masks follow from the seed and the index.

    overrides: of the run's config. indices: None for the first ones, at most FIRST.
    Raises ValueError for a split that the config does not have and for an index beyond the dataset.
    """
    config = merge(run.configs, overrides)
    params: Any = OmegaConf.to_container(config.get("data") or OmegaConf.create(), resolve=True)
    params = params.get("params") or {}
    splits = [name for name in ("train", "validation", "test", "predict") if params.get(name)]
    if split not in splits:
        known = f"choose one of {', '.join(splits)}" if splits else "its config has no section data"
        raise ValueError(f"--batch {split}: this run has no such dataset; {known}")
    data = DataModuleFromConfig(1, num_workers=0, wrap=bool(params.get("wrap")), **{split: params[split]})
    data.prepare_data()
    data.setup()
    dataset = data.datasets[split]
    if isinstance(dataset, IterableDataset):
        with preserve_rng():
            seed_generators(seed, all_devices=False)
            read: Any = list(itertools.islice(dataset, FIRST if indices is None else max(indices) + 1))
    else:
        read = SeededDataset(dataset, seed, repeat=True)
    count = len(read)
    if indices is None:
        indices = range(min(FIRST, count))
    if max(indices) >= count:
        raise ValueError(f"--batch {split}:{max(indices)}: the dataset has {count} samples, 0 to {count - 1}")
    return [read[index] for index in indices]


def sample_conditional(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    request: ConditionalRequest,
    progress: bool = True,
    named: Sequence[str] = (),
) -> Iterator[ConditionalSample]:
    """Generate `n_samples` images under the conditions of each sample, `batch_size` samples at a time.

    samples: as the model's dataset returns them; one without the image that the model is trained on has the size of
    training. named: keys that the model must read. Raises ValueError for conditions that do not fit the model.
    """
    request = request.checked(pipeline.info)
    assert request.steps is not None and request.scale is not None
    model: Any = pipeline.model  # LatentDiffusion
    randomness, record = Randomness(request.seed, pipeline.device), {**request.record(), **pipeline.identity}
    samples, n, key = [dict(sample) for sample in samples], request.n_samples, model.first_stage_key
    given = key in samples[0]
    if not given:
        side = [length * (pipeline.info.factor or 1) for length in pipeline.info.image_size]
        samples = [{**sample, key: np.zeros((*side, 3), np.float32)} for sample in samples]

    def encoded() -> Iterator[tuple[int, Tensor, Conditioned, dict[str, Tensor]]]:
        """(index of the first sample, latents, conditioning, what the grid shows) of each batch."""
        for first in range(0, len(samples), request.batch_size):
            batch = ReadBatch(default_collate(samples[first : first + request.batch_size]))
            with randomness(), pipeline.sampling():
                try:
                    z, cond, raw = model.get_input(batch, key, force_c_encode=True, return_original_cond=True)[:3]
                except ValueError as error:
                    missing = str(error).partition(": ")[0]
                    if not named or "the batch has no" not in missing:
                        raise
                    advice = "add --condition KEY=VALUE for it, or --batch for the rest of a sample"
                    raise ValueError(f"--condition {', '.join(named)}: {missing}; {advice}") from error
                _check_condition(pipeline, z, cond)
                unread = set(named) - batch.keys_read
                if unread and batch.keys_read:  # an override of get_input may copy the batch
                    known = ", ".join(sorted(batch.keys_read))
                    raise ValueError(f"--condition {min(unread)}: this model does not read it; it reads {known}")
                uncond = None
                if request.scale != 1.0:
                    uncond = model.unconditional_like(cond, raw, len(z), request.negative_prompt or None)
                x = model.get_images(batch, key)
                shown = {"input": x} if given else {}
                shown |= condition_images(model, batch, raw, x, z.shape[2:]) | model.further_images(batch, x, cond)
            yield first, z, Conditioned(cond, uncond, request.scale or 1.0), shown

    rest = encoded()
    batches = itertools.chain([next(rest)], rest)  # errors of the first one come before the progress bar
    with progress_bar(-(-len(samples) // request.batch_size) * n * request.steps, progress) as bar:
        for first, z, conditions, shown in batches:
            conditions = conditions._replace(callback=lambda i: bar.update())
            for repeat in range(n):
                with randomness(), pipeline.sampling(request):
                    images = pipeline.decode(pipeline.sample(request, z.shape, conditions))
                for k, image in enumerate(images):
                    info = {**record, "image_index": (first + k) * n + repeat, **_described(samples[first + k])}
                    views = {name: to_image(view[k]) for name, view in shown.items() if _is_view(view, len(z))}
                    yield ConditionalSample(GeneratedImage(from_tensor(image), info), views)


def _check_condition(pipeline: Pipeline, z: Tensor, cond: Any) -> None:
    """Raise ValueError if the channels that are concatenated with the latents z (B, c, h, w) do not fit them."""
    model: Any = pipeline.model
    parts = normalize_condition(cond, model.model.conditioning_key).get("c_concat", ())
    shapes = ["x".join(map(str, part.shape[1:])) for part in parts]
    size = "x".join(map(str, z.shape[2:]))
    if any(part.shape[2:] != z.shape[2:] for part in parts):
        raise ValueError(f"the condition is {', '.join(shapes)} (channels, height, width), the latent {size} cells")
    channels, wanted = sum(part.shape[1] for part in parts), pipeline.info.concat_channels
    if channels != wanted:
        raise ValueError(f"the condition has {channels} channels ({', '.join(shapes)}), this model takes {wanted}")


def _is_view(view: Any, count: int) -> bool:
    return torch.is_tensor(view) and view.ndim == 4 and len(view) == count and view.shape[1] in (1, 3)


def _described(sample: Sample) -> dict[str, Any]:
    """The texts and numbers of a sample as metadata, under `condition`."""
    values = {name: x.item() if np.ndim(x) == 0 and hasattr(x, "item") else x for name, x in sample.items()}
    return {"condition": {name: x for name, x in values.items() if isinstance(x, (str, int, float))}}
