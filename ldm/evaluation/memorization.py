"""Audit of memorization: are samples nearer to the training images than held-out images are?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ldm.evaluation.distances import Interval, mean_interval, nearest

EXPECTED = 0.01  # share of held-out images below the threshold of a copy


class Audit(NamedTuple):
    """Distances of samples to their nearest training image, in pixels, beside those of held-out images."""

    distance: np.ndarray  # (N,) root mean square difference of pixels in [0, 1]
    neighbor: np.ndarray  # (N,) index of the training image
    held_out: np.ndarray  # (M,) the distances of held-out images; empty without any
    threshold: float  # a sample below it is flagged: the first percentile of held-out images, 0 without any

    @property
    def flagged(self) -> np.ndarray:
        """Indices of the flagged samples, the nearest first."""
        below = np.flatnonzero((self.distance < self.threshold) | (self.distance == 0))
        return below[np.argsort(self.distance[below], kind="stable")]

    @property
    def share(self) -> Interval:
        """Share of flagged samples; a model that copies nothing has about EXPECTED."""
        mask = np.zeros(len(self.distance))
        mask[self.flagged] = 1
        return mean_interval(mask)

    @property
    def novelty(self) -> float | None:
        """Median distance of the samples, relative to that of held-out images; 0 for copies. None without a scale."""
        usual = float(np.median(self.held_out)) if len(self.held_out) else 0.0
        return float(np.median(self.distance)) / usual if usual else None


def audit(samples: np.ndarray, training: np.ndarray, held_out: np.ndarray | None) -> Audit:
    """Audit of pixel features (N, D) of samples against those of training (M, D) and of held-out images (K, D)."""
    distance, index = nearest(samples, training)
    others = nearest(held_out, training)[0] if held_out is not None else torch.zeros(0)
    threshold = float(torch.quantile(others.double(), EXPECTED)) if len(others) else 0.0
    return Audit(distance.numpy(), index.numpy(), others.numpy(), threshold)
