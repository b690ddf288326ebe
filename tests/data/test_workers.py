"""A data worker that dies is named where its batch is fetched."""

import os
import signal

import pytest
from torch.utils.data import Dataset, IterableDataset

from ldm.data.workers import DataWorkerError, Loader, Traced


class Deadly(Dataset):
    def __len__(self):
        return 6

    def file_of(self, index):
        return f"{index}.png"

    def __getitem__(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


class DeadlyStream(IterableDataset):
    def __iter__(self):
        yield 0
        os._exit(5)


def test_a_killed_worker_is_named_with_its_last_sample():
    before = signal.getsignal(signal.SIGCHLD)
    loader = Loader(Traced(Deadly(), 2), batch_size=2, num_workers=2)
    with pytest.raises(DataWorkerError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith("data worker 1 (process ") and "was killed by SIGKILL, perhaps because memory" in message
    assert "; its last sample is 3, 3.png; check that file, or lower data.params.num_workers" in message
    assert signal.getsignal(signal.SIGCHLD) == before  # PyTorch's handler would raise in the middle of other work


def test_a_worker_of_a_stream_is_named_too():
    with pytest.raises(DataWorkerError, match=r"data worker 0 \(process \d+\) ended with exit code 5; check"):
        list(Loader(DeadlyStream(), num_workers=1))
