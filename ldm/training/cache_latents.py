"""Encode the datasets of a training config once: latents and text embeddings, for ldm.data.latents."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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
from ldm.checkpoint.formats import read_metadata
from ldm.config.instantiate import (
    FIRST_STAGE_AS_CONDITION,
    UNCONDITIONAL,
    ConfigError,
    get_obj_from_str,
    instantiate_from_config,
    value_at,
)
from ldm.data.datamodule import DataModuleFromConfig, unwrapped
from ldm.data.latents import (
    FORMAT,
    INDEX,
    TARGET,
    CacheIndex,
    Stage,
    digest_of,
    load_index,
    open_file,
    read_entries,
)
from ldm.data.mixture import Mixture
from ldm.data.order import SeededDataset
from ldm.data.workers import Loader, Traced
from ldm.inference.precision import choose_device, resolve_precision
from ldm.models.cached import LATENT, MOMENTS, encode_texts, fingerprint_of, write_stage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.training import freeze
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.paths import expand_user

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
DTYPES = {"float16": torch.float16, "float32": torch.float32}
DATA_CONFIG = "data.yaml"  # in the cache: replaces the datasets of the config
SHARD, TEXT_SHARD = 1024, 1024  # samples and captions in a file
_SMALL = 64  # numbers in an array that is kept with a sample


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
    num_workers: int | None = None
    device: str = "auto"
    precision: str = "full"
    dtype: str = "float16"
    text: bool = True
    global_batch: int | None = None
    shard: int = SHARD
    text_shard: int = TEXT_SHARD


def cache_latents(config: DictConfig, options: CacheOptions) -> Path:
    """Write the cache of a checked config's training and validation data; return the YAML that trains on it.

    A stopped command continues where it was. Raises ConfigError if the model needs more than latents and texts, or if
    the folder holds the cache of other data or stages.
    """
    plain: Any = OmegaConf.to_container(config.model, resolve=True)
    params = plain["params"]
    model = get_obj_from_str(config.model.target)
    if not issubclass(model, LatentDiffusion) or params["cond_stage_config"] == FIRST_STAGE_AS_CONDITION:
        raise ConfigError(f"model.target {config.model.target}: its condition cannot be cached, only texts and classes")
    data = instantiate_from_config(config.data)
    if not isinstance(data, DataModuleFromConfig):
        raise ConfigError(f"data.target {config.data.target}: set it to main.DataModuleFromConfig")
    data.dataset_configs = {split: data.dataset_configs[split] for split in SPLITS if split in data.dataset_configs}
    data.prepare_data()
    data.setup()
    options.out.mkdir(parents=True, exist_ok=True)
    with _one_writer(options.out):
        encoder = _Encoder(params, options)
        for split, dataset in data.datasets.items():
            _cache_split(split, dataset, config.data.params[split], encoder, options, data.batch_size)
        datasets: Any = {
            split: {"_replace_": True, "target": TARGET, "params": {"root": str((options.out / split).absolute())}}
            for split in data.datasets
        }
        save_text(options.out / DATA_CONFIG, OmegaConf.to_yaml(OmegaConf.create({"data": {"params": datasets}})))
    return options.out / DATA_CONFIG


@contextmanager
def _one_writer(out: Path) -> Iterator[None]:
    lock = out / ".lock"
    lock.touch()
    try:
        with locked(lock, wait=False):
            yield
    except BlockingIOError as error:
        raise ConfigError(f"--out {out}: another process writes this cache; wait for it") from error


class _Encoder:
    """The stages of a model, with their files in the cache."""

    def __init__(self, params: Mapping[str, Any], options: CacheOptions) -> None:
        self.params, self.options = params, options
        self.image_key, self.text_key = params.get("first_stage_key", "image"), params.get("cond_stage_key", "image")
        self.device = choose_device(options.device)
        chosen = resolve_precision(options.precision, self.device)
        self.dtype = chosen.autocast or chosen.weights
        self.weights = open_weights(expand_user(path)).tensors() if (path := params.get("ckpt_path")) else {}
        self.stages: dict[str, Stage] = {}
        self.first_stage = self._stage("first_stage")
        frozen = not params.get("cond_stage_trainable") and not params.get("token_embeddings")
        frozen &= "text_encoder" not in (value_at(params, "adapters", "targets") or ())
        self.caches_text = options.text and frozen and params["cond_stage_config"] != UNCONDITIONAL
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
        found = read_metadata(file).get("fingerprint") if file.is_file() else write_stage(file, stage, config, null)
        if found != fingerprint_of({f"stage.{key}": x for key, x in stage.state_dict().items()}):
            raise ConfigError(f"--out {self.options.out}: was made with another {name}; choose another folder")
        self.stages[name] = {"config": config, "fingerprint": found}
        return stage

    def _computing(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

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


class _Collate:
    """(images, other entries of each as JSON) of a batch."""

    def __init__(self, image_key: str) -> None:
        self.image_key = image_key

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> tuple[Tensor, list[str]]:
        images = torch.stack([torch.as_tensor(sample[self.image_key]) for sample in samples])
        return images, [json.dumps(_entries(sample, self.image_key)) for sample in samples]


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
    if isinstance(dataset, Mixture):
        raise ConfigError(f"{place}: a mixture cannot be cached, because its samples differ from epoch to epoch")
    buckets = getattr(dataset, "buckets", None) is not None
    if buckets:
        dataset.set_batch(options.global_batch or batch_size)
    seeded = SeededDataset(dataset, options.seed, repeat=split != "train")
    first = seeded[(0, 0)]
    if encoder.image_key not in first:
        raise ConfigError(f"model.params.first_stage_key {encoder.image_key!r}: {place} has {', '.join(sorted(first))}")
    _entries(first, encoder.image_key)
    text_key = encoder.text_key if encoder.caches_text and isinstance(first.get(encoder.text_key), str) else None
    if text_key is not None:
        encoder.use_texts()
    kind, latent = encoder.encode_images(torch.as_tensor(first[encoder.image_key])[None])
    index: CacheIndex = {
        "format": FORMAT,
        "complete": False,
        "samples": len(dataset),
        "variants": options.variants if split == "train" else 1,
        "seed": options.seed,
        "shard": options.shard,
        "text_shard": options.text_shard,
        "captions": 0,
        "dtype": options.dtype,
        "kind": kind,
        "text_key": text_key,
        "channels": latent.shape[1] // (2 if kind == MOMENTS else 1),
        "stages": dict(encoder.stages),
        "dataset": json.loads(json.dumps(OmegaConf.to_container(config, resolve=True))),
        "fingerprint": dict(getattr(dataset, "fingerprint", {})),
        "class_names": list(names) if (names := getattr(dataset, "class_names", None)) is not None else None,
        "batch": dataset.batch if buckets else 0,
        "bucket_sizes": dataset.bucket_sizes.tolist() if buckets else [],
        "bucket_of": dataset.bucket_of.tolist() if buckets else [],
    }
    index = json.loads(json.dumps(index))
    before = load_index(folder)
    kept: dict[str, object] = {} if before is None else dict(before)
    for key, value in index.items() if kept else ():
        if key not in ("complete", "captions") and kept[key] != value:
            problem = f"its {key} is {kept[key]!r:.200}, now {value!r:.200}"
            raise ConfigError(f"--out {options.out}: {folder} is of another cache, {problem}; choose another folder")
    if before is not None and before["complete"]:
        logger.info("%s: complete already", folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_text(folder / INDEX, json.dumps(index))
    _cache_images(split, seeded, folder, index, encoder, options)
    if text_key is not None:
        index["captions"] = _cache_texts(folder, index, encoder, options)
    save_text(folder / INDEX, json.dumps({**index, "complete": True}))


def _files(folder: Path, index: CacheIndex) -> list[Path]:
    return [folder / f"{n:05}.safetensors" for n in range(-(-index["samples"] * index["variants"] // index["shard"]))]


def _cache_images(
    split: str, seeded: SeededDataset, folder: Path, index: CacheIndex, encoder: _Encoder, options: CacheOptions
) -> None:
    """Write the missing files of latents."""
    total, size = index["samples"] * index["variants"], index["shard"]
    pending = [number for number, file in enumerate(_files(folder, index)) if not file.is_file()]
    batches: list[list[int]] = []
    for number in pending:
        rows = np.arange(number * size, min((number + 1) * size, total))
        bucket_of = np.array(index["bucket_of"] or [0] * index["samples"])[rows % index["samples"]]
        for bucket in np.unique(bucket_of):  # the images of a batch have one size
            alike = rows[bucket_of == bucket].tolist()
            batches += [alike[k : k + options.batch_size] for k in range(0, len(alike), options.batch_size)]
    keys = [[divmod(n, index["samples"]) for n in batch] for batch in batches]
    workers = options.num_workers if options.num_workers is not None else 2
    loader = Loader(
        Traced(seeded, workers) if workers else seeded,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_Collate(encoder.image_key),
        pin_memory=encoder.device.type == "cuda",
    )
    done = total - sum(map(len, batches))
    bar = tqdm(desc=f"{split} images", total=total, initial=done, unit="image", disable=None)
    tensors: dict[str, Tensor] = {}
    with bar:
        for batch, (images, entries) in zip(batches, loader, strict=True):
            _, latents = encoder.encode_images(images)
            for n, latent, entry in zip(batch, latents, entries, strict=True):
                tensors[str(n % size)] = latent.to(DTYPES[index["dtype"]])
                tensors[f"{n % size}.entries"] = torch.tensor(bytearray(entry.encode()), dtype=torch.uint8)
            number = batch[0] // size
            if len(tensors) == 2 * min(size, total - number * size):
                write_weights(tensors, folder / f"{number:05}.safetensors")
                tensors = {}
            bar.update(len(batch))


def _cache_texts(folder: Path, index: CacheIndex, encoder: _Encoder, options: CacheOptions) -> int:
    """Write the missing files of embeddings, each different caption once; return the number of captions."""
    key, size = str(index["text_key"]), index["text_shard"]
    captions: dict[str, None] = {}
    for number, file in enumerate(tqdm(_files(folder, index), "captions", unit="file", leave=False, disable=None)):
        tensors, total = open_file(file), index["samples"] * index["variants"]
        for row in range(min(index["shard"], total - number * index["shard"])):
            captions[read_entries(tensors, row)[key]] = None
    texts = list(captions)
    bar = tqdm(desc="captions", total=len(texts), unit="caption", disable=None)
    with bar:
        for first in range(0, len(texts), size):
            own, file = texts[first : first + size], folder / f"text-{first // size:05}.safetensors"
            if not file.is_file():
                parts = [own[k : k + options.batch_size] for k in range(0, len(own), options.batch_size)]
                embeddings = [encoder.encode_texts(part).to(DTYPES[index["dtype"]]) for part in parts]
                digests = torch.tensor([digest_of(text) for text in own])
                write_weights({"embeddings": torch.cat(embeddings), "digests": digests}, file)
            bar.update(len(own))
    return len(texts)
