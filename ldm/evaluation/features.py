"""Feature extractors behind one interface, and features that are cached by a fingerprint of images and extractor."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.atomic import atomic_file
from ldm.checkpoint import ensure_weights
from ldm.evaluation.classifier import VERSION, SmallClassifier, reduced, train_classifier
from ldm.evaluation.image_sets import ImageSet
from ldm.modules.encoders.open_clip import FrozenClipImageEmbedder
from ldm.paths import fingerprint

logger = logging.getLogger(__name__)

EXTRACTORS = ("classifier", "inception", "dinov2", "clip", "pixels")
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256_PREFIX = "6726825d"  # published in the file's name
DINOV2 = "facebook/dinov2-large"  # ViT-L/14, of arXiv 2306.04675
AUDIT_SIDE = 32  # pixels of an image in which copies are looked for
METRIC_SIDE = 8  # of one as 192 features, whose covariance is quick to compare


class Extractor(Protocol):
    """Features of images."""

    name: str
    identity: Mapping[str, Any]  # everything that its features depend on

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float (B, D)."""
        ...


class PixelFeatures:
    """The image itself, at most `side` pixels; distances are root mean square differences of pixels in [0, 1]."""

    name = "pixels"

    def __init__(self, side: int = AUDIT_SIDE) -> None:
        self.side = side
        self.identity: Mapping[str, Any] = {"name": self.name, "side": side}

    def __call__(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float() / 255
        if max(x.shape[2:]) > self.side:
            scale = self.side / max(x.shape[2:])
            size = [max(1, round(length * scale)) for length in x.shape[2:]]
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        x = x.flatten(1)
        return x / x.shape[1] ** 0.5


class ClassifierFeatures:
    """The last features, (B, 64), of a classifier trained in place on a labelled set."""

    name = "classifier"

    def __init__(self, weights: Mapping[str, Tensor], trained_on: str) -> None:
        self.n_classes = len(weights["head.bias"])
        self.model = SmallClassifier(self.n_classes).eval()
        self.model.load_state_dict(dict(weights))
        content = b"".join(x.numpy().tobytes() for x in weights.values())
        self.identity: Mapping[str, Any] = {
            "name": self.name,
            "version": VERSION,
            "trained_on": trained_on,
            "weights": hashlib.sha256(content).hexdigest()[:16],
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model.features(reduced(images))

    @torch.no_grad()
    def classes(self, features: Tensor) -> Tensor:
        """The class of each feature vector (N, D) -> (N,)."""
        return self.model.head(features).argmax(dim=1)


class InceptionFeatures:
    """Pool-3 features, (B, 2048), of FID's Inception: torch-fidelity's network, whose resize is TensorFlow's."""

    name = "inception"

    def __init__(self, weights: str | None, device: torch.device) -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            path = inception_weights(weights)
            self.model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
        except ImportError as error:
            raise ImportError("--features inception needs torch-fidelity: pip install -e '.[evaluation]'") from error
        self.device = device
        self.identity: Mapping[str, Any] = {"name": self.name, "weights": fingerprint(path)}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images.permute(0, 3, 1, 2).contiguous().to(self.device)).cpu()


class DinoFeatures:
    """The class token of DINOv2 after its last norm, of images scaled to 224x224 (Stein et al. 2023, 2306.04675).

    weights: a folder of transformers; None for the hub's cache. Nothing is downloaded.
    """

    name = "dinov2"

    def __init__(self, weights: str | None, device: torch.device) -> None:
        from transformers import AutoModel  # seconds to import

        place = weights or DINOV2
        try:
            model = AutoModel.from_pretrained(place, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            advice = f"pass --weights FOLDER with the config.json and model.safetensors of {DINOV2}"
            raise ValueError(f"--features dinov2: {place} cannot be loaded ({reason}); {advice}") from error
        self.model, self.device = model.to(device).eval(), device
        self.identity: Mapping[str, Any] = {"name": self.name, "weights": weights_digest(self.model)}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float().to(self.device) / 255
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet
        x = (x - mean.to(x)[:, None, None]) / std.to(x)[:, None, None]
        return self.model(pixel_values=x).last_hidden_state[:, 0].float().cpu()


class ClipFeatures:
    """CLIP's image vectors, not scaled to length 1; `weights` is a file of open_clip, else the hub or its cache."""

    name = "clip"

    def __init__(self, weights: str | None, device: torch.device, version: str = "ViT-L/14") -> None:
        self.model = FrozenClipImageEmbedder(version, weights=weights, antialias=True)
        ensure_weights(self.model)
        self.model.to(device)
        self.device = device
        self.identity: Mapping[str, Any] = {
            "name": self.name,
            "version": version,
            "weights": weights_digest(self.model),
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1.0
        return self.model(x).float().cpu()


def inception_weights(path: str | None) -> Path:
    """A local file, else torch.hub's copy of the published weights, else their download, whose hash is checked."""
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"--weights {path}: no such file; expected a copy of {INCEPTION_URL}")
        return file
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    if not file.is_file():
        logger.info("downloading %s (91 MiB) to %s", INCEPTION_URL, file)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(file), hash_prefix=INCEPTION_SHA256_PREFIX)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"--features inception: the download of {INCEPTION_URL} failed ({reason}); save the file as {file}, or "
                "pass its path with --weights"
            ) from error
    return file


