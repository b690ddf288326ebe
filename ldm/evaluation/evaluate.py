"""Metrics of a set of images against real ones: everything that a card holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.checkpoint import ensure_weights
from ldm.evaluation.card import Metric
from ldm.evaluation.distances import (
    Statistics,
    frechet_to,
    inside,
    jackknife,
    kernel_distance,
    mean_interval,
    neighbor_radii,
    realism,
    statistics,
)
from ldm.evaluation.features import (
    ClassifierFeatures,
    Extractor,
    PixelFeatures,
    batches,
    cached_features,
    features_of,
    labels_of,
    trained_classifier,
)
from ldm.evaluation.figure import COLUMNS, Section, card_figure, distance_plot
from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.memorization import Audit, audit
from ldm.modules.encoders.open_clip import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder

NEIGHBORS = 3  # of precision and recall, as in the paper
KID_SUBSETS = 100
SHOWN_COPIES = 20


@dataclass
class Real:
    """The real images that others are compared with, and what is known of them."""

    extractor: Extractor
    stats: Statistics
    images: ImageSet | None = None  # None for published statistics or features
    features: np.ndarray | None = None  # (N, D)
    held_out: ImageSet | None = None
    classifier: ClassifierFeatures | None = None
    cache: Path = Path("outputs/evaluation/cache")
    stats_name: str = ""  # in the card: their number, place and fingerprint
    held_out_features: np.ndarray | None = None  # (K, D)
    accuracy: Metric | None = None  # of the classifier, on the held-out images

    @cached_property
    def radii(self) -> torch.Tensor:
        """Distance of each real feature to its neighbor that bounds the manifold -> (N,)."""
        assert self.features is not None
        return neighbor_radii(self.features, NEIGHBORS)


def real_of_images(
    images: ImageSet,
    extractor: Callable[[np.ndarray | None], Extractor],
    held_out: ImageSet | None,
    cache: Path,
    batch_size: int = 64,
) -> Real:
    """Real images with their features, which are cached; extractor: chosen by their labels (N,), None without any."""
    labels = labels_of(images)
    chosen = extractor(labels)
    features = cached_features(cache, chosen, images, batch_size)
    classifier = chosen if isinstance(chosen, ClassifierFeatures) else None
    if classifier is None and labels is not None:
        classifier = trained_classifier(cache, images, labels)
    name = f"{len(images)}, {images.name} ({images.fingerprint[:16]})"
    real = Real(chosen, statistics(features), images, features, held_out, classifier, cache, name)
    if held_out is not None:
        real.held_out_features = cached_features(cache, chosen, held_out, batch_size)
        classes = labels_of(held_out) if classifier is not None else None
        if classifier is not None and classes is not None:
            real.accuracy = recognized(classifier, classes, cached_features(cache, classifier, held_out, batch_size))
    return real


def real_of_features(
    name: str, extractor: Extractor, features: np.ndarray, held_out: ImageSet | None, cache: Path
) -> Real:
    shown = f"{len(features)} features, {name}"
    return Real(extractor, statistics(features), None, features, held_out, cache=cache, stats_name=shown)


def real_of_statistics(
    name: str, extractor: Extractor, mu: np.ndarray, sigma: np.ndarray, held_out: ImageSet | None, cache: Path
) -> Real:
    """Published statistics: mean (D,) and covariance (D, D)."""
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"--real {name}: mu is {mu.shape} and sigma {sigma.shape}; expected (D,) and (D, D)")
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"--real {name}: mu and sigma are {mu.dtype} and {sigma.dtype}; expected finite floats")
    if not np.allclose(sigma, sigma.T) or np.linalg.eigvalsh(sigma)[0] < -1e-3 * np.abs(sigma).max():
        raise ValueError(f"--real {name}: sigma is not a covariance: it must be symmetric without negative eigenvalues")
    stats = Statistics(*(torch.from_numpy(x).double() for x in (mu, sigma)))
    return Real(extractor, stats, held_out=held_out, cache=cache, stats_name=f"statistics, {name}")


@dataclass
class Measured:
    """Metrics of a set, why others are missing, and what the figure shows."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    audit: Audit | None = None
    realism: np.ndarray | None = None  # (N,)
    seconds: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)  # see `floor`


