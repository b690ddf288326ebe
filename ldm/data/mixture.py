"""Several datasets mixed by weight, with an order and an epoch that resume exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.config.types import PositiveInt
from ldm.data.base import CombinedDataset, DataConfigError, part_errors, prepare
from ldm.data.order import ORDER, order_generator, order_of
from ldm.rng import mix


class Mixture(CombinedDataset):
    """Samples of several datasets, in proportion to their weights, which need not add up to 1.

    datasets: a list of {weight, target, params}; a missing weight is 1. samples: number in an epoch; None means that of
    all datasets together.

    An epoch holds round(samples * weight / sum of weights) samples of each dataset. The next epoch continues where it
    stopped: each of its samples is used before one is used again, however large its weight. The order of the
    datasets in an epoch is random, and that in validation is the order of the list. An item holds the keys that items
    of all have.
    """

    def __init__(self, datasets: Sequence[Mapping[str, Any]], samples: PositiveInt | None = None) -> None:
        if not datasets:
            raise DataConfigError("datasets", [], "is empty", "set {param} to a list of {weight, target, params}")
        configs = [dict(config) if isinstance(config, Mapping) else {} for config in datasets]
        weights = np.array([_weight(number, config.pop("weight", 1)) for number, config in enumerate(configs)])
        super().__init__({_name(number): config for number, config in enumerate(configs)})
        self._starts = np.cumsum([0, *map(len, self.parts.values())])
        total = samples or int(self._starts[-1])
        self.counts = _shares(total, weights)
        if not self.counts.all():
            problem = f"an epoch of {total} samples has none of datasets[{int(self.counts.argmin())}]"
            raise DataConfigError("samples", samples, problem, "set {param} to more, or give it a larger weight")

    @classmethod
    def prepare_data(cls, datasets: Sequence[Mapping[str, Any]], **_: Any) -> None:
        """Call `prepare_data` of the datasets that have it."""
        for number, config in enumerate(datasets):
            with part_errors(_name(number)):
                prepare(config)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def order(self, seed: int, epoch: int, batch: int, shuffle: bool) -> np.ndarray:
        """Return the indices of an epoch -> (len(self),) int64.

        Index p * L + i is sample i of the L samples of all datasets; p counts the passes over its dataset within the
        epoch. So a sample that occurs twice has two indices, and other random numbers each time.
        """
        epoch = epoch if shuffle else 0  # validation sees the same samples every time
        parts = []
        for number, (part, count) in enumerate(zip(self.parts.values(), self.counts)):
            begin, length, own = epoch * int(count), len(part), mix(seed, ORDER, number)
            first, last = begin // length, (begin + int(count) - 1) // length
            passes = [
                (each - first) * self._starts[-1] + self._starts[number] + order_of(part, own, each, batch, shuffle)
                for each in range(first, last + 1)
            ]
            parts.append(np.concatenate(passes)[begin - first * length :][:count])
        dataset = np.repeat(np.arange(len(parts)), self.counts)  # of each place in the epoch
        if shuffle:
            dataset = order_generator(seed, epoch).permutation(dataset)
        order = np.empty(len(self), np.int64)
        for number, indices in enumerate(parts):
            order[dataset == number] = indices
        return order

    def _place(self, index: int) -> tuple[str, int]:
        within = index % int(self._starts[-1])
        number = int(np.searchsorted(self._starts, within, "right")) - 1
        return _name(number), within - int(self._starts[number])

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """The fingerprints of the datasets, and their shares."""
        return {"shares": "/".join(map(str, self.counts)), **super().fingerprint}


def _name(number: int) -> str:
    return f"datasets[{number}]"


def _weight(number: int, weight: Any) -> float:
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < np.inf:
        raise DataConfigError(f"{_name(number)}.weight", weight, "not a weight", "set {param} to a positive number")
    return float(weight)


def _shares(total: int, weights: np.ndarray) -> np.ndarray:
    """Return `total` divided in proportion to the weights, int64: rounded so that the sum is exact."""
    exact = total * weights / weights.sum()
    shares = np.floor(exact).astype(np.int64)
    largest = np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]
    shares[largest] += 1
    return shares
