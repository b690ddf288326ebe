"""Corrections to how Lightning resumes: what was due after the last step is done by the resumed run."""

import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks import ExactResume
from tests.callbacks.fit import fit
from tests.full.stops import check
from tests.toys import Toy


@pytest.mark.parametrize(
    "way, stops",
    [
        ("monitor", [6, 30]),
        ("no-monitor", [12, 30]),
        ("no-validation", [6, 30]),
        ("often", [4, 30]),
        ("rarely", [6, 12]),
        ("every-step", [6]),
        ("max-steps", [9, 30]),
        ("accumulated", [2]),
        ("gan", [6]),
    ],
)
def test_a_stop_at_a_step_with_a_validation_or_the_end_of_an_epoch_changes_nothing(tmp_path, way, stops, monkeypatch):
    """Of the best-of files and validations too; python -m tests.full stops tries every step."""
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", [])
    assert list(check(tmp_path, way, stops)) == stops


class Save(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_validation_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / f"validating-{trainer.global_step}.ckpt")


@pytest.mark.parametrize("name", ["2", "validating-2", "4", "validating-4"])
def test_a_validation_that_was_due_or_unfinished_is_run_after_resume_and_only_that(tmp_path, name):
    seen = []

    class Seen(Toy):
        def validation_step(self, batch, batch_idx):
            seen.append((self.global_step, self.current_epoch, batch_idx))

    options = {"batches": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
    fit(tmp_path, [ExactResume(), Save(tmp_path)], Seen(), **options)
    whole = list(seen)
    seen.clear()
    fit(tmp_path, [ExactResume()], Seen(), checkpoint=tmp_path / f"{name}.ckpt", **options)
    assert seen == [place for place in whole if place[0] >= int(name[-1])]


@pytest.mark.parametrize("moment", ["on_train_epoch_end", "on_train_end"])
def test_an_epoch_that_max_steps_cut_short_goes_on_after_resume(tmp_path, moment):
    seen = []

    class Seen(Toy):
        def training_step(self, batch, batch_idx):
            seen.append((self.global_step, self.current_epoch, batch_idx))
            return super().training_step(batch, batch_idx)

    class AtEnd(pl.Callback):
        pass

    setattr(AtEnd, moment, lambda self, trainer, module: trainer.save_checkpoint(tmp_path / "end.ckpt"))
    fit(tmp_path, [ExactResume()], Seen(), batches=4, max_epochs=3)
    whole = list(seen)
    for steps in (6, 8, 9):  # within an epoch, at its end, after its first step
        seen.clear()
        fit(tmp_path, [ExactResume(), AtEnd()], Seen(), batches=4, max_epochs=-1, max_steps=steps)
        if steps % 4:
            assert torch.load(tmp_path / "end.ckpt", weights_only=True)["epoch"] == steps // 4
        fit(tmp_path, [ExactResume()], Seen(), batches=4, max_epochs=3, checkpoint=tmp_path / "end.ckpt")
        assert seen == whole


def test_the_metrics_of_the_last_validation_are_restored(tmp_path):
    found = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            found.setdefault(trainer.global_step, trainer.callback_metrics.get("val/loss"))

    fit(tmp_path, [ExactResume(), Save(tmp_path), Look()], batches=3, max_epochs=2)
    value = found.pop(4)
    found.clear()
    fit(tmp_path, [ExactResume(), Look()], batches=3, max_epochs=2, checkpoint=tmp_path / "4.ckpt")
    assert value is not None and torch.equal(found[4], value)
