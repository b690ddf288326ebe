"""Sets of images to evaluate: a split of a run's data, a folder, an .npz file, samples on disk."""

from __future__ import annotations

import hashlib
import itertools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from omegaconf import OmegaConf
from torch.utils.data import IterableDataset

from ldm.config.instantiate import value_at
from ldm.config.merge import merge
from ldm.data.datamodule import SPLITS, DataModuleFromConfig
from ldm.data.folder import ImageFolder
from ldm.data.image import BadImageError, from_array
from ldm.data.image_dataset import digest
from ldm.data.order import SeededDataset
from ldm.inference.runs import SavedRun
from ldm.rng import preserve_rng, seed_generators

PROBES = 16  # images whose pixels are part of a fingerprint
MAX_CLASSES = 100_000  # in an .npz


class ImageSet(Protocol):
    """Images of one size, read one by one."""

    name: str  # in the card
    fingerprint: str  # of the images, their order and their preprocessing

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3)."""
        ...

    def label(self, index: int) -> int | None:
        """The class; None without classes."""
        ...


class DatasetImages:
    """The images of a dataset as a run trains on them; its random crops follow from (seed, index).

    limit: of their number; a random part is taken, since a dataset may be sorted, but of a stream the first.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        image_key: str,
        identity: object,
        seed: int = 0,
        limit: int | None = None,
        label_key: str = "class_label",
    ) -> None:
        self.name, self.image_key, self.label_key = name, image_key, label_key
        # Without decoding images; with on_error skip, another image with its own label may take the place of one.
        in_folders = type(dataset) is ImageFolder and dataset.on_error == "raise" and label_key == "class_label"
        self.labels = dataset.labels if in_folders else None
        if isinstance(dataset, IterableDataset):
            with preserve_rng():
                seed_generators(seed, all_devices=False)
                self.samples: Any = list(itertools.islice(dataset, limit))
        else:
            self.samples = SeededDataset(dataset, seed, repeat=True)
        every = len(self.samples)
        part = limit is not None and limit < every
        self.order = np.random.default_rng(seed).permutation(every)[:limit] if part else np.arange(every)
        self.count = len(self.order)
        probes = np.linspace(0, self.count - 1, min(PROBES, self.count)).astype(int)
        pixels = b"".join(self.image(int(k)).tobytes() for k in probes)
        own = getattr(dataset, "fingerprint", None)
        known = [identity, seed, self.count, own, hashlib.sha256(pixels).hexdigest()]
        self.fingerprint = digest(known)

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Mapping[str, Any]:
        try:
            return self.samples[int(self.order[index])]
        except BadImageError as error:  # whose cause has no advice on a dataset's settings
            raise ValueError(f"{self.name}: {error.__cause__ or error}; repair or remove it") from error

    def image(self, index: int) -> np.ndarray:
        sample = self.sample(index)
        if self.image_key not in sample:
            raise ValueError(f"{self.name}: its samples have no {self.image_key!r}; they have {', '.join(sample)}")
        return as_levels(sample[self.image_key])

    def label(self, index: int) -> int | None:
        if self.labels is not None:
            return int(self.labels[int(self.order[index])])
        label = self.sample(index).get(self.label_key)
        return None if label is None else int(label)


class ArrayImages:
    """Images of an array uint8 (N, H, W, 3), with labels (N,) or without."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.name, self.images, self.labels = name, images, labels
        self.fingerprint = digest([list(images.shape), hashlib.sha256(images.tobytes()).hexdigest()])

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        return self.images[index]

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])


def as_levels(image: Any) -> np.ndarray:
    """An image of a sample, float (H, W, 1 or 3) in [-1, 1], as uint8 (H, W, 3)."""
    return np.asarray(from_array(np.asarray(image)).convert("RGB"))


def has_split(run: SavedRun, overrides: Sequence[str], split: str) -> bool:
    return split in _splits(merge(run.configs, overrides))


def _splits(config: Any) -> dict[str, Any]:
    """The configs of a run's datasets by split."""
    params: Any = OmegaConf.to_container(config.get("data") or OmegaConf.create(), resolve=True)
    params = params.get("params") or {}
    return {name: params[name] for name in SPLITS if params.get(name)}


