"""Metrics of first stages and of samples."""

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
    "judge_digits",
    "novelty",
    "pairwise_distance",
    "psnr",
    "variety",
]
