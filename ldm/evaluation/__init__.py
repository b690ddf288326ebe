"""Evaluation of first stages, samples and images: metrics, cards, sweeps. Names are imported on first use."""

# ruff: noqa: F401
from typing import TYPE_CHECKING

from ldm.published import lazy_attributes

if TYPE_CHECKING:
    from ldm.evaluation.card import Card
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

__getattr__ = lazy_attributes(
    __name__,
    {
        "ldm.evaluation.card": "Card",
        "ldm.evaluation.distances": "frechet_distance kernel_distance precision_recall",
        "ldm.evaluation.metrics": (
            "DigitClassifier DigitReport edge_overlap judge_digits novelty pairwise_distance psnr variety"
        ),
    },
)
