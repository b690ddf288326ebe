"""Datasets of cached latents and text embeddings, which scripts/cache_latents.py writes.

A cache is a folder with the weights of the stages (ldm.models.cached) and a folder for each split: `index.json`,
`00000.safetensors` with the latents of some samples, `text-00000.safetensors` with the embeddings of some captions.
Sample n = variant * samples + index is row r = n % shard of file n // shard: its tensors are "r", the latent, and
"r.entries", its other entries as JSON.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from ldm.checkpoint import CheckpointError, open_weights
from ldm.checkpoint.formats import read_metadata
from ldm.config.consistency import pixel_factors, size_problems
from ldm.config.instantiate import ConfigError, resolve_alias, value_at
from ldm.config.types import PathText
from ldm.data.base import DataConfigError
from ldm.data.buckets import bucket_order
from ldm.data.order import epoch_order, lane_order
from ldm.data.shards import content_hash
from ldm.data.splits import SPLITS
from ldm.models.cached import EMBEDDING, CachedStage
from ldm.paths import expand_user

logger = logging.getLogger(__name__)

TARGET = "ldm.data.latents.CachedLatents"
INDEX, FORMAT = "index.json", 2
STAGES = {"first_stage": "CachedFirstStage", "cond_stage": "CachedEncoder"}  # and their classes in ldm.models.cached
_REMAKE = "make it with scripts/cache_latents.py, and set {param} to the folder of the split in it"
_REPAIR = "run the same command of scripts/cache_latents.py again, it writes what is missing"
_UNET_LAYERS = ("attention", "feed_forward", "convolutions")  # targets of adapters, and all that begin with unet
_NOT_COMPARED = {"ckpt_path", "ignore_keys", "lossconfig", "learn_logvar", "monitor", "device", "freeze"}  # of stages


class Stage(TypedDict):
    """The stage that a cache was made with: its target and params, and a hash of its weights."""

    config: dict[str, Any]
    fingerprint: str


class CacheIndex(TypedDict):
    """The content of `index.json`."""

    format: int
    complete: bool
    samples: int  # of the dataset
    variants: int
    seed: int
    shard: int  # samples in a file
    text_shard: int  # captions in a file
    captions: int  # different ones; 0 if the text is not cached
    dtype: str
    precision: str  # dtype in which the stages computed
    kind: str  # key of the latents in a batch
    text_key: str | None  # of the entry whose embedding is cached
    channels: int  # of a latent
    stages: dict[str, Stage]
    dataset: dict[str, Any]  # its target and params
    fingerprint: dict[str, Any]
    class_names: list[str] | None
    dtypes: dict[str, str]  # of the numeric entries that are arrays
    sizes: list[list[int]]  # height and width of the images: one, or those of the buckets
    batch: int  # samples of all ranks for which buckets were chosen; 0 without buckets
    bucket_of: list[int]  # the row of `sizes` of each sample, with buckets
    shard_lengths: list[int]  # samples of each shard of ImageShards; else empty
    lanes: int  # of ImageShards


class CachedLatents(Dataset):
    """Latents, embeddings and other entries of the samples of a dataset, as its cache holds them.

    root: the folder of the split in the cache. In epoch e each sample is in variant e mod V of the V that were cached:
    with crop, flip and choice of the caption as in epoch e mod V of a run that encodes the images itself with the seed
    of the cache. Validation uses variant 0. Posterior samples, noise and dropped conditions are new in each epoch. The
    order of an epoch is that of the dataset.

    Images in buckets keep the sizes that they have in the cache, so the batch of all ranks must divide that of the
    cache.
    """

    def __init__(self, root: PathText) -> None:
        self.root = expand_user(root)
        self.index = read_index(self.root)
        self.class_names = self.index["class_names"]
        self.fingerprint: dict[str, Any] = self.index["fingerprint"]
        self.buckets = self.index["sizes"] if self.index["batch"] else None
        self.bucket_of = np.array(self.index["bucket_of"], np.int64)  # of each sample
        self._open: dict[str, Any] = {}
        self._process = os.getpid()
        self._digests, self._rows = self._captions()
        count = f"{len(self):,} samples" + (f" in {v} variants" if (v := self.index["variants"]) > 1 else "")
        texts = f", {captions:,} embeddings" if (captions := self.index["captions"]) else ""
        logger.info("%s: latents of %s%s", self.root, count, texts)

    def __len__(self) -> int:
        return self.index["samples"]

    def set_batch(self, batch: int) -> None:
        """Raise DataConfigError unless the buckets of the cache consist of batches of this many samples."""
        if self.buckets is not None and self.index["batch"] % batch:
            problem = f"its buckets are of batches of {self.index['batch']} samples or its divisors, not of {batch}"
            advice = f"make a cache with --global_batch {batch}, or change data.params.batch_size x devices"
            raise DataConfigError("root", str(self.root), problem, advice)

    def order(self, seed: int, epoch: int, batch: int, shuffle: bool) -> np.ndarray:
        """Return the indices of an epoch -> (N,) int64; with buckets, each batch of all ranks has one size."""
        lengths = self.index["shard_lengths"] if shuffle else []
        if lengths:
            order = lane_order(lengths, self.index["lanes"], seed, epoch)
        else:
            order = epoch_order(len(self), seed, epoch, shuffle)
        return order if self.buckets is None else bucket_order(order, self.bucket_of, batch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample_of(0, index)

    def sample_of(self, epoch: int, index: int) -> dict[str, Any]:
        """Return a sample as it is in an epoch."""
        file, row = divmod(epoch % self.index["variants"] * len(self) + index, self.index["shard"])
        tensors = self._opened(f"{file:05}.safetensors")
        item: dict[str, Any] = {self.index["kind"]: tensors.get_tensor(str(row)).clone()}  # writable, in own memory
        for key, value in read_entries(tensors, row).items():
            dtype = self.index["dtypes"].get(key)
            item[key] = np.asarray(value, dtype)[()] if dtype or isinstance(value, list) else value
        if (text_key := self.index["text_key"]) is not None:
            file, row = divmod(self._row_of(item[text_key]), self.index["text_shard"])
            item[EMBEDDING] = self._opened(f"text-{file:05}.safetensors").get_slice("embeddings")[row]
        return item

    def file_of(self, index: int) -> str:
        """Return the file of a sample's first variant."""
        return str(self.root / f"{index // self.index['shard']:05}.safetensors")

    def _captions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of the captions, sorted, and the row of each."""
        files = range(-(-self.index["captions"] // self.index["text_shard"]))
        found = [self._opened(f"text-{file:05}.safetensors").get_tensor("digests") for file in files]
        digests = torch.cat(found).numpy() if found else np.zeros(0, np.int64)
        rows = np.argsort(digests)
        return digests[rows], rows

    def _row_of(self, text: str) -> int:
        digest = content_hash(text)
        place = int(np.searchsorted(self._digests, digest))
        assert place < len(self._digests) and self._digests[place] == digest  # the cache is complete
        return int(self._rows[place])

    def _opened(self, name: str) -> Any:
        """Return a memory-mapped file; they stay open, which takes no file handles."""
        if self._process != os.getpid():  # a forked data worker opens its own
            self._open, self._process = {}, os.getpid()
        if name not in self._open:
            self._open[name] = open_file(self.root / name)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files cannot be pickled


def open_file(path: Path) -> Any:
    """Open a file of a cache, memory-mapped. Raises ConfigError if it cannot be read."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); {_REPAIR}") from error


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata of a file of a cache; empty if it is missing or damaged."""
    try:
        return read_metadata(path)
    except CheckpointError:
        return {}


def read_entries(tensors: Any, row: int) -> dict[str, Any]:
    """Return the entries of a sample in an open file that are not its latent."""
    return json.loads(tensors.get_tensor(f"{row}.entries").numpy().tobytes())


def read_index(root: Path) -> CacheIndex:
    """Return the index of a complete split of a cache. Raises DataConfigError."""
    index = load_index(root)
    if index is None:
        raise DataConfigError("root", str(root), "is not a cache of latents", _REMAKE)
    if not index["complete"]:
        raise DataConfigError("root", str(root), "the cache is not complete", _REPAIR)
    return index


def load_index(root: Path) -> CacheIndex | None:
    """Return the index in a folder, of a complete cache or not; None if there is none. Raises DataConfigError."""
    try:
        index: CacheIndex = json.loads((root / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataConfigError("root", str(root), f"{INDEX} cannot be read ({error})", _REMAKE) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT or CacheIndex.__annotations__.keys() - index.keys():
        raise DataConfigError("root", str(root), f"its {INDEX} is not of version {FORMAT} of the cache", _REMAKE)
    return index


# ------------------------------------------------------------------------------------------------ stages of a model


def use_cached_stages(config: DictConfig) -> DictConfig:
    """Return the section `model` of a training config, its cached stages replaced by those of ldm.models.cached.

    Without a cache in the data it is returned as it is. Raises ConfigError if a cache was made with other stages than
    the config's, or if not all datasets are caches with the same stages.
    """
    roots = dict(_roots(config))
    if not roots:
        return config.model
    indices = {split: read_index(root) for split, root in roots.items()}
    first = next(iter(roots))
    stages = indices[first]["stages"]
    for split in (config.data.get("params") or {}).keys() & SPLITS.keys():
        place = f"data.params.{split}"
        if config.data.params[split] is not None and split not in roots:
            raise ConfigError(f"{place}: encodes images, but data.params.{first} is a cache: make a cache of both")
        if split in roots and indices[split]["stages"] != stages:
            raise ConfigError(f"{place}.params.root {roots[split]}: was made with other stages than {roots[first]}")
    model: Any = OmegaConf.create(OmegaConf.to_container(config.model, resolve=True))
    for split, root in roots.items():
        _check_model(model, indices[split], f"data.params.{split}.params.root {root}")
    for name, cls in STAGES.items():
        if name not in stages:
            continue
        file, place = roots[first].parent / f"{name}.safetensors", f"model.params.{name}_config"
        if metadata_of(file).get("fingerprint") != stages[name]["fingerprint"]:
            problem = "is not of this cache" if file.exists() else "no such file"
            raise ConfigError(f"{file}: {problem}; {_REPAIR}")
        given: Any = model.params[f"{name}_config"]
        _compare(place, given, stages[name]["config"], roots[first])
        weights = (given.get("params") or {}).get("ckpt_path")
        if weights:
            CachedStage(file).check(open_weights(expand_user(weights)).tensors(), str(weights))
        model.params[f"{name}_config"] = {"target": f"ldm.models.cached.{cls}", "params": {"file": str(file)}}
        logger.info("%-11s %s: outputs from %s", "cache", name, roots[first].parent)
    return model


def _check_model(model: DictConfig, index: CacheIndex, place: str) -> None:
    """Raise ConfigError if a model cannot use a split of a cache; place: its path in the YAML, and the folder."""
    channels = model.params.get("channels", 3)
    if index["channels"] != channels:
        raise ConfigError(f"{place}: its latents have {index['channels']} channels, the model {channels}")
    for size in index["sizes"]:
        for problem in size_problems(place, (size[0], size[1]), pixel_factors(model)):
            raise ConfigError(problem)
    if (cached := index["text_key"]) is None:
        return
    if (param := needs_encoder(model.params)) is not None:
        problem = f"model.params.{param} needs the text encoder, of which the cache has outputs only"
        raise ConfigError(f"{place}: {problem}; make another cache with it, or with --no-text")
    if (key := model.params.get("cond_stage_key", "image")) != cached:
        raise ConfigError(f"{place}: holds embeddings of {cached!r}, but model.params.cond_stage_key is {key!r}")


def needs_encoder(params: Mapping[str, Any]) -> str | None:
    """Return the parameter for which a model trains its text encoder, or calls a method of it; None without one."""
    for name in ("cond_stage_trainable", "cond_stage_forward", "token_embeddings"):
        if params.get(name):
            return name
    targets = value_at(params, "adapters", "targets") or ()
    other = [target for target in targets if target not in _UNET_LAYERS and not str(target).startswith("unet")]
    return "adapters.targets" if other else None


def _roots(config: DictConfig) -> Iterator[tuple[str, Path]]:
    """Yield (split, root) of each cache in the data of a config."""
    for split, node in (config.data.get("params") or {}).items():
        if isinstance(node, DictConfig) and resolve_alias(str(node.get("target"))) == TARGET:
            yield str(split), expand_user(str((node.get("params") or {}).get("root")))


def comparable(config: Any) -> dict[str, Any]:
    """Return a stage's config without what does not change its outputs, as {key: value}."""
    plain: Any = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    params = plain.get("params") or {}
    kept = {name: value for name, value in params.items() if name not in _NOT_COMPARED}
    return {"target": resolve_alias(str(plain["target"])), **kept}


def _compare(place: str, given: Any, cached: Mapping[str, Any], root: Path) -> None:
    """Raise ConfigError unless a stage of the config is that of the cache."""
    now: dict[str, Any] = comparable(given) if isinstance(given, Mapping | DictConfig) else {"target": given}
    before = comparable(cached)
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            where = f"{place}.{key}" if key == "target" else f"{place}.params.{key}"
            raise ConfigError(f"{where} {now.get(key)!r}: the cache {root} was made with {before.get(key)!r}")