def floor(real: Real, features: np.ndarray) -> dict[str, float]:
    """Frechet distances to the real images of as many held-out images as of these, which alone compare, by name."""
    if real.held_out_features is None:
        return {}
    n, distance = min(len(features), len(real.held_out_features)), frechet_to(real.stats)
    if n < 2:
        return {}
    sets = {"held-out images": real.held_out_features, "images of this card": features}
    return {f"Frechet distance of {n} {name}": distance(statistics(x[:n])) for name, x in sets.items()}


def measure(images: ImageSet, real: Real, batch_size: int = 64) -> Measured:
    """All metrics of a set of images that the real ones allow."""
    if real.images is not None:
        check_sizes(images, real.images)
    found, start = Measured(), time.perf_counter()
    features = features_of(real.extractor, images, batch_size)
    found.seconds["features"], start = time.perf_counter() - start, time.perf_counter()
    found.metrics["fid"] = frechet_metric(real.stats, features)
    found.floor = floor(real, features)
    if real.features is None:
        reason = "the real images are given as statistics alone"
        found.skipped |= dict.fromkeys(("kid", "precision", "recall"), reason)
    else:
        found.metrics |= sample_metrics(real, features)
        if "precision" not in found.metrics:
            found.skipped |= dict.fromkeys(("precision", "recall"), f"they need more than {NEIGHBORS} images of each")
        if len(real.features) > NEIGHBORS:
            found.realism = realism(features, real.features, NEIGHBORS, real.radii).numpy()
    labels = labels_of(images)
    if real.classifier is None or labels is None:
        reason = "the real images have no classes" if real.classifier is None else "the images have no classes"
        found.skipped["recognized"] = reason
    else:
        own = features if real.extractor is real.classifier else features_of(real.classifier, images, batch_size)
        found.metrics["recognized"] = recognized(real.classifier, labels, own)
    if real.images is None:
        found.skipped["copies"] = "the real images are given as features or statistics"
    else:
        found.audit = memorization_audit(images, real)
        if real.held_out is None:
            found.skipped["copies"] = "there are no held-out images (--held_out) to compare with"
        else:
            found.metrics["copies"] = Metric(*found.audit.share)
        if found.audit.novelty is None:
            found.skipped["novelty"] = "there are no held-out images (--held_out) that differ from the real ones"
        else:
            found.metrics["novelty"] = Metric(found.audit.novelty)
    found.seconds["metrics"] = time.perf_counter() - start
    return found


def check_sizes(images: ImageSet, real: ImageSet) -> None:
    """Raise ValueError if the images of two sets differ in size."""
    (height, width, _), (real_height, real_width, _) = images.image(0).shape, real.image(0).shape
    if (height, width) != (real_height, real_width):
        raise ValueError(
            f"{images.name}: {width}x{height} pixels, but {real.name} has {real_width}x{real_height}; pass --size for "
            "folders, or --real with images of the same size"
        )


def frechet_metric(real: Statistics, features: np.ndarray) -> Metric:
    """The Frechet distance with its interval at this number of images; the real statistics are taken as given."""
    x, distance = torch.from_numpy(features).double(), frechet_to(real)
    return Metric(*jackknife(lambda chosen: distance(statistics(x[chosen])), len(x), least=0.0))


def paired_frechet_metric(originals: np.ndarray, others: np.ndarray) -> Metric:
    """As `frechet_metric` for images (N, D) and others that were made from them, (N, D): both are resampled alike."""
    x, y = (torch.from_numpy(each).double() for each in (originals, others))

    def distance(chosen: torch.Tensor) -> float:
        return frechet_to(statistics(x[chosen]))(statistics(y[chosen]))

    return Metric(*jackknife(distance, len(x), least=0.0))