def weights_digest(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 of a module's weights."""
    found = hashlib.sha256()
    for value in module.state_dict().values():
        found.update(value.float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


# --- features of a set


def features_of(extractor: Extractor, images: ImageSet, batch_size: int = 64, progress: bool = True) -> np.ndarray:
    """Features of a whole set -> float32 (N, D)."""
    parts: list[np.ndarray] = []
    with tqdm(total=len(images), desc=f"{extractor.name} features", unit="image", disable=not progress) as bar:
        for batch in batches(images, batch_size):
            parts.append(extractor(batch).numpy().astype(np.float32))
            bar.update(len(batch))
    features = np.concatenate(parts)
    if not np.isfinite(features).all():
        raise ValueError(f"{extractor.name} features of {images.name} are not finite")
    return features


def batches(images: ImageSet, size: int) -> Iterator[Tensor]:
    """Batches uint8 (B, H, W, 3) of a set; raise ValueError if the images have several sizes."""
    for first in range(0, len(images), size):
        arrays = [images.image(index) for index in range(first, min(first + size, len(images)))]
        if len({array.shape for array in arrays}) > 1:
            shapes = sorted({f"{array.shape[1]}x{array.shape[0]}" for array in arrays})
            raise ValueError(f"{images.name}: images of several sizes ({', '.join(shapes[:3])}); pass --size")
        yield torch.from_numpy(np.stack(arrays))


def labels_of(images: ImageSet) -> np.ndarray | None:
    """Labels (N,) int64; None if a set has none."""
    if not len(images) or images.label(0) is None:
        return None
    return np.array([images.label(index) for index in range(len(images))], dtype=np.int64)


def cached(folder: Path, key: Mapping[str, Any], make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of `make()`, read from the file of `key` in the folder if it exists, else written there."""
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{key['what']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files if name != "key"}
            logger.info("using the cached %s of %s", path.name, folder)
            return found
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile):
            logger.warning("%s: not readable; made anew", path)
    arrays = dict(make())
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, key=np.array(text), **arrays)  # type: ignore[arg-type]
    return arrays


def cached_features(folder: Path, extractor: Extractor, images: ImageSet, batch_size: int = 64) -> np.ndarray:
    """`features_of` a real set, cached."""
    key = {"what": f"{extractor.name}-features", "extractor": dict(extractor.identity), "images": images.fingerprint}
    return cached(folder, key, lambda: {"features": features_of(extractor, images, batch_size)})["features"]


def make_extractor(name: str, weights: str | None, device: torch.device, clip_type: str = "ViT-L/14") -> Extractor:
    """An extractor by its name, except the classifier; weights: a file, or a folder of transformers for DINOv2."""
    if name == "inception":
        return InceptionFeatures(weights, device)
    if name == "dinov2":
        return DinoFeatures(weights, device)
    if name == "clip":
        return ClipFeatures(weights, device, clip_type)
    return PixelFeatures(METRIC_SIDE)


def trained_classifier(folder: Path, images: ImageSet, labels: np.ndarray, seed: int = 0) -> ClassifierFeatures:
    """The classifier of a labelled set, cached."""

    def train() -> dict[str, np.ndarray]:
        pixels, n_classes = torch.cat([reduced(batch) for batch in batches(images, 256)]), int(labels.max()) + 1
        weights = train_classifier(pixels, torch.from_numpy(labels), n_classes, seed)
        return {name: x.numpy() for name, x in weights.items()}

    key = {"what": "classifier", "images": images.fingerprint, "labels": hashlib.sha256(labels.tobytes()).hexdigest()}
    arrays = cached(folder, {**key, "version": VERSION, "seed": seed}, train)
    return ClassifierFeatures({name: torch.from_numpy(x) for name, x in arrays.items()}, images.fingerprint)


def default_extractor(labels: np.ndarray | None) -> str:
    """The classifier of a labelled set, else Inception if its weights are available, else the pixels."""
    if labels is not None:
        return "classifier"
    file = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(INCEPTION_URL)
    return "inception" if file.is_file() else "pixels"
