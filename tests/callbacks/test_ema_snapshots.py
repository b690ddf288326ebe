"""Snapshots of averages in a run that is stopped and resumed."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from ldm.callbacks import EMASnapshots, ExactResume
from ldm.checkpoint.snapshots import find_snapshots
from ldm.models.training import TrainedModule
from ldm.modules.ema import EMAConfig
from ldm.training.checkpoint_io import AtomicCheckpointIO
from tests.models.first_stages import QUIET
from tests.reference import randn, seed_weights


class Averaged(TrainedModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = seed_weights(nn.Linear(3, 2))
        self.add_ema(config=EMAConfig([{"decay": 0.9}, {"sigma_rel": 0.05}, {"sigma_rel": 0.1}], snapshot_every=2))
        self.learning_rate = 0.1

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()


class SaveAt(pl.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(folder, steps, checkpoint=None, limit=3, callbacks=(), every=2):
    module, data = Averaged(), DataLoader([randn(0, 3)] * 40, batch_size=1)
    options = {**QUIET, "max_steps": steps, "plugins": [AtomicCheckpointIO()], "max_epochs": 1}
    options["callbacks"] = [ExactResume(), EMASnapshots(folder, every, limit), *callbacks]
    pl.Trainer(**options).fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return {each.step: each.tensors() for each in find_snapshots(folder)}


def test_a_resumed_run_has_the_snapshots_of_an_uninterrupted_one(tmp_path):
    """Also those of the checkpoint's step, if the run was killed before it wrote them, and none of a later step."""
    whole = run(tmp_path / "whole", 15)
    assert list(whole) == [4, 8, 12]
    for saved in (5, 6):
        folder, state = tmp_path / f"stopped-{saved}", tmp_path / f"{saved}.ckpt"
        run(folder, 9, callbacks=[SaveAt(saved, state)])
        for snapshot in find_snapshots(folder):
            if snapshot.step == saved:
                snapshot.path.unlink()
        resumed = run(folder, 15, checkpoint=state)
        assert list(resumed) == list(whole)
        for step, tensors in whole.items():
            assert all(torch.equal(value, resumed[step][name]) for name, value in tensors.items())


def test_a_run_that_starts_again_deletes_the_snapshots_of_its_first_try(tmp_path):
    run(tmp_path, 9)
    assert list(run(tmp_path, 2)) == [2]


def test_a_resume_with_another_interval_keeps_the_snapshots_so_far(tmp_path):
    run(tmp_path, 5, callbacks=[SaveAt(5, tmp_path / "5.ckpt")])
    assert list(run(tmp_path, 9, checkpoint=tmp_path / "5.ckpt", every=3, limit=4)) == [2, 4, 6, 9]


def test_a_snapshot_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(28, "No space left on device", "step=2")

    monkeypatch.setattr("ldm.callbacks.ema_snapshots.write_snapshot", fail)
    assert run(tmp_path, 3) == {}
    assert "step 2: failed, training continues: step=2: No space left on device" in caplog.text
