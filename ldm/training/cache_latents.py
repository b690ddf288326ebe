"""Encode the datasets of a training config once: latents and text embeddings, for ldm.data.latents."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm import tqdm

from ldm.atomic import locked, save_text
from ldm.checkpoint import ensure_weights, load_weights, open_weights, weights_on_meta, write_weights
from ldm.cli import counted
from ldm.config.consistency import pixel_factors, size_problems
from ldm.config.instantiate import (
    FIRST_STAGE_AS_CONDITION,
    UNCONDITIONAL,
    ConfigError,
    get_obj_from_str,
    instantiate_from_config,
    value_at,
)
from ldm.config.merge import changes
from ldm.data.base import DataConfigError
from ldm.data.datamodule import DataModuleFromConfig, unwrapped
from ldm.data.image_dataset import ImageDataset, digest
from ldm.data.laion import WebDataModuleFromConfig
from ldm.data.latents import (
    FORMAT,
    INDEX,
    TARGET,
    CacheIndex,
    Stage,
    load_index,
    metadata_of,
    needs_encoder,
    open_file,
    read_entries,
    read_index,
)
from ldm.data.order import SeededDataset
from ldm.data.shards import content_hash
from ldm.data.splits import SPLITS
from ldm.data.workers import Loader, Traced
from ldm.inference.precision import choose_device, resolve_precision
from ldm.models.cached import LATENT, MOMENTS, encode_texts, fingerprint_of, write_stage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.training import freeze
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.output.images import make_folder
from ldm.paths import expand_user

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "float32": torch.float32}
DATA_CONFIG = "data.yaml"  # in the cache: replaces the datasets of the config
SHARD, TEXT_SHARD = 1024, 1024  # samples and captions in a file
_SMALL = 64  # numbers in an array that is kept with a sample
_FLAGS = ("variants", "seed", "dtype")  # entries of an index that are named as their flags are
_CONTENT = "content"  # in the metadata of a file: a hash of what was encoded


@dataclass(frozen=True)
class CacheOptions:
    """Settings of an encoding run.

    variants: epochs whose crops, flips and captions are cached. dtype: of the cached tensors, a key of DTYPES.
    text: cache the text encoder's outputs too, if it is frozen. precision: as in scripts/txt2img.py.
    global_batch: samples of a batch of all ranks, which decides the buckets of images; None is data.params.batch_size.
    """

    out: Path
    seed: int
    variants: int = 1
    batch_size: int = 8
    num_workers: int = 2
    device: str = "auto"
    precision: str = "full"
    dtype: str = "float16"
    text: bool = True
    global_batch: int | None = None
    shard: int = SHARD
    text_shard: int = TEXT_SHARD


def cache_latents(config: DictConfig, options: CacheOptions, written: Mapping[str, Any] | None = None) -> Path:
    """Write the cache of a checked config's data for training and evaluation; return the YAML that trains on it.

    A stopped command continues where it was; files that are missing, damaged or of images that have changed are written
    again. written: section `data` of the YAMLs, without overrides, whose later changes training warns of. Raises
    ConfigError if the model needs more than latents and texts, or if the folder holds the cache of other data or
    stages.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    params = plain["model"]["params"]
    model = get_obj_from_str(config.model.target)
    if not issubclass(model, LatentDiffusion) or params["cond_stage_config"] == FIRST_STAGE_AS_CONDITION:
        raise ConfigError(f"model.target {config.model.target}: its condition cannot be cached, only texts and classes")
    data = instantiate_from_config(config.data)
    if not isinstance(data, DataModuleFromConfig):
        raise ConfigError(f"data.target {config.data.target}: set it to main.DataModuleFromConfig")
    data.dataset_configs = {split: data.dataset_configs[split] for split in SPLITS if split in data.dataset_configs}
    start = time.perf_counter()
    data.prepare_data()
    data.setup()
    overlay = _overlay(config.data, data, options.out, written or {})
    with _one_writer(options.out):
        encoder = _Encoder(plain["model"], options)
        for split, dataset in data.datasets.items():
            _cache_split(split, dataset, plain["data"]["params"][split], encoder, options, data.batch_size)
        save_text(options.out / DATA_CONFIG, OmegaConf.to_yaml(OmegaConf.create({"data": overlay})))
    counts = [f"{split} {_count_text(options.out / split)}" for split in data.datasets]
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file()) / 2**20
    seconds = time.perf_counter() - start
    logger.info("%s: %s; %s MiB, %.1f s", options.out, ", ".join(counts), f"{size:,.1f}", seconds)
    return options.out / DATA_CONFIG


