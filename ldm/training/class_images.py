"""Class images of DreamBooth (arXiv 2208.12242, section 3.2): missing ones are generated before training."""

from __future__ import annotations

import inspect
import itertools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from ldm.checkpoint.source import base_of
from ldm.config.consistency import ADAPTERS
from ldm.config.instantiate import ConfigError, accepted_params, convert_params, get_obj_from_str, resolve_alias
from ldm.config.model_info import model_info
from ldm.data.image import height_and_width
from ldm.data.listing import scan
from ldm.inference.pipeline import load_model
from ldm.inference.requests import TextToImageRequest
from ldm.inference.settings import MAX_SEED
from ldm.inference.tasks.text_to_image import text_to_image
from ldm.output.images import GeneratedImage, checked, marked, read_metadata, write_new
from ldm.paths import expand_user

if sys.platform == "linux":
    import fcntl

logger = logging.getLogger(__name__)

TARGET = "ldm.data.dreambooth.ClassImages"


@dataclass(frozen=True)
class _Wanted:
    """Parameters of a ClassImages dataset that its generation uses."""

    root: Path
    prompt: str
    count: int
    scale: float
    steps: int
    batch_size: int
    size: Any


def generate_class_images(config: DictConfig, seed: int, device: str = "auto") -> int:
    """Generate what each ClassImages dataset of a training config lacks; return the number of new images.

    Existing images count, whoever made them. Image k has the noise of seed + k, so a stopped run continues where it
    was. Of several processes one generates and the others wait. Raises ConfigError without `model.params.ckpt_path`.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return sum(_fill(plain, path, wanted, seed, device) for path, wanted in _class_images(plain["data"], "data"))


def lacking_class_images(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (path, "FOLDER lacks N images") of each ClassImages dataset that a run would fill."""
    for path, wanted in _class_images(config["data"], "data"):
        missing = wanted.count - (len(scan(wanted.root)) if wanted.root.is_dir() else 0)
        if missing > 0:
            yield path, f"{wanted.root} lacks {missing} images"


def _class_images(node: Any, path: str) -> Iterator[tuple[str, _Wanted]]:
    """Yield (path, parameters) of each ClassImages below a node of a config."""
    if isinstance(node, Mapping):
        if isinstance(target := node.get("target"), str) and resolve_alias(target) == TARGET:
            cls, params = get_obj_from_str(target), node.get("params") or {}
            annotations, _ = accepted_params(cls) or ({}, set())
            given = inspect.signature(cls).bind(**convert_params(params, annotations, f"{path}.params"))
            given.apply_defaults()
            values = {each.name: given.arguments[each.name] for each in fields(_Wanted)}
            yield path, _Wanted(**{**values, "root": expand_user(values["root"])})
        for key, value in node.items():
            yield from _class_images(value, f"{path}.{key}")


def _fill(config: Mapping[str, Any], path: str, wanted: _Wanted, seed: int, device: str) -> int:
    try:
        wanted.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path}.params.root {wanted.root}: is no folder and cannot be created ({error.strerror})"
        ) from error
    if not wanted.prompt.strip():
        raise ConfigError(f"{path}.params.prompt {wanted.prompt!r}: is blank; set it to words, e.g. a photo of a dog")
    with _one_process(wanted.root):
        _check_present(path, wanted)
        present = len(scan(wanted.root))
        missing = wanted.count - present
        if missing <= 0:
            return 0
        logger.info("%-11s %s: %d of %d, generating %d", "class images", wanted.root, present, wanted.count, missing)
        absent = (k for k in itertools.count() if not _file(wanted, k).exists())
        numbers = list(itertools.islice(absent, missing))
        images = zip(numbers, _generate(config, path, wanted, numbers, seed, device), strict=True)
        for number, image in tqdm(images, "class images", missing, unit="image", disable=None):
            write_new(iter([_file(wanted, number)]), marked(checked(image, None), None))
    return missing


def _check_present(path: str, wanted: _Wanted) -> None:
    """Raise ConfigError if images that were generated here before have another prompt."""
    for file in sorted(wanted.root.glob("class-*.png")):
        try:
            before = read_metadata(file).get("prompt")
        except (OSError, ValueError):  # of another program
            continue
        if isinstance(before, str) and before != wanted.prompt:
            raise ConfigError(
                f"{path}.params.prompt {wanted.prompt!r}: {file} was generated with {before!r}; set {path}.params.root "
                "to another folder, or remove these images"
            )


def _file(wanted: _Wanted, number: int) -> Path:
    return wanted.root / f"class-{number:05}.png"


def _generate(
    config: Mapping[str, Any], path: str, wanted: _Wanted, numbers: Sequence[int], seed: int, device: str
) -> Iterator[GeneratedImage]:
    """Yield the images of these numbers, by the weights that training starts from."""
    model = config["model"]
    ckpt = model["params"].get("ckpt_path")
    if ckpt is None:
        raise ConfigError(
            f"{path}.params.count {wanted.count}: {wanted.root} lacks {len(numbers)} images; set "
            "model.params.ckpt_path to the weights that generate them"
        )
    # Sections of an earlier run are kept: its checkpoint holds their weights.
    new = ADAPTERS if base_of(ckpt) is None else ()
    params = {name: value for name, value in model["params"].items() if name not in new}
    info = model_info(OmegaConf.create({"model": {**model, "params": params}}))
    height, width = height_and_width(wanted.size)
    request = TextToImageRequest(
        prompt=wanted.prompt,
        scale=wanted.scale,
        steps=wanted.steps,
        height=height,
        width=width,
        n_iter=1,
        seed_mode="image",
    )
    try:
        request.checked(info)
    except ValueError as error:
        raise ConfigError(f"{path}: its images cannot be generated: {error}") from error
    on_frozen_base = len(params) < len(model["params"])  # which is the EMA weights, see ldm.models.diffusion.adapters
    pipeline = load_model(info, ckpt, device, use_ema=info.use_ema or on_frozen_base)
    for batch in _batches(numbers, wanted.batch_size):
        part = replace(request, seed=(seed + batch[0]) % (MAX_SEED + 1), n_samples=len(batch))
        yield from text_to_image(pipeline, part, progress=False)


def _batches(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield batches of consecutive numbers."""
    batch: list[int] = []
    for number in numbers:
        if batch and (len(batch) == size or number != batch[-1] + 1):
            yield batch
            batch = []
        batch.append(number)
    yield batch


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Wait until no other process generates into this folder."""
    if sys.platform != "linux":
        yield
        return
    with open(folder / ".lock", "a+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield
