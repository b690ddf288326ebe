"""Metrics of first stages and of samples."""

from ldm.evaluation.metrics import (
    DigitClassifier,
    DigitReport,
    judge_digits,
    novelty,
    pairwise_distance,
    psnr,
    variety,
)

__all__ = ["DigitClassifier", "DigitReport", "judge_digits", "novelty", "pairwise_distance", "psnr", "variety"]
