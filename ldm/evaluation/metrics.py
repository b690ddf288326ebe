"""Metrics of generated images: fidelity of a first stage, and whether samples are recognizable, varied and new.

Images are float arrays (N, H, W, C) in [-1, 1]; distances are Euclidean over pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch

Labeled = tuple[np.ndarray, np.ndarray]  # images (N, H, W, C), labels (N,)
DIGIT_SIDE = 8  # of scikit-learn's digits; a classifier needs no more


def psnr(images: np.ndarray, references: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all images (..., C) in [-1, 1]; infinite for equal ones."""
    if images.shape != references.shape:
        raise ValueError(f"psnr: shapes {images.shape} and {references.shape} differ")
    mse = np.mean((images.astype(np.float64) - references) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(4 / mse))  # peak 2, from -1 to 1


def pairwise_distance(images: np.ndarray) -> float:
    """Mean distance between two different images of a set (N, ...), N >= 2."""
    n = len(images)
    if n < 2:
        raise ValueError(f"pairwise_distance: needs at least 2 images, got {n}")
    return float(distances(images, images).sum() / (n * (n - 1)))  # the diagonal is 0


def variety(
    generated: np.ndarray, generated_labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray
) -> dict[int, float]:
    """Class -> mean distance between two generated images of it, relative to real ones: 0 for one image repeated."""
    return {
        int(label): pairwise_distance(generated[generated_labels == label])
        / pairwise_distance(real[real_labels == label])
        for label in np.unique(generated_labels)
    }


def novelty(generated: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> float:
    """Median distance of generated images to the nearest training image, relative to held-out ones; 0 for copies."""
    return float(np.median(nearest_distance(generated, train)) / np.median(nearest_distance(held_out, train)))


def nearest_distance(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Distance of each image to the nearest reference -> (N,)."""
    return distances(images, references).min(axis=1)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances between all pairs, (N, ...) and (M, ...) -> (N, M) float64, exactly 0 for equal images."""
    flat_a, flat_b = (torch.as_tensor(x.reshape(len(x), -1), dtype=torch.float64) for x in (a, b))
    return torch.cdist(flat_a, flat_b, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def edge_overlap(wanted: np.ndarray, generated: np.ndarray, radius: int = 1) -> float:
    """Share of the edge pixels of two sets of maps, bool (N, H, W), that lie at most `radius` pixels from an edge of
    the other set; 1 for equal maps, 0 for maps far apart. At radius 0 this is Dice's coefficient.
    """
    if wanted.shape != generated.shape:
        raise ValueError(f"edge_overlap: shapes {wanted.shape} and {generated.shape} differ")
    maps = [torch.from_numpy(edges.astype(np.float32))[:, None] for edges in (wanted, generated)]  # (N, 1, H, W)
    wide = [torch.nn.functional.max_pool2d(x, 2 * radius + 1, 1, radius) for x in maps]
    hits = sum(float((x * near).sum()) for x, near in zip(maps, reversed(wide)))
    return hits / max(1.0, sum(float(x.sum()) for x in maps))


class DigitClassifier:
    """A support vector machine that reads digits; fitted on real images, it judges generated ones independently."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        """images: (N, H, W, C) in [-1, 1] with H and W multiples of 8, labels: (N,)."""
        try:
            from sklearn.svm import SVC  # optional
        except ImportError as error:
            raise ImportError("the digit classifier requires scikit-learn: pip install -e '.[quickstart]'") from error
        self.svm = SVC(C=2.0).fit(digit_features(images), labels)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The digit in each image, (N,)."""
        return self.svm.predict(digit_features(images))

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Fraction of the images that are read as their label."""
        return float(np.mean(self(images) == labels))


def digit_features(images: np.ndarray) -> np.ndarray:
    """Grey means of 8x8 blocks in [0, 1], (N, H, W, C) -> (N, 64)."""
    n, height, width, _ = images.shape
    if height % DIGIT_SIDE or width % DIGIT_SIDE:
        raise ValueError(f"digits of {height}x{width} pixels: both sides must be multiples of {DIGIT_SIDE}")
    blocks = images.mean(axis=-1).reshape(n, DIGIT_SIDE, height // DIGIT_SIDE, DIGIT_SIDE, width // DIGIT_SIDE)
    return (blocks.mean(axis=(2, 4)).reshape(n, -1) + 1) / 2


@dataclass(frozen=True)
class DigitReport:
    """Metrics of a set of generated digits."""

    count: int
    recognized: float  # fraction that is read as the digit of the prompt
    accuracy: float  # the classifier's own, on held-out real digits
    variety: dict[int, float]  # by digit, 1 is as varied as real ones
    novelty: float  # 0 for copies of training images, about 1 for new ones


def judge_digits(generated: np.ndarray, prompted: np.ndarray, train: Labeled, held_out: Labeled) -> DigitReport:
    """Are generated digits (N, H, W, C) the ones in their prompts (N,), as varied as real ones, and not copies?"""
    judge = DigitClassifier(*train)
    return DigitReport(
        count=len(generated),
        recognized=judge.accuracy(generated, prompted),
        accuracy=judge.accuracy(*held_out),
        variety=variety(generated, prompted, *train),
        novelty=novelty(generated, train[0], held_out[0]),
    )