def open_split(
    run: SavedRun, overrides: Sequence[str], split: str, flag: str, seed: int = 0, limit: int | None = None
) -> DatasetImages:
    """A split of a run's data; raise ValueError for one that its config does not have."""
    config = merge(run.configs, overrides)
    splits = _splits(config)
    if split not in splits:
        known = f"choose one of {', '.join(splits)}" if splits else "its config has no section data"
        raise ValueError(f"{flag} {split}: this run has no such dataset; {known}")
    data = DataModuleFromConfig(1, num_workers=0, **{split: splits[split]})
    data.prepare_data()
    data.setup()
    model: Any = value_at(config, "model", "params") or {}
    key = model.get("first_stage_key") or model.get("image_key") or "image"
    stage = model.get("cond_stage_config")
    of_class = str(value_at(stage, "target")).endswith(".ClassEmbedder")
    label_key = (value_at(stage, "params", "key") or "class") if of_class else "class_label"
    name = f"{split} of {run.folder.resolve().name}"
    return DatasetImages(name, data.datasets[split], key, splits[split], seed, limit, label_key)


def open_folder(path: Path, flag: str, size: int | None, limit: int | None = None) -> DatasetImages:
    """The images below a folder, scaled and cropped centrally to `size`; None for their own size, one for all."""
    try:
        dataset = ImageFolder(str(path), size=size) if size else _own_size(path)
        return DatasetImages(str(path), dataset, "image", [path.name, size], limit=limit)
    except BadImageError as error:
        raise ValueError(f"{flag}: {error}") from error


def _own_size(path: Path) -> ImageFolder:
    """The images of a folder at their own size; raise ValueError if they have several."""
    sizes = {(int(w), int(h)) for w, h in ImageFolder(str(path), size=None, crop_size=2).sizes}
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:3])
        raise ValueError(f"{path}: images of {len(sizes)} sizes ({shown}, ...); pass --size to scale and crop them")
    [(width, height)] = sizes
    return ImageFolder(str(path), size=(height, width))


def read_npz(path: Path, flag: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz: images `arr_0` uint8 (N, H, W, 3), labels `arr_1`, `features` (N, D), or `mu`, `sigma`.

    Raises ValueError for a file that is none of these.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in ("arr_0", "arr_1", "features", "mu", "sigma")}
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{flag} {path}: not a readable .npz file ({error})") from error
    if "arr_0" in arrays and arrays["arr_0"].ndim == 2:
        arrays["features"] = arrays.pop("arr_0")
    images = arrays.get("arr_0")
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
        raise ValueError(f"{flag} {path}: arr_0 is {images.dtype} {images.shape}; expected uint8 (N, H, W, 3)")
    if images is not None and (len(images) < 2 or 0 in images.shape):
        raise ValueError(f"{flag} {path}: arr_0 is {images.shape}; expected two images or more")
    labels = arrays.get("arr_1")
    if images is not None and labels is not None and not (labels.shape == (len(images),) and _are_classes(labels)):
        raise ValueError(f"{flag} {path}: arr_1 is {labels.dtype} {labels.shape}; expected a class >= 0 for each image")
    features = arrays.get("features")
    if features is not None and not (
        features.ndim == 2 and len(features) > 1 and features.dtype.kind == "f" and np.isfinite(features).all()
    ):
        text = f"features is {features.dtype} {features.shape}; expected finite floats (N, D) of two images or more"
        raise ValueError(f"{flag} {path}: {text}")
    if images is None and "features" not in arrays and not {"mu", "sigma"} <= set(arrays):
        raise ValueError(f"{flag} {path}: expected arr_0 (images), features, or mu and sigma (statistics)")
    return arrays


def _are_classes(labels: np.ndarray) -> bool:
    return labels.dtype.kind in "iu" and (not len(labels) or 0 <= labels.min() <= labels.max() < MAX_CLASSES)