def sample_metrics(real: Real, features: np.ndarray) -> dict[str, Metric]:
    """Kernel distance, precision and recall of features (M, D) against the real ones (N, D)."""
    assert real.features is not None
    least = min(len(real.features), len(features))
    size = min(1000, max(2, least // 2))  # subsets of all images would have no spread
    mean, spread = kernel_distance(real.features, features, KID_SUBSETS, size)
    found = {"kid": Metric(mean, spread=spread)}
    if least > NEIGHBORS:
        within = inside(features, real.features, NEIGHBORS, real.radii)
        found["precision"] = Metric(*mean_interval(within.double()))
        found["recall"] = Metric(*mean_interval(inside(real.features, features, NEIGHBORS).double()))
    return found


def recognized(classifier: ClassifierFeatures, labels: np.ndarray, features: np.ndarray) -> Metric:
    """Share of images with these features of the classifier, (N, 64), that it reads as their labels (N,)."""
    return Metric(*mean_interval((classifier.classes(torch.from_numpy(features)).numpy() == labels).astype(float)))


def clip_score(images: ImageSet, texts: Sequence[str], version: str, weights: str, device: torch.device) -> Metric:
    """100 times the cosine of each image and its text in CLIP's space, at least 0.

    CLIPScore (Hessel et al. 2021, arXiv 2104.08718, eq. 1) with torchmetrics' factor in place of the paper's 2.5.
    Images are scaled to CLIP's square whatever their proportions.
    """
    image_encoder = FrozenClipImageEmbedder(version, weights=weights, antialias=True, normalize=True)
    text_encoder = FrozenCLIPTextEmbedder(version, weights=weights)
    scores: list[torch.Tensor] = []
    for encoder in (image_encoder, text_encoder):
        ensure_weights(encoder)
        encoder.to(device)
    with torch.no_grad():
        for batch in batches(images, 32):
            x = batch.permute(0, 3, 1, 2).float().to(device) / 127.5 - 1.0
            first = sum(map(len, scores))
            cosine = (image_encoder(x) * text_encoder(list(texts[first : first + len(x)]))).sum(dim=1)
            scores.append(100 * cosine.clamp(min=0).float().cpu())
    return Metric(*mean_interval(torch.cat(scores)))


def memorization_audit(images: ImageSet, real: Real) -> Audit:
    """Audit in pixels; held-out images are their own only comparison if they are what is evaluated."""
    assert real.images is not None
    pixels = PixelFeatures()
    training = cached_features(real.cache, pixels, real.images)
    held_out = None if real.held_out is None else cached_features(real.cache, pixels, real.held_out)
    return audit(features_of(pixels, images), training, held_out)


def copies_of(found: Measured) -> list[dict[str, Any]]:
    """The flagged samples of a card, the nearest first."""
    if found.audit is None:
        return []
    each = found.audit
    return [
        {"image": int(k), "training_image": int(each.neighbor[k]), "distance": round(float(each.distance[k]), 5)}
        for k in each.flagged[:SHOWN_COPIES]
    ]


def figure_of(title: str, images: ImageSet, real: Real, found: Measured, seed: int = 0) -> Image.Image:
    """Random, best and worst samples, each above its nearest training image, and the distances."""
    count = min(COLUMNS, len(images))
    chosen = {"random": np.sort(np.random.RandomState(seed).permutation(len(images))[:count])}
    if found.realism is not None:
        order = np.argsort(-found.realism, kind="stable")
        chosen |= {"best, by realism": order[:count], "worst, by realism": order[::-1][:count]}
    if found.audit is not None:
        chosen["nearest to a training image"] = np.argsort(found.audit.distance, kind="stable")[:count]
    neighbor = None if found.audit is None else found.audit.neighbor
    below = "" if neighbor is None else "; below each, the nearest training image"
    sections = [Section(f"{name}{below}", rows_of(images, real, each, neighbor)) for name, each in chosen.items()]
    plotted = None
    if found.audit is not None:
        plotted = distance_plot(found.audit.distance, found.audit.held_out, found.audit.threshold)
    return card_figure(title, sections, plotted)


def rows_of(
    images: ImageSet, real: Real, chosen: Sequence[int] | np.ndarray, neighbor: np.ndarray | None
) -> list[list[np.ndarray]]:
    rows = [[images.image(int(k)) for k in chosen]]
    if neighbor is not None and real.images is not None:
        rows.append([real.images.image(int(neighbor[k])) for k in chosen])
    return rows
