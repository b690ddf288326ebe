"""Corrections to how Lightning resumes."""

import pytorch_lightning as pl
import torch

from ldm.callbacks import ExactResume
from tests.callbacks.fit import fit


def test_a_state_saved_at_an_epochs_last_batch_reads_as_its_end(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    fit(tmp_path, [ExactResume(), Save()], batches=2, validate=False)
    loops = [torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["loops"]["fit_loop"] for step in (1, 2)]
    assert [loop["epoch_progress"]["current"]["processed"] for loop in loops] == [0, 1]
    assert [loop["epoch_loop.batch_progress"]["current"]["completed"] for loop in loops] == [0, 2]
