"""Report and progress of a run."""

import re

import pytest
import pytorch_lightning as pl

from ldm.callbacks import CUDACallback, ProgressBar, RunReport
from ldm.callbacks.progress import total_batches
from tests.callbacks.fit import fit


def test_the_report_reads_the_objects_themselves(tmp_path, caplog):
    caplog.set_level("INFO", logger="ldm")
    fit(tmp_path, [RunReport(1e-3, "the rule"), CUDACallback()], batches=3)
    text = "\n".join(record.message for record in caplog.records)
    for line in (
        r"data +3 batches per epoch, 2 of validation",
        r"model +Toy, 78 parameters, 39 trainable, float32",
        r"batch +the rule",
        r"optimizer +Adam, learning rate 1\.000e-03, 2 tensors",
        r"epoch +0 took \d+\.\d s, peak memory \d+ MiB",
        r"trained +3 steps in 0:0\d.*now at step 3",
    ):
        assert re.search(line, text), line


def test_without_a_terminal_progress_is_log_lines_with_the_loss(tmp_path, caplog):
    caplog.set_level("INFO", logger="ldm")
    bar = ProgressBar(seconds_between_lines=0.0)
    fit(tmp_path, [bar], batches=4, max_epochs=2)
    lines = [record.message for record in caplog.records if record.message.startswith("training")]
    assert len(lines) == 8 and re.search(r"epoch 1, batch 6/8  train/loss \d.*batches/s  0:00:0\d left", lines[5])
    assert sum("val/loss" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize(
    "settings, total", [({"max_epochs": 3}, 12), ({"max_steps": 3}, 3), ({"max_steps": 5, "max_epochs": 3}, 5)]
)
def test_the_bar_spans_the_whole_run(tmp_path, settings, total):
    totals = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, model):
            totals.append(total_batches(trainer))

    fit(tmp_path, [Look()], batches=4, validate=False, **settings)
    assert totals == [total]
