"""Distances between two sets of images, on features (N, D) of them: FID, KID, precision and recall, with intervals."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Features = np.ndarray | Tensor  # (N, D), float
ROWS = 1024  # rows of a distance matrix that are computed at once


class Statistics(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, in float64."""

    mean: Tensor
    cov: Tensor


def statistics(features: Features) -> Statistics:
    """Mean and covariance of features (N, D), N >= 2."""
    x = checked(features, "features")
    return Statistics(x.mean(dim=0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]))


def frechet_distance(real: Features, generated: Features) -> float:
    """Frechet distance of the Gaussians fitted to features (N, D) and (M, D); FID on Inception features (Heusel et al.
    2017, https://arxiv.org/abs/1706.08500). The order of the two does not matter.
    """
    return frechet_of_statistics(statistics(real), statistics(generated))


def frechet_of_statistics(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of means m and covariances C."""
    return frechet_to(a)(b)


def frechet_to(a: Statistics) -> Callable[[Statistics], float]:
    """The Frechet distance to `a` as a function of the other statistics; the root of C_a is computed once."""
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(b: Statistics) -> float:
        if a.mean.shape != b.mean.shape:
            raise ValueError(f"features have {len(a.mean)} and {len(b.mean)} dimensions: two different extractors")
        cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()  # as C_a C_b, but symmetric
        value = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross)
        return value if math.isnan(value) else max(0.0, value)

    return distance


def kernel_distance(
    real: Features, generated: Features, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the unbiased MMD^2 with the kernel (x.y / D + 1)^3 of features
    (N, D) and (M, D); KID on Inception features (Binkowski et al. 2018, https://arxiv.org/abs/1801.01401). Subsets are
    no larger than the smaller set. The values are torchmetrics' after `torch.manual_seed(seed)`.
    """
    from torchmetrics.image.kid import poly_mmd  # seconds to import

    a, b = checked(real, "real"), checked(generated, "generated")
    size, generator = min(subset_size, len(a), len(b)), torch.Generator().manual_seed(seed)

    def subset(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:size]]

    values = torch.stack([poly_mmd(subset(a), subset(b)) for _ in range(subsets)])
    return float(values.mean()), float(values.std(unbiased=False))


def precision_recall(real: Features, generated: Features, k: int = 3) -> tuple[float, float]:
    """Fraction of generated features (M, D) inside the manifold of the real ones (N, D), and of real ones inside that
    of the generated; a manifold is the union of balls around each feature that reach its k-th neighbor (Kynkaanniemi
    et al. 2019, https://arxiv.org/abs/1904.06991, eq. 1 to 3). Needs more than k features of each.
    """
    a, b = checked(real, "real", k + 1), checked(generated, "generated", k + 1)
    return float(inside(b, a, k).double().mean()), float(inside(a, b, k).double().mean())


def inside(points: Features, manifold: Features, k: int = 3, radii: Tensor | None = None) -> Tensor:
    """True for points (M, D) that lie in the balls around the features `manifold` (N, D) -> (M,) bool.

    radii: `neighbor_radii` of the manifold (N,), if they are known: of many features they take minutes.
    """
    x, centers = checked(points, "points", 1), checked(manifold, "manifold", k + 1)
    radii = neighbor_radii(centers, k) if radii is None else radii
    return torch.cat([(rows <= radii).any(dim=1) for rows in distance_rows(x, centers)])


def realism(generated: Features, real: Features, k: int = 3, radii: Tensor | None = None) -> Tensor:
    """Realism of generated features (M, D) -> (M,), at least 1 inside the manifold of the real ones (N, D).

    The largest ratio of a real feature's radius to its distance, over the half of them with the smaller radii
    (Kynkaanniemi et al. 2019, eq. 4). radii: as in `inside`.
    """
    x, centers = checked(generated, "generated", 1), checked(real, "real", k + 1)
    radii = neighbor_radii(centers, k) if radii is None else radii
    kept = radii <= radii.median()
    return torch.cat([(radii[kept] / rows.clamp(min=1e-12)).amax(dim=1) for rows in distance_rows(x, centers[kept])])


def neighbor_radii(features: Features, k: int) -> Tensor:
    """Distance of each feature (N, D) to its k-th neighbor -> (N,)."""
    features = checked(features, "features", k + 1)
    return torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in distance_rows(features, features)])  # own 0 first


def nearest(points: Features, references: Features) -> tuple[Tensor, Tensor]:
    """Distance of each point (M, D) to the nearest reference (N, D), exactly 0 for equal ones, and its index, (M,)."""
    x, y = checked(points, "points", 1), checked(references, "references", 1)
    index = torch.cat([rows.argmin(dim=1) for rows in distance_rows(x, y)])
    return (x - y[index]).square().sum(dim=1).sqrt(), index


def distance_rows(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Euclidean distances (N, M), as blocks of rows."""
    for rows in a.split(ROWS):
        yield torch.cdist(rows, b)


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def jackknife(
    statistic: Callable[[Tensor], float], count: int, groups: int = 20, seed: int = 0, least: float = -math.inf
) -> Interval:
    """`statistic(indices)` of `count` samples with 1.96 standard deviations over sets of that size on either side.

    Delete-a-group jackknife (Shao & Tu 1995, section 2.3): each group of samples is left out once. No sample repeats,
    which would add to a Frechet distance; near the distance of equal distributions it is wider than the true spread.
    least: the lowest possible value.
    """
    parts = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tensor_split(min(groups, count))
    left_out = [statistic(torch.cat([*parts[:k], *parts[k + 1 :]])) for k in range(len(parts))]
    values, value = torch.tensor(left_out, dtype=torch.float64), statistic(torch.arange(count))
    spread = 1.96 * float(((len(parts) - 1) * values.var(unbiased=False)).sqrt())
    return Interval(value, max(least, value - spread), value + spread)


def mean_interval(values: Features) -> Interval:
    """The mean of values (N,) with its interval: Wilson's for shares (values 0 and 1), else by the standard error."""
    x = torch.as_tensor(values).double()
    n, mean, z = len(x), float(x.mean()), 1.96
    if bool(((x == 0) | (x == 1)).all()):
        center, width = mean + z**2 / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
        low, high = ((center + sign * width) / (1 + z**2 / n) for sign in (-1, 1))
        return Interval(mean, max(0.0, min(low, mean)), min(1.0, max(high, mean)))
    spread = z * float(x.std()) / math.sqrt(n) if n > 1 else 0.0
    return Interval(mean, mean - spread, mean + spread)


def checked(features: Features, name: str, least: int = 2) -> Tensor:
    """Features (N, D) in float64; raise ValueError if they are not finite, not a matrix, or fewer than `least`."""
    x = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"{name}: expected features (N, D) with N of at least {least}, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"{name}: features are not finite")
    return x
