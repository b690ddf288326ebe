"""A run that is stopped anywhere and resumed gets the batches, random numbers included, of an uninterrupted run.

These laws depend on the installed Lightning, whose epoch counters alone do not suffice.
"""

import functools
import logging

import pytest
import pytorch_lightning as pl

from ldm.callbacks import ExactResume
from ldm.config.instantiate import ConfigError
from ldm.data.datamodule import DataModuleFromConfig, _fingerprint
from tests.data.layouts import save_image
from tests.data.toys import LENGTH, Numbers, NumberStream, Recorder

pytestmark = pytest.mark.filterwarnings("ignore")


def data(workers=0, batch_size=3, seed=5, stream=False):
    module = DataModuleFromConfig(batch_size, train={}, validation={}, num_workers=workers)
    module.datasets = {"train": NumberStream(LENGTH) if stream else Numbers(), "validation": Numbers(4)}
    module.seed = seed
    return module


class SaveAndStop(pl.Callback):
    """Saves at a hook after a number of steps, and stops the run as Ctrl-C does."""

    def __init__(self, hook, step, path):
        super().__init__()
        self.path, self.step = path, step
        setattr(self, hook, self._save)

    def _save(self, trainer, *args, **kwargs):
        if trainer.global_step == self.step and not trainer.sanity_checking and not self.path.exists():
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def fit(module, ckpt_path=None, callbacks=(), model=None, **options):
    model = model or Recorder()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", callbacks=list(callbacks), num_sanity_val_steps=1, **quiet, **options)
    try:
        trainer.fit(model, datamodule=module, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    except (KeyboardInterrupt, SystemExit):
        assert callbacks
    return model, trainer


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


EPOCHS = {"max_epochs": 3}
STEPS = {"max_steps": 11, "max_epochs": -1}


RUNS = {
    "epochs": EPOCHS,
    "steps": STEPS,
    "validation within": {**EPOCHS, "val_check_interval": 2},
    "limited": {**EPOCHS, "limit_train_batches": 3},
    "no validation": {**EPOCHS, "limit_val_batches": 0},
}
HOOKS = ["on_train_batch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end"]
STOPS = (1, 3, 4, 5, 6, 8)  # within, at and after the end of an epoch, which has 4 or 3 batches


@functools.cache
def uninterrupted(kind):
    return fit(data(), **RUNS[kind])[0].seen


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_stopped_at_any_step_resumes_with_the_next_batch(tmp_path, kind, hook):
    whole = uninterrupted(kind)
    assert len(set(whole)) == len(whole) > 8
    stopped = 0
    for step in STOPS:
        path = tmp_path / f"{step}.ckpt"
        before = fit(data(), callbacks=[SaveAndStop(hook, step, path)], **RUNS[kind])[0].seen
        if path.exists():
            after = fit(data(), path, **RUNS[kind])[0].seen
            assert before + after == whole, f"stopped at step {step}"
            stopped += 1
    assert stopped > 1 or (hook == "on_validation_end" and kind == "no validation")


@pytest.mark.parametrize(("steps", "workers"), [(2, 0), (4, 0), (7, 0), (7, 2)])
def test_a_run_that_max_steps_ended_resumes_at_its_position(tmp_path, steps, workers):
    whole = uninterrupted("steps")
    first, trainer = fit(data(), **{**STEPS, "max_steps": steps})
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    second, _ = fit(data(workers), tmp_path / "x.ckpt", **STEPS)
    assert first.seen + second.seen == whole


def test_a_run_may_be_stopped_again_and_again(tmp_path):
    whole = uninterrupted("epochs")
    seen, path = [], None
    for step in (2, 3, 6, 9):
        following = tmp_path / f"{step}.ckpt"
        seen += fit(data(), path, [SaveAndStop("on_train_batch_end", step, following)], **EPOCHS)[0].seen
        path = following
    assert seen + fit(data(), path, **EPOCHS)[0].seen == whole


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_are_counted_one_by_one(tmp_path, accumulate):
    options = {**EPOCHS, "accumulate_grad_batches": accumulate}
    whole = fit(data(), **options)[0].seen
    before = fit(data(), callbacks=[SaveAndStop("on_train_batch_end", 3, tmp_path / "x.ckpt")], **options)[0].seen
    assert before + fit(data(), tmp_path / "x.ckpt", **options)[0].seen == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_too(tmp_path, workers):
    options = {"max_epochs": 2, "limit_val_batches": 0}
    whole = fit(data(workers, stream=True), **options)[0].seen
    assert len(set(whole)) == len(whole)
    before = fit(
        data(workers, stream=True), callbacks=[SaveAndStop("on_train_batch_end", 5, tmp_path / "x.ckpt")], **options
    )[0].seen
    assert before + fit(data(workers, stream=True), tmp_path / "x.ckpt", **options)[0].seen == whole


def test_the_number_of_workers_changes_nothing_in_a_run():
    alone, helped = (fit(data(workers), max_epochs=2)[0] for workers in (0, 2))
    assert alone.seen == helped.seen and alone.validated == helped.validated


def test_validation_uses_the_same_random_numbers_every_time():
    validated = fit(data(), **EPOCHS)[0].validated
    # One batch of the sanity check, then two in each epoch.
    assert len(validated) == 7 and set(validated[1:]) == set(validated[1:3])


def test_the_position_is_plain_numbers(tmp_path):
    _, trainer = fit(data(), max_steps=6, max_epochs=-1)
    expected = {"seed": 5, "epoch": 1, "samples": 6, "trained": 6, "global_batch_size": 3}
    expected |= {"class_names": [], "datasets": {"train": {"samples": LENGTH}, "validation": {"samples": 4}}}
    assert trainer.datamodule.state_dict() == expected


def test_another_seed_on_the_command_line_does_not_change_a_resumed_order(tmp_path, caplog):
    whole = uninterrupted("epochs")
    before = fit(data(), callbacks=[SaveAndStop("on_train_batch_end", 5, tmp_path / "x.ckpt")], **EPOCHS)[0].seen
    assert before + fit(data(seed=99), tmp_path / "x.ckpt", **EPOCHS)[0].seen == whole
    assert "the order keeps the checkpoint's seed 5, not 99" in caplog.text


def test_another_batch_size_resumes_after_the_used_samples(caplog):
    module = data(batch_size=5)
    with caplog.at_level("INFO", "ldm.data"):
        module.load_state_dict({"seed": 5, "epoch": 2, "batch": 3, "trained": 11, "global_batch_size": 3})
    messages = [record.getMessage() for record in caplog.records if record.name == "ldm.data.datamodule"]
    assert len(messages) == 2 and all(line.startswith("data        ") for line in messages)  # aligned
    assert module._position() is None and module._start == (2, 9)
    assert "batch size 5, previously 3" in caplog.text
    # Without a checkpoint a fit begins at the start.
    assert fit(module, **EPOCHS)[0].seen == fit(data(batch_size=5), **EPOCHS)[0].seen


def test_a_fresh_fit_with_the_same_module_begins_at_the_start(tmp_path):
    module = data()
    whole = fit(module, **EPOCHS)[0].seen
    fit(data(), callbacks=[SaveAndStop("on_train_batch_end", 5, tmp_path / "x.ckpt")], **EPOCHS)
    fit(module, tmp_path / "x.ckpt", **EPOCHS)
    assert fit(module, **EPOCHS)[0].seen == whole


def folder_data(root):
    config = {"target": "ldm.data.folder.ImageFolder", "params": {"root": str(root), "size": 4, "class_labels": True}}
    module = DataModuleFromConfig(2, train=config, num_workers=0)
    module.setup()
    return module


@pytest.fixture
def resumed(tmp_path):
    """A folder of two classes, and the state of a run on it."""
    for i, name in enumerate(("ape/0.png", "ape/1.png", "tench/2.png")):
        save_image(tmp_path / name, i, 4, 4)
    module = folder_data(tmp_path)
    position = {"seed": 23, "epoch": 0, "batch": 1, "trained": 1, "global_batch_size": 2}
    data = {split: _fingerprint(dataset) for split, dataset in module.datasets.items()}
    return tmp_path, {**position, "class_names": module.class_names, "datasets": data}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "ape/0.png").unlink(), "(2 samples, previously 3)"),
        (lambda root: save_image(root / "ape/new.png"), "other samples, files, labels, content than when"),
        (
            lambda root: (root / "ape/0.png").rename(root / "ape/7.png"),
            "other files, content than when the",
        ),
    ],
)
def test_data_that_changed_between_stop_and_resume_is_logged_or_refused(resumed, caplog, change, message):
    root, state = resumed
    folder_data(root).load_state_dict(state)
    assert "data.params" not in caplog.text
    change(root)
    module = folder_data(root)
    module.load_state_dict(state)
    assert message in caplog.text and "the rest of this epoch may repeat or miss samples" in caplog.text
    module.strict = True
    with pytest.raises(ConfigError, match="restore them, or resume without --strict-data"):
        module.load_state_dict(state)


