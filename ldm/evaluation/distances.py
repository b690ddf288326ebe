"""Distances between two sets of images, on features (N, D) of them: FID, KID, precision and recall."""

from collections.abc import Iterator
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
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features have {len(a.mean)} and {len(b.mean)} dimensions: two different extractors")
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()  # as C_a C_b, but symmetric
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross)


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
    of the generated; a manifold is the union of balls around each feature that reach its k-th neighbour (Kynkaanniemi et
    al. 2019, https://arxiv.org/abs/1904.06991, eq. 1 to 3). Needs more than k features of each.
    """
    a, b = checked(real, "real", k + 1), checked(generated, "generated", k + 1)
    return float(inside(b, a, k).double().mean()), float(inside(a, b, k).double().mean())


def inside(points: Tensor, manifold: Tensor, k: int) -> Tensor:
    """Whether points (M, D) lie in the balls around the features `manifold` (N, D) -> (M,) bool."""
    radii = torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in distance_rows(manifold, manifold)])  # own 0 first
    return torch.cat([(rows <= radii).any(dim=1) for rows in distance_rows(points, manifold)])


def distance_rows(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Euclidean distances (N, M), as blocks of rows."""
    for rows in a.split(ROWS):
        yield torch.cdist(rows, b, compute_mode="donot_use_mm_for_euclid_dist")


def checked(features: Features, name: str, least: int = 2) -> Tensor:
    """Features (N, D) in float64; raise ValueError if they are not finite, not a matrix, or fewer than `least`."""
    x = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"{name}: expected features (N, D) with N of at least {least}, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"{name}: features are not finite")
    return x
