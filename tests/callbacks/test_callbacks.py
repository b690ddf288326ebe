"""The callbacks one by one, on a model of a few numbers and a Trainer where one is needed."""

import logging
import os
import random
import re
import signal
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.callbacks import (
    CheckpointPolicy,
    CUDACallback,
    ExactResume,
    ImageLogger,
    ProgressBar,
    RunReport,
    SignalCallback,
    StepSeed,
    StopOnNonFinite,
)
from ldm.callbacks.checkpoints import share_file
from ldm.callbacks.image_logger import make_grid
from ldm.callbacks.progress import total_batches
from ldm.callbacks.signals import outlive_signals
from ldm.checkpoint.resume import AtomicCheckpointIO
from ldm.models.training import NonFiniteError
from tests.reference import randn
from tests.toys import Pictures, Toy, ToyGan


def fit(folder, callbacks, model=None, batches=8, validate=True, **settings):
    """A trained toy and its trainer, in one epoch of `batches` batches unless `settings` say otherwise."""
    model = model or Toy()
    model.learning_rate = 1e-3
    settings = {"max_epochs": 1, "enable_checkpointing": False, **settings}
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        default_root_dir=folder, plugins=[AtomicCheckpointIO()], **settings,
    )  # fmt: skip
    loaders = (
        DataLoader(Pictures(2 * batches), batch_size=2),
        DataLoader(Pictures(4), batch_size=2) if validate else None,
    )
    trainer.fit(model, *loaders)
    return model, trainer


# --------------------------------------------------------------------------------------------------------------- pictures


def drawn(folder, split="train", key="inputs"):
    """Steps of which there are pictures."""
    names = [path.name for path in (folder / "images" / split).glob(f"{key}_*.png")]
    return sorted(int(re.search(r"_gs-(\d{6})_e-\d{6}_b-\d{6}\.png$", name)[1]) for name in names)


@pytest.mark.parametrize(
    "options, steps",
    [
        ({"batch_frequency": 5}, [1, 2, 4, 5, 10]),
        ({"batch_frequency": 5, "increase_log_steps": False}, [5, 10]),
        ({"batch_frequency": 5, "increase_log_steps": False, "log_first_step": True}, [0, 5, 10]),
        ({"batch_frequency": 5, "disabled": True}, []),
        ({"batch_frequency": 100, "increase_log_steps": False}, []),
    ],
)
def test_pictures_are_drawn_at_the_published_steps(tmp_path, options, steps):
    fit(tmp_path, [ImageLogger(max_images=2, **options)], batches=11, validate=False)
    assert drawn(tmp_path) == steps


def test_steps_are_counted_by_optimizer_steps_and_drawn_once_each(tmp_path):
    logger = ImageLogger(batch_frequency=2, max_images=2, increase_log_steps=False, log_first_step=True)
    fit(tmp_path, [logger], batches=12, validate=False, accumulate_grad_batches=3)
    assert drawn(tmp_path) == [0, 2]


def test_batches_are_counted_where_that_is_asked_for(tmp_path):
    logger = ImageLogger(batch_frequency=4, max_images=2, increase_log_steps=False, log_on_batch_idx=True)
    fit(tmp_path, [logger], batches=6, validate=False, max_epochs=2)
    names = sorted(path.name for path in (tmp_path / "images" / "train").glob("inputs*"))
    assert names == ["inputs_gs-000004_e-000000_b-000004.png", "inputs_gs-000010_e-000001_b-000004.png"]


def test_validation_draws_its_first_batch_and_not_too_often(tmp_path):
    fit(tmp_path, [ImageLogger(batch_frequency=8, max_images=2)], batches=4, max_epochs=5, num_sanity_val_steps=2)
    assert drawn(tmp_path, "val") == [3, 11, 19]


def test_a_failure_to_draw_is_reported_and_training_goes_on(tmp_path, caplog):
    class Broken(Toy):
        def log_images(self, batch, split="train", **kwargs):
            self.net.eval()
            raise RuntimeError("no paint")

    model, trainer = fit(tmp_path, [ImageLogger(batch_frequency=1, max_images=2)], Broken())
    assert trainer.global_step == 8 and "no paint" in caplog.text and model.net.training


def test_arguments_of_log_images_are_passed_on(tmp_path):
    seen = []

    class Curious(Toy):
        def log_images(self, batch, split="train", **kwargs):
            seen.append((split, kwargs))
            return {}

    fit(
        tmp_path,
        [ImageLogger(batch_frequency=4, max_images=2, increase_log_steps=False, log_images_kwargs={"ddim_steps": 3})],
        Curious(),
    )
    assert seen == [("train", {"ddim_steps": 3}), ("val", {"ddim_steps": 3})]


