"""Metrics are one file over all starts, and no logger ends a run."""

import csv

import pytest
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultCollection

from ldm.training.loggers import MetricsFile, log_without_copies, never_fail
from tests.callbacks.fit import fit


def rows(path):
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_rows_are_on_disk_at_once_and_new_columns_keep_the_old_rows(tmp_path):
    board = MetricsFile(tmp_path / "csv" / "metrics.csv")
    board.log_metrics({"a": 1.0}, 0)
    board.log_metrics({"a": 2.0}, 1)
    assert rows(board.path) == [{"a": 1, "step": 0}, {"a": 2, "step": 1}]
    board.log_metrics({"b": 3.0}, 1)
    assert rows(board.path) == [{"a": 1, "step": 0}, {"a": 2, "step": 1}, {"b": 3, "step": 1}]


@pytest.mark.parametrize("validates, kept", [(False, 6), (True, 5)])
def test_a_resumed_run_continues_the_file_without_a_step_twice(tmp_path, validates, kept):
    path = tmp_path / "metrics.csv"
    board = MetricsFile(path)
    for step in range(6):
        board.log_metrics({"loss": step}, step)
        if step % 2:
            board.log_metrics({"val/loss": step}, step)
    with open(path, "a") as file:
        file.write("1.2")  # killed within a line
    before = rows(path)[:-1]
    board = MetricsFile(path)
    board.resume_at(4 if not validates else 3, validates)
    expected = [row for row in before if row["step"] < 4 and not (validates and row["step"] == 3 and "val/loss" in row)]
    assert rows(path) == expected and len(expected) == kept
    board.log_metrics({"loss": 4.0}, 4)
    assert rows(path) == [*expected, {"loss": 4, "step": 4}]


def test_a_file_that_cannot_grow_is_named_once_and_its_rows_are_written_later(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    board = never_fail(MetricsFile(path))
    board.log_metrics({"loss": 0.0}, 0)
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")
    for step in (1, 2, 3):
        board.log_metrics({"loss": step}, step)
    (record,) = [record for record in caplog.records if "training continues" in record.message]
    assert "metrics.csv" in record.message and "No space left" in record.message
    path.unlink()
    (tmp_path / "kept").rename(path)
    board.finalize("success")
    assert [row["step"] for row in rows(path)] == [0, 1, 2, 3]


class Broken(Logger):
    """A logger of which everything fails."""

    name = version = "broken"
    save_dir = "somewhere"

    def fail(self, *args, **kwargs):
        raise RuntimeError("no network")

    log_metrics = log_hyperparams = save = finalize = after_save_checkpoint = fail
    experiment = property(fail)


def test_a_broken_logger_does_not_end_training(tmp_path, caplog):
    _, trainer = fit(tmp_path, [], logger=never_fail(Broken()), log_every_n_steps=1)
    assert trainer.global_step == 8
    lines = [record.message for record in caplog.records if "training continues" in record.message]
    assert lines == ["metrics     Broken cannot log to somewhere, training continues: RuntimeError: no network"]


def test_a_tensorboard_whose_folder_cannot_be_created_does_not_end_training(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    board = never_fail(TensorBoardLogger(tmp_path, name="tensorboard", version=""))
    assert isinstance(board, TensorBoardLogger)
    _, trainer = fit(tmp_path, [], logger=board, log_every_n_steps=1)
    assert trainer.global_step == 8 and "TensorBoardLogger cannot log to" in caplog.text


def test_a_logged_value_is_moved_to_another_device_and_its_settings_are_copied_only_then():
    log_without_copies()
    results = _ResultCollection(training=True)
    settings = []
    for value in (1.0, 3.0):
        results.log("training_step", "loss", torch.tensor(value), on_step=True, on_epoch=True, batch_size=2)
        metric = results["training_step.loss"]
        settings.append(metric.meta)
    assert settings[0] is settings[1]
    assert metric.compute() == 2.0
    assert metric.to(torch.device("meta")).value.is_meta
    assert metric.meta is not settings[0]
