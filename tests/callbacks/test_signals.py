"""Signals and data workers; whole runs with signals are in tests/test_main.py."""

import os
import signal

import torch
from torch.utils.data import DataLoader

from ldm.callbacks import SignalCallback
from ldm.callbacks.signals import outlive_signals
from tests.toys import Images


def test_a_forked_worker_leaves_ctrl_c_to_the_main_process():
    callback = SignalCallback(None)
    callback._pid = -1
    callback._on_interrupt(2, None)
    callback._on_request(signal.SIGUSR1, None)
    assert callback._wanted == 0


def test_data_workers_survive_signals_to_the_whole_job():
    loader = outlive_signals(DataLoader(Images(40), batch_size=2, num_workers=1))
    batches = iter(loader)
    seen = [next(batches)]
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(batches._workers[0].pid, number)
    seen += list(batches)
    assert torch.cat([batch["index"] for batch in seen]).tolist() == list(range(40))
