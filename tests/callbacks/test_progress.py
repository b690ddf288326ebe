"""Report and progress of a run."""

import re
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks import CUDACallback, ExactResume, ProgressBar, RunReport
from ldm.callbacks.progress import total_batches
from tests.callbacks.fit import fit
from tests.toys import Toy


def test_the_report_reads_the_objects_themselves(tmp_path, caplog):
    caplog.set_level("INFO", logger="ldm")
    fit(tmp_path, [RunReport("the rule"), CUDACallback()], batches=3)
    text = "\n".join(record.message for record in caplog.records)
    for line in (
        r"data +3 batches per epoch, 2 of validation",
        r"model +Toy, 78 parameters, 39 trainable, float32",
        r"batch +the rule",
        r"optimizer +Adam, learning rate 1\.000e-03, 2 tensors",
        r"epoch +0 took \d+\.\d s, peak memory \d+ MiB",
        r"trained +3 steps in 0:0\d.*now at step 3, train/loss \d",
    ):
        assert re.search(line, text), line


def test_without_a_terminal_progress_is_log_lines_with_the_loss(tmp_path, caplog):
    caplog.set_level("INFO", logger="ldm")
    bar = ProgressBar(seconds_between_lines=0.0)
    fit(tmp_path, [bar], batches=4, max_epochs=2)
    lines = [record.message for record in caplog.records if record.message.startswith("training")]
    assert len(lines) == 8 and re.search(r"epoch 1, batch 6/8  train/loss \d.*batches/s  0:00:0\d left", lines[5])
    assert sum("val/loss" in record.message for record in caplog.records) == 2


def test_a_validation_line_omits_zeros_and_doubles_and_has_units(tmp_path, caplog):
    class Losses(Toy):
        def loss(self, batch):
            return super().loss(batch)

        loss.summed = ("nll_loss",)

        def validation_step(self, batch, batch_idx):
            values = {"val/loss": 2.0, "val/loss_simple": 2.0, "val/d_weight": 0.0, "val/nll_loss": 7.0, "val/a": 2.0}
            self.log_dict(values)

    caplog.set_level("INFO", logger="ldm")
    fit(tmp_path, [ProgressBar()], Losses())
    (line,) = [record.message for record in caplog.records if record.message.startswith("validation")]
    assert "step 8: val/loss 2, val/nll_loss 7 per image (" in line


def test_the_time_left_follows_the_rate_of_minutes(tmp_path, caplog, monkeypatch):
    """A pause of a validation or an image log moves it little: here each fourth of the batches takes 41 seconds."""
    caplog.set_level("INFO", logger="ldm")
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("ldm.callbacks.progress.time", clock)

    class Tick(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            clock.now += 41.0 if batch_idx % 4 == 3 else 1.0

    fit(tmp_path, [Tick(), ProgressBar(seconds_between_lines=15.0)], batches=80, validate=False)
    lines = [record.message for record in caplog.records if record.message.startswith("training")]
    left = [re.search(r"batch (\d+)/80 .* (\d+):(\d+):(\d+) left", line).groups() for line in lines]
    for batch, *clock_left in left[3:]:
        seconds = sum(int(part) * factor for part, factor in zip(clock_left, (3600, 60, 1)))
        assert seconds == pytest.approx((80 - int(batch)) * 11, rel=0.35)


def test_a_resume_reports_what_it_validates_and_what_the_checkpoint_decides(tmp_path, caplog):
    caplog.set_level("INFO", logger="ldm")

    class Decayed(Toy):
        decay, weight_decay = 0.5, 0.0

        def __init__(self):
            super().__init__()
            self.model_ema = torch.nn.Module()
            self.model_ema.register_buffer("decay", torch.tensor(self.decay))

        def configure_optimizers(self):
            options = {"weight_decay": self.weight_decay, "maximize": self.weight_decay > 0}
            return torch.optim.AdamW(self.net.parameters(), lr=1e-3, **options)

    class Changed(Decayed):
        decay, weight_decay = 0.25, 0.1

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    options = {"batches": 3, "max_epochs": 2, "check_val_every_n_epoch": 2}
    fit(tmp_path, [ExactResume(), Save()], Decayed(), **options)
    fit(tmp_path, [ExactResume(), RunReport()], Changed(), checkpoint=tmp_path / "2.ckpt", **options)
    lines = [record.message for record in caplog.records]
    assert "data        3 batches per epoch, 2 of validation" in lines
    assert "optimizer   the checkpoint's weight_decay 0.0 is used, not the configs' 0.1" in lines
    assert "optimizer   the checkpoint's maximize False is used, not the configs' True" in lines
    assert "EMA         the checkpoint's decay 0.5 is used, not the configs' 0.25" in lines


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