def test_drawing_changes_neither_modes_nor_random_numbers(tmp_path):
    class Rough(Toy):
        def log_images(self, batch, split="train", **kwargs):
            assert not any(module.training for module in self.modules())
            random.random(), np.random.rand(), torch.rand(1)
            return {"x": torch.full((1, 3, 4, 4), float("nan"))}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, model, *args):
            numbers.append(
                (model.training, model.average.training, random.random(), np.random.rand(), float(torch.rand(())))
            )

    runs = []
    for disabled in (False, True):
        numbers = []
        model = Rough()
        model.average.eval()
        fit(tmp_path, [StepSeed(1), ImageLogger(1, 2, disabled=disabled), Watch()], model, validate=False)
        runs.append(numbers)
    assert runs[0] == runs[1] and runs[0][0][:2] == (True, False)


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 1, 4, 6), (5, 2, 4, 6), (5, 4, 4, 6), (1, 3, 4, 6)])
def test_any_number_of_channels_becomes_a_picture(shape):
    grid = ImageLogger(1, 8)._grid(randn(0, *shape))
    rows, columns = (2, 4) if shape[0] > 1 else (0, 0)
    assert grid.shape == ((3, 2 + rows * 6, 2 + columns * 8) if rows else (3, 4, 6))
    assert grid.min() >= -1 and grid.max() <= 1


def test_a_grid_holds_its_pictures_in_reading_order():
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 2, 2)
    grid = make_grid(images, columns=4, padding=1)
    assert grid[0, 1::3, 1::3].tolist() == [[0, 1, 2, 3], [4, 5, -1, -1]]


def test_clamp_and_rescale_are_the_published_ones():
    x = torch.tensor([-3.0, 0.0, 0.5, 3.0]).reshape(1, 1, 2, 2)
    assert ImageLogger(1, 1)._grid(x)[0].flatten().tolist() == [-1, 0, 0.5, 1]
    assert ImageLogger(1, 1, rescale=False)._grid(x)[0].flatten().tolist() == [-3, -1, 0, 1]


@pytest.mark.parametrize("frequency", [0, -1])
def test_an_impossible_frequency_is_refused(frequency):
    with pytest.raises(ValueError, match=f"batch_frequency {frequency}"):
        ImageLogger(frequency, 1)


# ------------------------------------------------------------------------------------------------------------ checkpoints


def test_last_shares_its_bytes_with_the_best_of_the_same_step(tmp_path):
    policy = CheckpointPolicy(dirpath=tmp_path, filename="{epoch:06}", save_last=True, monitor="val/loss", save_top_k=3)
    fit(tmp_path, [policy], enable_checkpointing=True)
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "epoch=000000.ckpt")


def test_last_survives_the_pruning_of_its_twin(tmp_path):
    class Worse(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch))

    policy = CheckpointPolicy(dirpath=tmp_path, filename="{epoch:06}", save_last=True, monitor="val/loss", save_top_k=1)
    fit(tmp_path, [policy], Worse(), enable_checkpointing=True, max_epochs=3)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"epoch=000000.ckpt", "last.ckpt"}
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 24


@pytest.mark.parametrize("when", [{"every_n_train_steps": 1}, {"train_time_interval": timedelta(seconds=2)}])
def test_nothing_is_saved_within_accumulated_gradients(tmp_path, when, monkeypatch):
    clock = SimpleNamespace(monotonic=iter(range(1000)).__next__)  # a second goes by whenever somebody looks
    monkeypatch.setattr("pytorch_lightning.callbacks.model_checkpoint.time", clock)
    saved = []

    class Spy(CheckpointPolicy):
        def _save_checkpoint(self, trainer, filepath):
            saved.append(trainer.fit_loop.epoch_loop.batch_idx)
            super()._save_checkpoint(trainer, filepath)

    policy = Spy(dirpath=tmp_path, filename="{step}", save_last=True, save_top_k=-1, **when)
    fit(tmp_path, [policy], batches=12, validate=False, enable_checkpointing=True, accumulate_grad_batches=3)
    assert saved and all(batch % 3 == 2 for batch in saved)