def test_changed_images_are_logged_without_a_word_about_their_order(resumed, caplog):
    root, state = resumed
    save_image(root / "ape/0.png", 7, 4, 4)  # of the same size in bytes
    folder_data(root).load_state_dict(state)
    assert "other content than when" in caplog.text and "this epoch" not in caplog.text


def test_class_numbers_that_changed_are_refused_and_new_classes_at_the_end_are_not(resumed):
    root, state = resumed
    save_image(root / "zebra/0.png")
    folder_data(root).load_state_dict(state)
    save_image(root / "bee/0.png")
    with pytest.raises(
        ConfigError, match=r"class 1 is 'bee', but was 'tench' .*; set data.params.train.params.classes"
    ):
        folder_data(root).load_state_dict(state)


def test_a_checkpoint_without_a_fingerprint_resumes(resumed):
    root, state = resumed
    del state["class_names"], state["datasets"]
    folder_data(root).load_state_dict(state)


class PerSample(Recorder):
    """Remembers samples, (index, its random number), instead of batches."""

    def training_step(self, batch, batch_idx):
        self.seen += zip(batch["index"].tolist(), batch["draw"].tolist())
        return self.layer(batch["draw"][:, None].float()).mean()


def samples(module, ckpt_path=None, callbacks=(), **options):
    return fit(module, ckpt_path, callbacks, PerSample(), **{"limit_val_batches": 0, "max_epochs": 3, **options})[
        0
    ].seen


