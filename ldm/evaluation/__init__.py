"""Metrics of first stages and of samples."""

from ldm.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from ldm.evaluation.metrics import (
    DigitClassifier,
    DigitReport,
    edge_overlap,
    judge_digits,
    novelty,
    pairwise_distance,
    psnr,
    variety,
)

__all__ = [
    "DigitClassifier",
    "DigitReport",
    "edge_overlap",
    "frechet_distance",
    "judge_digits",
    "kernel_distance",
    "novelty",
    "pairwise_distance",
    "precision_recall",
    "psnr",
    "variety",
]
