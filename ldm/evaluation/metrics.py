"""How good drawn pictures are: fidelity of a first stage, and whether samples are right, varied and new.

Pictures are float arrays (N, H, W, C) in [-1, 1]; distances are Euclidean over pixels.
"""

from dataclasses import dataclass

import numpy as np

Labeled = tuple[np.ndarray, np.ndarray]  # pictures (N, H, W, C), labels (N,)
DIGIT_SIDE = 8  # scikit-learn's digits are 8x8; a classifier needs no more


def psnr(pictures: np.ndarray, references: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all pictures; infinite for equal ones. Both (..., C) in [-1, 1]."""
    if pictures.shape != references.shape:
        raise ValueError(f"psnr: shapes {pictures.shape} and {references.shape} differ")
    mse = np.mean((pictures.astype(np.float64) - references) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(4 / mse))  # the peak is 2, from -1 to 1


def pairwise_distance(pictures: np.ndarray) -> float:
    """Mean distance between two different pictures of a set, (N, ...) with N >= 2."""
    if len(pictures) < 2:
        raise ValueError(f"pairwise_distance: needs at least 2 pictures, got {len(pictures)}")
    n = len(pictures)
    return float(distances(pictures, pictures).sum() / (n * (n - 1)))  # the diagonal adds nothing


def variety(drawn: np.ndarray, drawn_labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> dict[int, float]:
    """Class -> mean distance between two drawn pictures of it, as a fraction of the same for real ones.

    1 is as varied as real ones, 0 is one picture repeated.
    """
    return {
        int(label): pairwise_distance(drawn[drawn_labels == label]) / pairwise_distance(real[real_labels == label])
        for label in np.unique(drawn_labels)
    }


def novelty(drawn: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> float:
    """Median distance of a drawn picture to its nearest training picture, as a fraction of the same for held-out pictures.

    Copies give 0, new pictures about 1.
    """
    return float(np.median(nearest_distance(drawn, train)) / np.median(nearest_distance(held_out, train)))


def nearest_distance(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Distance of each picture to the nearest reference -> (N,)."""
    return distances(pictures, references).min(axis=1)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances between all pairs, (N, ...) and (M, ...) -> (N, M) float64; by differences, so that equal pictures give 0."""
    flat_a, flat_b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    return np.stack([np.sqrt(((flat_b - row) ** 2).sum(axis=1)) for row in flat_a])


class DigitClassifier:
    """A support vector machine that reads digits; whoever fits it on real pictures alone has a judge that never saw a drawn one."""

    def __init__(self, pictures: np.ndarray, labels: np.ndarray) -> None:
        """pictures: (N, H, W, C) in [-1, 1] with H and W multiples of 8, labels: (N,)."""
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise ImportError(
                "the judge needs scikit-learn, which the quickstart extra brings: pip install -e '.[quickstart]'"
            ) from error
        self.svm = SVC(C=2.0).fit(digit_features(pictures), labels)

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """The digit each picture is read as, (N,)."""
        return self.svm.predict(digit_features(pictures))

    def accuracy(self, pictures: np.ndarray, labels: np.ndarray) -> float:
        """Share of the pictures that are read as their label, 0..1."""
        return float(np.mean(self(pictures) == labels))


def digit_features(pictures: np.ndarray) -> np.ndarray:
    """Grey means of 8x8 blocks in 0..1, (N, H, W, C) -> (N, 64)."""
    n, height, width, _ = pictures.shape
    if height % DIGIT_SIDE or width % DIGIT_SIDE:
        raise ValueError(f"digits of {height}x{width} pixels: both sides must be multiples of {DIGIT_SIDE}")
    blocks = pictures.mean(axis=-1).reshape(n, DIGIT_SIDE, height // DIGIT_SIDE, DIGIT_SIDE, width // DIGIT_SIDE)
    return (blocks.mean(axis=(2, 4)).reshape(n, -1) + 1) / 2


@dataclass(frozen=True)
class DigitReport:
    """Figures of a set of drawn digits, as `judge_digits` finds them."""

    drawn: int
    recognized: float  # share read as the digit of the prompt
    accuracy: float  # the judge's own, on held-out real digits
    variety: dict[int, float]  # by digit, 1 is as varied as real ones
    novelty: float  # 0 for copies of training pictures, about 1 for new ones


def judge_digits(drawn: np.ndarray, asked: np.ndarray, train: Labeled, held_out: Labeled) -> DigitReport:
    """Are drawn digits (N, H, W, C) the ones that were asked for (N,), as varied as real ones, and no copies?"""
    judge = DigitClassifier(*train)
    return DigitReport(
        drawn=len(drawn),
        recognized=judge.accuracy(drawn, asked),
        accuracy=judge.accuracy(*held_out),
        variety=variety(drawn, asked, *train),
        novelty=novelty(drawn, train[0], held_out[0]),
    )