def test_share_file_replaces_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    assert share_file(tmp_path / "a", tmp_path / "b") and (tmp_path / "b").read_text() == "new"
    assert not share_file(tmp_path / "gone", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_state_saved_at_an_epochs_last_batch_reads_as_its_end(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    fit(tmp_path, [ExactResume(), Save()], batches=2, validate=False)
    loops = [torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["loops"]["fit_loop"] for step in (1, 2)]
    assert [loop["epoch_progress"]["current"]["processed"] for loop in loops] == [0, 1]
    assert [loop["epoch_loop.batch_progress"]["current"]["completed"] for loop in loops] == [0, 2]


# ------------------------------------------------------------------------------------------------- steps: seeds and stops


def test_every_place_has_its_own_random_numbers_and_always_the_same():
    class Place:
        def __init__(self, rank, epoch):
            self.global_rank, self.current_epoch = rank, epoch

    def draw(seed, rank, epoch, batch):
        StepSeed(seed).on_train_batch_start(Place(rank, epoch), None, None, batch)
        return float(torch.rand((), dtype=torch.float64)), random.random(), np.random.rand()

    places = [(seed, rank, epoch, batch) for seed in (0, 1) for rank in (0, 1) for epoch in (0, 1) for batch in (0, 1)]
    numbers = [draw(*place) for place in places]
    assert len(set(numbers)) == len(places) and len({n[0] for n in numbers}) == len(places)
    assert [draw(*place) for place in reversed(places)] == numbers[::-1]


def test_every_validation_sees_the_same_noise(tmp_path):
    seen = []

    class Noise(Toy):
        def validation_step(self, batch, batch_idx):
            seen.append(float(torch.rand(())))

    fit(tmp_path, [StepSeed(1)], Noise(), max_epochs=2, num_sanity_val_steps=0)
    assert seen[:2] == seen[2:] and seen[0] != seen[1]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("kind", [Toy, ToyGan])
def test_what_is_not_finite_stops_before_the_step_and_says_where(tmp_path, poison, kind):
    class Poisoned(kind):
        def backward(self, loss, *args, **kwargs):
            super().backward(loss, *args, **kwargs)
            if poison == "gradient" and self.trainer.global_step == 5 and self.net.weight.grad is not None:
                self.net.weight.grad[0, 0] = float("inf")

    model = Poisoned(at={5: "nan"} if poison == "loss" else None)
    before = {}
    model.on_train_batch_start = lambda batch, batch_idx: before.update(
        {k: v.clone() for k, v in model.state_dict().items()}
    )
    message = "the loss is nan" if poison == "loss" else r"the loss is finite .*net\.weight"
    with pytest.raises(NonFiniteError, match=rf"epoch 0, step 5, rank 0: {message}"):
        fit(tmp_path, [StopOnNonFinite()], model, validate=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_sparse_gradient_is_looked_into(tmp_path):
    class Words(Toy):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Embedding(9, 4, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.net(torch.tensor([1, 2, 1])).sum() * (float("nan") if batch_idx == 3 else 1.0)

        def optimizer_step(self, *args, **kwargs):
            pl.LightningModule.optimizer_step(self, *args, **kwargs)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    with pytest.raises(NonFiniteError, match="step 3"):
        fit(tmp_path, [StopOnNonFinite()], Words(), validate=False)


# --------------------------------------------------------------------------------------------------------------- reports


def test_the_report_comes_from_the_objects_themselves(tmp_path, caplog):
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


def test_without_a_terminal_the_bar_is_a_line_now_and_then_with_the_loss(tmp_path, caplog):
    caplog.set_level("INFO", logger="ldm")
    bar = ProgressBar(seconds_between_lines=0.0)
    model = Toy()
    model.learning_rate = 1e-3
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[bar], max_epochs=2,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, DataLoader(Pictures(8), batch_size=2), DataLoader(Pictures(4), batch_size=2))
    lines = [record.message for record in caplog.records if record.message.startswith("training")]
    assert len(lines) == 8 and re.search(r"epoch 1, batch 6/8  train/loss \d.*batches/s  0:0\d left", lines[5])
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


def test_a_handler_of_a_data_worker_leaves_ctrl_c_to_the_main_process():
    callback = SignalCallback(None)
    callback._pid = -1
    callback._on_interrupt(2, None)
    callback._on_save(10, None)
    assert callback._wanted == 0


def test_lightnings_remarks_are_silent_and_other_warnings_are_one_line(capsys):
    import warnings

    from ldm.training.report import console

    with console():
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
        warnings.warn("something\nto know", stacklevel=1)
        logging.getLogger("ldm.anything").info("%-11s %s", "event", 1)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^[\d:]{8}  ", "", line) for line in lines] == ["warning     something to know", "event       1"]
    assert not logging.getLogger("ldm").handlers


def test_data_workers_outlive_signals_that_reach_the_whole_job():
    loader = outlive_signals(DataLoader(Pictures(40), batch_size=2, num_workers=1))
    batches = iter(loader)
    seen = [next(batches)]
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(batches._workers[0].pid, number)
    seen += list(batches)
    assert torch.cat([batch["index"] for batch in seen]).tolist() == list(range(40))