@functools.cache
def all_samples(stream=False):
    return samples(data(batch_size=1, stream=stream))


@pytest.mark.parametrize(("before", "after"), [(4, 4), (4, 3), (3, 4), (1, 5), (5, 1), (8, 3), (3, 8)])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_resume_with_another_batch_size_repeats_and_misses_no_sample(tmp_path, hook, before, after):
    stopped = 0
    for step in (1, 2, 3, 5):
        path = tmp_path / f"{step}.ckpt"
        first = samples(data(batch_size=before), callbacks=[SaveAndStop(hook, step, path), ExactResume()])
        if path.exists():
            assert first + samples(data(batch_size=after), path, [ExactResume()]) == all_samples(), f"step {step}"
            stopped += 1
    assert stopped > 1


@pytest.mark.parametrize(("before", "after"), [(4, 3), (3, 4)])
def test_a_run_that_max_steps_ended_resumes_with_another_batch_size(tmp_path, before, after):
    for steps in (1, 2, 4):
        path = tmp_path / f"{steps}.ckpt"
        options = {"max_epochs": -1, "callbacks": [ExactResume()]}
        first, trainer = fit(
            data(batch_size=before), model=PerSample(), max_steps=steps, limit_val_batches=0, **options
        )
        trainer.save_checkpoint(path)
        both = first.seen + samples(data(batch_size=after), path, max_steps=steps + 5, **options)
        assert both == all_samples()[: len(both)] and len(both) > LENGTH


def test_the_position_of_older_checkpoints_is_read():
    module = data(batch_size=4)
    module.load_state_dict({"seed": 5, "epoch": 1, "batch": 2, "trained": 6, "global_batch_size": 3})
    assert module._start == (1, 6)


@pytest.mark.parametrize(("before", "after"), [((4, 0), (3, 2)), ((3, 2), (4, 1)), ((2, 3), (2, 0))])
def test_a_stream_resumes_with_another_batch_size_and_number_of_workers(tmp_path, before, after):
    path = tmp_path / "x.ckpt"
    stop = [SaveAndStop("on_train_batch_end", 2, path), ExactResume()]
    first = samples(data(before[1], before[0], stream=True), callbacks=stop)
    assert first + samples(data(after[1], after[0], stream=True), path, [ExactResume()]) == all_samples(stream=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_samples_of_batches_behind_limit_train_batches_are_known(accumulate):
    class Ahead(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.found = [trainer.datamodule.training_samples(ahead) for ahead in range(5)]

    ahead = Ahead()
    fit(data(), callbacks=[ahead], max_epochs=1, limit_train_batches=2, accumulate_grad_batches=accumulate)
    *batches, after = ahead.found
    assert after is None and [(each.start, each.weight) for each in batches] == [(0, 1), (3, 1), (6, 1), (9, 1)]
