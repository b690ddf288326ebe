"""Signals and data workers; whole runs with signals are in tests/test_main.py."""

import multiprocessing
import os
import signal
import time

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.callbacks import ExactResume, ImageLogger, SignalCallback
from ldm.callbacks.signals import end_workers, outlive_signals
from ldm.cli import STOPS, Stopped
from tests.callbacks.fit import fit
from tests.toys import Images, Toy


def test_a_forked_worker_leaves_ctrl_c_to_the_main_process():
    callback = SignalCallback(None)
    callback._pid = -1
    callback._on_stop(signal.SIGINT, None)
    callback._on_save(signal.SIGUSR1, None)
    assert callback._wanted == 0


def test_data_workers_survive_signals_to_the_whole_job():
    loader = outlive_signals(DataLoader(Images(40), batch_size=2, num_workers=1))
    batches = iter(loader)
    seen = [next(batches)]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(batches._workers[0].pid, number)
    seen += list(batches)
    assert torch.cat([batch["index"] for batch in seen]).tolist() == list(range(40))


class Slow(Dataset):
    def __init__(self, length=40, seconds=0.0):
        self.length, self.seconds = length, seconds

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return Images()[index % 8]


class Signal(Toy):
    """Sends a signal to itself in a hook."""

    def __init__(self, hook, number=signal.SIGTERM):
        super().__init__()
        self.hook, self.number = hook, number
        self.sent = 0.0

    def send(self, hook):
        if hook == self.hook and not self.sent:
            self.sent = time.monotonic()
            os.kill(os.getpid(), self.number)

    def on_train_start(self):
        self.send("start")

    def training_step(self, batch, batch_idx):
        if self.global_step == 1:
            self.send("step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.send("sanity check" if self.trainer.sanity_checking else "validation")
        super().validation_step(batch, batch_idx)

    def log_images(self, batch, split="train", **kwargs):
        self.send("image log")
        for _ in range(1000 if self.sent else 1):
            self.net(batch["image"].flatten(1))
            time.sleep(0.01)
        return {}


@pytest.mark.parametrize("hook", ["sanity check", "start", "step", "image log", "validation"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_in_any_phase_ends_the_process_soon_and_its_workers_with_it(tmp_path, hook, workers):
    """Workers that take 30 seconds for their next sample included; the save is there unless no step was made."""
    last = tmp_path / "last.ckpt"
    callbacks = [ExactResume(), ImageLogger(batch_frequency=3, max_images=1, increase_log_steps=False)]
    callbacks.append(SignalCallback(last))
    model = Signal(hook)
    model.learning_rate = 1e-3
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=callbacks, accelerator="cpu", max_epochs=1, **off)
    loaders = [DataLoader(Slow(16), batch_size=2, num_workers=workers) for _ in range(2)]
    with pytest.raises(Stopped) as stopped:
        trainer.fit(model, *loaders)
    assert stopped.value.exit_code == 143 and time.monotonic() - model.sent < 5
    assert last.exists() == (hook not in ("sanity check", "start"))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("name, code", [("SIGHUP", 129), ("SIGTERM", 143), ("SIGINT", 130)])
def test_each_stop_signal_has_its_exit_code(tmp_path, name, code):
    callback = SignalCallback(tmp_path / "last.ckpt")
    with pytest.raises(Stopped) as stopped:
        fit(tmp_path, [callback], Signal("step", getattr(signal, name)), validate=False)
    callback.restore()
    assert stopped.value.exit_code == code == STOPS[name]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit(tmp_path, [SignalCallback(None)], Signal("step", signal.SIGHUP), validate=False)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_workers_that_hang_are_ended_at_once():
    batches = iter(DataLoader(Slow(40, seconds=60), batch_size=2, num_workers=2))
    assert len(multiprocessing.active_children()) == 2
    start = time.monotonic()
    end_workers()
    assert time.monotonic() - start < 2 and not multiprocessing.active_children()
    del batches