def _count_text(folder: Path) -> str:
    index = read_index(folder)
    parts = {"image": index["samples"], "variant": index["variants"], "caption": index["captions"]}
    return f"({', '.join(counted(count, name) for name, count in parts.items() if count > (name == 'variant'))})"


def _overlay(config: DictConfig, data: DataModuleFromConfig, out: Path, written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `data` that replaces the datasets of a config by those of the cache."""
    caches = {split: {"target": TARGET, "params": {"root": str((out / split).absolute())}} for split in data.datasets}
    if not isinstance(data, WebDataModuleFromConfig):
        before = value_at(written, "params")
        return {"params": {split: {"_replace_": value_at(before, split) or True, **caches[split]} for split in caches}}
    shuffled = {split: bool(config.params[split].get("shuffle")) for split in caches}
    if not shuffled.get("train", True):
        raise ConfigError("data.params.train.shuffle 0: training on a cache shuffles its samples; set it to e.g. 1000")
    params = {"batch_size": data.batch_size, "num_workers": data.num_workers, **caches}
    params |= {"shuffle_val_dataloader": shuffled.get("validation", False)}
    return {"_replace_": dict(written) or True, "target": "main.DataModuleFromConfig", "params": params}


@contextmanager
def _one_writer(out: Path) -> Iterator[None]:
    make_folder(out)
    lock = out / ".lock"
    lock.touch()
    try:
        with locked(lock, wait=False):
            yield
    except BlockingIOError as error:
        raise ConfigError(f"--out {out}: another process writes this cache; wait for it") from error


class _Encoder:
    """The stages of a model, with their files in the cache."""

    def __init__(self, model: Mapping[str, Any], options: CacheOptions) -> None:
        self.params, self.options, self.pixel_factors = model["params"], options, pixel_factors(model)
        params = self.params
        self.image_key, self.text_key = params.get("first_stage_key", "image"), params.get("cond_stage_key", "image")
        self.device = choose_device(options.device)
        chosen = resolve_precision(options.precision, self.device)
        self.dtype = chosen.autocast or chosen.weights
        self.weights = open_weights(expand_user(path)).tensors() if (path := params.get("ckpt_path")) else {}
        self.stages: dict[str, Stage] = {}
        self.first_stage = self._stage("first_stage")
        conditional = params["cond_stage_config"] != UNCONDITIONAL
        reason = needs_encoder(params)
        self.caches_text = options.text and conditional and reason is None
        if options.text and conditional and reason is not None:
            logger.info("model.params.%s needs the text encoder in training: captions stay texts", reason)
        self.cond_stage: nn.Module | None = None

    def use_texts(self) -> None:
        """Build the text encoder."""
        if self.cond_stage is None:
            self.cond_stage = self._stage("cond_stage")

    def _stage(self, name: str) -> Any:
        """Return a stage with its weights, written to the cache too."""
        place = f"model.params.{name}_config"
        config = self.params[f"{name}_config"]
        params, prefix = dict(config.get("params") or {}), f"{name}_model."
        own = {key.removeprefix(prefix): x for key, x in self.weights.items() if key.startswith(prefix)}
        file_of_stage, ignored = params.pop("ckpt_path", None), params.pop("ignore_keys", ())
        if "lossconfig" in params:
            params["lossconfig"] = {"target": "torch.nn.Identity"}
            params.pop("learn_logvar", None)  # a parameter of the loss
        with weights_on_meta():
            stage = instantiate_from_config({"target": config["target"], "params": params})
        if own:
            load_weights(stage, self.params["ckpt_path"], weights=own)
        elif file_of_stage is not None:  # after construction: within it, its tensors would lose their values too
            load_weights(stage, expand_user(file_of_stage), ignored)
        ensure_weights(stage)
        if any(parameter.is_meta for parameter in stage.parameters()):
            raise ConfigError(f"{place}: has no weights; set model.params.ckpt_path or {place}.params.ckpt_path")
        freeze(stage).to(self.device)
        config = {**config, "params": params}
        null = self._encode_texts(stage, [""]) if name == "cond_stage" else None
        file = self.options.out / f"{name}.safetensors"
        found = metadata_of(file).get("fingerprint") or write_stage(file, stage, config, null)
        if found != fingerprint_of({f"stage.{key}": x for key, x in stage.state_dict().items()}):
            raise ConfigError(f"--out {self.options.out}: was made with another {name}; choose another folder")
        self.stages[name] = {"config": config, "fingerprint": found}
        return stage

    def _computing(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def encode_images(self, x: Tensor) -> tuple[str, Tensor]:
        """Return (key in a batch, latents or moments) of images (B, H, W[, C]), on the CPU."""
        x = (x[..., None] if x.ndim == 3 else x).to(self.device).permute(0, 3, 1, 2).contiguous().float()
        with self._computing():
            encoded = self.first_stage.encode(x)
        if isinstance(encoded, DiagonalGaussianDistribution):
            return MOMENTS, torch.cat([encoded.mean, encoded.logvar], dim=1).float().cpu()
        if not torch.is_tensor(encoded):
            raise ConfigError(
                "model.params.first_stage_config: must return a posterior or a tensor, as VQModelInterface"
            )
        return LATENT, encoded.float().cpu()

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        assert self.cond_stage is not None
        return self._encode_texts(self.cond_stage, texts)

    @torch.no_grad()
    def _encode_texts(self, stage: nn.Module, texts: Sequence[str]) -> Tensor:
        with self._computing():
            return encode_texts(stage, texts).float().cpu()


def _collate(image_key: str, samples: Sequence[Mapping[str, Any]]) -> tuple[Tensor, list[str]]:
    """Return the images of a batch, and the other entries of each sample as JSON."""
    images = torch.stack([torch.as_tensor(sample[image_key]) for sample in samples])
    return images, [json.dumps(_entries(sample, image_key)) for sample in samples]


def _entries(sample: Mapping[str, Any], image_key: str) -> dict[str, Any]:
    """Return the texts, numbers and short arrays of a sample. Raises ConfigError for other entries."""
    kept: dict[str, Any] = {}
    for key, value in sample.items():
        if key == image_key:
            continue
        if isinstance(value, np.ndarray | np.generic | Tensor) and np.size(value) <= _SMALL:
            value = value.tolist()
        if not isinstance(value, str | int | float | list):
            shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
            raise ConfigError(f"samples have {key!r}, a {type(value).__name__}{shape}: a cache holds texts and numbers")
        kept[key] = value
    return kept


def _cache_split(
    split: str, dataset: Any, config: Any, encoder: _Encoder, options: CacheOptions, batch_size: int
) -> None:
    place, folder = f"data.params.{split}", options.out / split
    dataset = unwrapped(dataset)
    if isinstance(dataset, IterableDataset):
        raise ConfigError(f"{place}: is a stream; shards are read by ldm.data.webdataset.ImageShards")
    if hasattr(dataset, "order") and not isinstance(dataset, ImageDataset):
        name = type(dataset).__name__
        raise ConfigError(f"{place}: a {name} cannot be cached, because its epochs may hold other samples")
    buckets = getattr(dataset, "buckets", None) is not None
    if buckets:
        dataset.set_batch(options.global_batch or batch_size)
        logger.info("buckets of %s: %s", split, dataset.bucket_text)
    seeded = SeededDataset(dataset, options.seed, repeat=split != "train")
    first = seeded[(0, 0)]
    if encoder.image_key not in first:
        raise ConfigError(f"model.params.first_stage_key {encoder.image_key!r}: {place} has {', '.join(sorted(first))}")
    kept, image = _entries(first, encoder.image_key), torch.as_tensor(first[encoder.image_key])
    arrays = {key: np.asarray(first[key]).dtype for key in kept if not isinstance(first[key], str | int | float | list)}
    sizes = dataset.bucket_sizes.tolist() if buckets else [list(image.shape[:2])]
    for size in sizes:
        for problem in size_problems(place, (size[0], size[1]), encoder.pixel_factors):
            raise ConfigError(problem)
    text_key = encoder.text_key if encoder.caches_text and isinstance(first.get(encoder.text_key), str) else None
    if text_key is not None:
        encoder.use_texts()
    kind, latent = encoder.encode_images(image[None])
    index: Any = {
        "format": FORMAT,
        "complete": False,
        "samples": len(dataset),
        "variants": options.variants if split == "train" else 1,
        "seed": options.seed,
        "shard": options.shard,
        "text_shard": options.text_shard,
        "captions": 0,
        "dtype": options.dtype,
        "precision": str(encoder.dtype).removeprefix("torch."),
        "kind": kind,
        "text_key": text_key,
        "channels": latent.shape[1] // (2 if kind == MOMENTS else 1),
        "stages": dict(encoder.stages),
        "dataset": config,
        "fingerprint": dict(getattr(dataset, "fingerprint", {})),
        "class_names": list(names) if (names := getattr(dataset, "class_names", None)) is not None else None,
        "dtypes": {key: str(dtype) for key, dtype in arrays.items() if dtype.kind in "biuf"},
        "sizes": sizes,
        "batch": dataset.batch if buckets else 0,
        "bucket_of": dataset.bucket_of.tolist() if buckets else [],
        "shard_lengths": getattr(dataset, "shard_lengths", []),
        "lanes": getattr(dataset, "lanes", 0),
    }
    index = json.loads(json.dumps(index))  # as it is read
    try:
        before = load_index(folder)
    except DataConfigError as error:
        advice = "delete it or choose another folder"
        raise ConfigError(f"--out {options.out}: {folder}: {error.problem}; {advice}") from error
    contents = _contents(dataset, index)
    pending = {number: each for number, each in enumerate(contents) if _content_of(_file(folder, number)) != each}
    if before is not None:
        _compare(before, index, bool(pending), f"--out {options.out}: {folder} is another cache")
    if before is not None and before["complete"]:
        texts = [_file(folder, number, "text-") for number in range(-(-before["captions"] // before["text_shard"]))]
        missing = len(pending) + sum(_content_of(file) is None for file in texts)
        if not missing:
            logger.info("%s: complete already", folder)
            return
        logger.info("%s: %d files are missing, damaged or of images that have changed", folder, missing)
    folder.mkdir(parents=True, exist_ok=True)
    save_text(folder / INDEX, json.dumps(index))
    _cache_images(split, seeded, folder, index, pending, encoder, options)
    if text_key is not None:
        index["captions"] = _cache_texts(folder, index, encoder, options)
    save_text(folder / INDEX, json.dumps({**index, "complete": True}))


def _compare(before: CacheIndex, now: CacheIndex, pending: bool, where: str) -> None:
    """Raise ConfigError if a folder holds another cache than the one that is to be written.

    pending: there are files to be written, perhaps because images have changed.
    """
    for name, old, new in changes(before, now):
        section, _, key = name.partition(".")
        if section in ("complete", "captions") or (pending and _is_content(section, key)):
            continue
        flag = f"--{name}" if name in _FLAGS else name
        problem = f"{flag} {old!r:.100} there, {new!r:.100} here"
        if section == "fingerprint":  # of hashes
            problem = f"the {key} of its dataset have changed"
        raise ConfigError(f"{where}, {problem}; delete it or choose another folder")


def _is_content(section: str, key: str) -> bool:
    """True for the part of a fingerprint that tells images of the same names apart."""
    return section == "fingerprint" and key.split()[-1] == "content"


def _file(folder: Path, number: int, prefix: str = "") -> Path:
    return folder / f"{prefix}{number:05}.safetensors"


def _content_of(file: Path) -> str | None:
    return metadata_of(file).get(_CONTENT)


def _contents(dataset: Any, index: CacheIndex) -> list[str]:
    """Return, for each file of latents, a hash of the sizes and times of the files that its samples are read from."""
    images = [value for key, value in index["fingerprint"].items() if _is_content("fingerprint", key)]

    @cache
    def state(path: str) -> list[Any]:
        try:
            found = os.stat(path)
        except OSError:  # a remote shard
            return images
        return [found.st_size, found.st_mtime_ns]

    def source(row: int) -> str:
        number = row % index["samples"]
        if hasattr(dataset, "shard_of"):
            return dataset.shards[dataset.shard_of(number)]
        return str(dataset.file_of(number)) if hasattr(dataset, "file_of") else ""

    total, size = index["samples"] * index["variants"], index["shard"]
    starts = range(0, total, size)
    files = (dict.fromkeys(map(source, range(start, min(start + size, total)))) for start in starts)
    return [digest([state(path) for path in each]) for each in files]


def _finite(values: Tensor, dtype: torch.dtype, name: Callable[[int], str]) -> Tensor:
    """Return values (B, ...) in a dtype; raise ConfigError, with the name of the row, for NaN and infinite ones."""
    values = values.to(dtype)
    finite = values.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        advice = "check the weights, and the image or caption, or use --precision full --dtype float32"
        raise ConfigError(f"{name(int(finite.int().argmin()))}: is encoded to values that are not finite; {advice}")
    return values


def _cache_images(
    split: str,
    seeded: SeededDataset,
    folder: Path,
    index: CacheIndex,
    pending: Mapping[int, str],
    encoder: _Encoder,
    options: CacheOptions,
) -> None:
    """Write files of latents. pending: their numbers, and the hash of what they hold."""
    total, size = index["samples"] * index["variants"], index["shard"]
    batches: list[list[int]] = []
    for number in pending:
        rows = np.arange(number * size, min((number + 1) * size, total))
        bucket_of = np.array(index["bucket_of"] or [0] * index["samples"])[rows % index["samples"]]
        for bucket in np.unique(bucket_of):  # the images of a batch have one size
            alike = rows[bucket_of == bucket].tolist()
            batches += [alike[k : k + options.batch_size] for k in range(0, len(alike), options.batch_size)]
    keys = [[divmod(n, index["samples"]) for n in batch] for batch in batches]
    workers = options.num_workers
    loader = Loader(
        Traced(seeded, workers) if workers else seeded,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=partial(_collate, encoder.image_key),
        pin_memory=encoder.device.type == "cuda",
    )
    done = total - sum(map(len, batches))
    tensors: dict[str, Tensor] = {}
    with tqdm(desc=f"{split} images", total=total, initial=done, unit="image", disable=None) as bar:
        for batch, (images, entries) in zip(batches, loader, strict=True):
            _, encoded = encoder.encode_images(images)
            paths = [json.loads(entry).get("file_path_", f"sample {n}") for n, entry in zip(batch, entries)]
            latents = _finite(encoded, DTYPES[index["dtype"]], paths.__getitem__)
            for n, latent, entry in zip(batch, latents, entries, strict=True):
                tensors[str(n % size)] = latent
                tensors[f"{n % size}.entries"] = torch.tensor(bytearray(entry.encode()), dtype=torch.uint8)
            number = batch[0] // size
            if len(tensors) == 2 * min(size, total - number * size):
                write_weights(tensors, _file(folder, number), {_CONTENT: pending[number]})
                tensors = {}
            bar.update(len(batch))


def _cache_texts(folder: Path, index: CacheIndex, encoder: _Encoder, options: CacheOptions) -> int:
    """Write the files of embeddings that do not exist, each different caption once; return the number of captions."""
    key, size = str(index["text_key"]), index["text_shard"]
    captions: dict[str, None] = {}
    total, rows = index["samples"] * index["variants"], index["shard"]
    for start in tqdm(range(0, total, rows), "captions", unit="file", leave=False, disable=None):
        tensors = open_file(_file(folder, start // rows))
        for row in range(min(rows, total - start)):
            captions[read_entries(tensors, row)[key]] = None
    texts = list(captions)
    with tqdm(desc="captions", total=len(texts), unit="caption", disable=None) as bar:
        for first in range(0, len(texts), size):
            own, file = texts[first : first + size], _file(folder, first // size, "text-")
            if _content_of(file) != (content := digest(own)):
                parts = [own[k : k + options.batch_size] for k in range(0, len(own), options.batch_size)]
                embeddings = torch.cat([encoder.encode_texts(part) for part in parts])
                embeddings = _finite(embeddings, DTYPES[index["dtype"]], own.__getitem__)
                digests = torch.tensor([content_hash(text) for text in own])
                write_weights({"embeddings": embeddings, "digests": digests}, file, {_CONTENT: content})
            bar.update(len(own))
    return len(texts)
