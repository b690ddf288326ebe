"""Data workers whose death is reported where a batch is fetched, with the sample that the worker was loading."""

from __future__ import annotations

import signal
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL, signal_handling
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter


class DataWorkerError(RuntimeError):
    """A data worker that ended before its work was done."""


class Traced(Dataset):
    """A map-style dataset read by (epoch, index), with the index that each worker loaded last in shared memory."""

    def __init__(self, dataset: Any, num_workers: int) -> None:
        self.dataset = dataset
        self.last = torch.full((num_workers,), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Any]) -> list[Any]:
        return [self[key] for key in keys]

    def __getitem__(self, key: Any) -> Any:
        if (worker := get_worker_info()) is not None:
            self.last[worker.id] = key[-1] if isinstance(key, tuple) else key
        return self.dataset[key]


class Loader(DataLoader):
    """A DataLoader that raises DataWorkerError for a worker that ended.

    Only while it fetches a batch: PyTorch's handler of SIGCHLD raises anywhere, such as in the middle of a checkpoint.
    """

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if self.num_workers == 0:
            return super()._get_iterator()
        signal_handling._SIGCHLD_handler_set = True
        self.check_worker_number_rationality()
        return _WorkerIterator(self)


class _WorkerIterator(_MultiProcessingDataLoaderIter):
    def _try_get_data(self, timeout: float = MP_STATUS_CHECK_INTERVAL) -> tuple[bool, Any]:
        try:
            return super()._try_get_data(timeout)
        except RuntimeError as error:
            ended = [(number, worker) for number, worker in enumerate(self._workers) if not worker.is_alive()]
            if not ended:
                raise
            number, worker = ended[0]
            last = _last_sample(self._dataset, number)
            cause = _cause(worker.exitcode)
            problem = f"data worker {number} (process {worker.pid}) {cause}{last}"
            raise DataWorkerError(f"{problem}; check that file, or lower data.params.num_workers") from error


def _cause(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    reason = ", perhaps because memory was low" if exit_code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-exit_code).name}{reason}"


def _last_sample(dataset: Any, worker: int) -> str:
    """Return the sample that a worker loaded last, with its file if the dataset has a method `file_of`."""
    if not isinstance(dataset, Traced) or (index := int(dataset.last[worker])) < 0:
        return ""
    inner: Any = dataset
    while inner is not None and not hasattr(inner, "file_of"):
        inner = getattr(inner, "dataset", None) or getattr(inner, "data", None)
    return f"; its last sample is {index}" + (f", {inner.file_of(index)}" if inner is not None else "")
