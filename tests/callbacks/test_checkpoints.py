"""Which checkpoints a run keeps."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from ldm.callbacks import CheckpointPolicy, ExactResume, checkpoints
from ldm.callbacks.checkpoints import copy_file
from tests.callbacks.fit import fit
from tests.toys import Toy


def policy_of(folder, **options):
    options = {"filename": "{epoch:06}", "save_last": True, "monitor": "val/loss", "save_top_k": 3, **options}
    return CheckpointPolicy(dirpath=folder, **options)


def names(folder):
    return {path.name for path in folder.glob("*.ckpt")}


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


class Scored(Toy):
    """A validation that logs the scores of a list, one after the other."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = iter(scores)

    def on_validation_epoch_start(self):
        self.score = next(self.scores)

    def validation_step(self, batch, batch_idx):
        if self.score is not None:
            self.log("val/loss", self.score)


@pytest.mark.parametrize("monitor", ["val/loss", None])
def test_the_newest_state_is_in_two_files_that_share_no_inode(tmp_path, monitor):
    fit(tmp_path, [policy_of(tmp_path, monitor=monitor, save_top_k=1)], enable_checkpointing=True)
    last, best = tmp_path / "last.ckpt", tmp_path / "epoch=000000.ckpt"
    assert names(tmp_path) == {"last.ckpt", "epoch=000000.ckpt"}
    assert not last.samefile(best) and last.read_bytes() == best.read_bytes()


def test_a_newest_state_that_is_not_among_the_best_has_a_copy_of_its_own(tmp_path):
    model = Scored(1.0, 2.0, 3.0)
    options = {"enable_checkpointing": True, "max_epochs": 3, "num_sanity_val_steps": 0}
    fit(tmp_path, [policy_of(tmp_path, save_top_k=1)], model, **options)
    assert names(tmp_path) == {"last.ckpt", "last-copy.ckpt", "epoch=000000.ckpt"}
    assert step_of(tmp_path / "last-copy.ckpt") == 24
    fit(
        tmp_path / "one", [policy_of(tmp_path / "one", save_top_k=1, copy_last=False)], Scored(1.0, 2.0, 3.0), **options
    )
    assert names(tmp_path / "one") == {"last.ckpt", "epoch=000000.ckpt"}


def test_only_a_state_that_was_validated_at_its_step_is_ranked(tmp_path):
    policy = policy_of(tmp_path, filename="{step}", every_n_train_steps=1)
    options = {"val_check_interval": 5, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    fit(tmp_path, [policy], Scored(3.0, 2.0), batches=13, **options)
    assert names(tmp_path) == {"last.ckpt", "last-copy.ckpt", "step=5.ckpt", "step=10.ckpt"}
    assert [step_of(tmp_path / f"step={step}.ckpt") for step in (5, 10)] == [5, 10]
    assert step_of(tmp_path / "last.ckpt") == 13


def test_the_value_of_an_earlier_validation_ranks_no_state(tmp_path):
    policy = policy_of(tmp_path, filename="{step}")
    options = {"val_check_interval": 2, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    fit(tmp_path, [policy], Scored(3.0, None, None, 2.0), **options)
    assert names(tmp_path) == {"last.ckpt", "step=2.ckpt", "step=8.ckpt"}


def test_a_value_that_is_not_finite_is_never_among_the_best(tmp_path, caplog):
    nan, infinity = float("nan"), float("inf")
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    fit(tmp_path, [policy_of(tmp_path)], Scored(nan, 1.0, -infinity, nan), max_epochs=4, **options)
    assert names(tmp_path) == {"last.ckpt", "last-copy.ckpt", "epoch=000001.ckpt"}
    assert caplog.text.count("val/loss is nan at step 8: such states are not ranked") == 1
    fit(tmp_path / "nan", [policy_of(tmp_path / "nan")], Scored(nan, nan), max_epochs=2, **options)
    assert names(tmp_path / "nan") == {"last.ckpt", "last-copy.ckpt"}


def resumed(folder, policy, model, **options):
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "checkpoint": folder / "last.ckpt", **options}
    return fit(folder, [policy, ExactResume()], model, **options)


@pytest.mark.parametrize("monitor", ["val/loss", None])
@pytest.mark.parametrize("killed_before", ["copy", "removal"])
def test_what_a_killed_save_left_to_do_is_done_after_resume(tmp_path, monkeypatch, monitor, killed_before):
    """Killed when the best of the second epoch is not copied yet, or copied and the first not removed."""

    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        if killed_before == "removal":
            patch.setattr(CheckpointPolicy, "_remove_checkpoint", kill)
        else:
            second = "epoch=000001.ckpt"
            patch.setattr(checkpoints, "copy_file", lambda a, b: kill() if b.name == second else copy_file(a, b))
        policy = policy_of(tmp_path, monitor=monitor, save_top_k=1)
        with pytest.raises(Killed):
            options = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
            fit(tmp_path, [policy], Scored(2.0, 1.0), max_epochs=2, **options)
    assert (tmp_path / "epoch=000000.ckpt").exists()
    resumed(tmp_path, policy_of(tmp_path, monitor=monitor, save_top_k=1), Scored(3.0), max_epochs=3)
    best = ["epoch=000001.ckpt", "last-copy.ckpt"] if monitor else ["epoch=000002.ckpt"]
    assert names(tmp_path) == {"last.ckpt", *best}
    assert not monitor or step_of(tmp_path / "epoch=000001.ckpt") == 16


def test_a_copy_that_a_killed_save_left_beside_the_best_of_its_step_is_removed(tmp_path):
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    fit(tmp_path, [policy_of(tmp_path)], Scored(1.0), **options)
    (tmp_path / "last-copy.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes())
    resumed(tmp_path, policy_of(tmp_path), Scored(1.0))  # nothing is left to train
    assert names(tmp_path) == {"last.ckpt", "epoch=000000.ckpt"}


def test_files_of_the_user_and_of_later_epochs_are_kept_when_an_older_state_is_resumed(tmp_path):
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    fit(tmp_path, [policy_of(tmp_path)], Scored(3.0, 2.0, 1.0), max_epochs=3, **options)
    (tmp_path / "epoch=000007.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes())
    before = names(tmp_path)
    resumed(tmp_path, policy_of(tmp_path), Scored(4.0), checkpoint=tmp_path / "epoch=000000.ckpt", max_epochs=2)
    resumed(tmp_path, policy_of(tmp_path), Scored(5.0), max_epochs=3)
    assert before <= names(tmp_path)


def test_a_moved_run_keeps_its_ranking(tmp_path):
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    fit(tmp_path, [policy_of(tmp_path / "old", save_top_k=1)], Scored(1.0), **options)
    (tmp_path / "old").rename(tmp_path / "new")
    resumed(tmp_path / "new", policy_of(tmp_path / "new", save_top_k=1), Scored(2.0), max_epochs=2)
    assert names(tmp_path / "new") == {"last.ckpt", "last-copy.ckpt", "epoch=000000.ckpt"}


def test_last_survives_the_pruning_of_its_twin(tmp_path):
    class Worse(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch))

    policy = CheckpointPolicy(dirpath=tmp_path, filename="{epoch:06}", save_last=True, monitor="val/loss", save_top_k=1)
    fit(tmp_path, [policy], Worse(), enable_checkpointing=True, max_epochs=3)
    assert {"epoch=000000.ckpt", "last.ckpt"} <= names(tmp_path)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 24


@pytest.mark.parametrize("when", [{"every_n_train_steps": 1}, {"train_time_interval": timedelta(seconds=2)}])
def test_nothing_is_saved_within_accumulated_gradients(tmp_path, when, monkeypatch):
    clock = SimpleNamespace(monotonic=iter(range(1000)).__next__)  # a second goes by whenever somebody looks
    monkeypatch.setattr("ldm.callbacks.checkpoints.time", clock)
    saved = []

    class Spy(CheckpointPolicy):
        def _save_checkpoint(self, trainer, filepath):
            saved.append(trainer.fit_loop.epoch_loop.batch_idx)
            super()._save_checkpoint(trainer, filepath)

    policy = Spy(dirpath=tmp_path, filename="{step}", save_last=True, save_top_k=-1, **when)
    fit(tmp_path, [policy], batches=12, validate=False, enable_checkpointing=True, accumulate_grad_batches=3)
    assert saved and all(batch % 3 == 2 for batch in saved)


def test_a_copy_replaces_its_target_is_independent_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    assert copy_file(tmp_path / "a", tmp_path / "b") and (tmp_path / "b").read_text() == "new"
    (tmp_path / "a").write_text("damaged")
    assert (tmp_path / "b").read_text() == "new" and not copy_file(tmp_path / "gone", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    "validate, kept", [(True, "and 3 best of val/loss"), (False, "no validation, so no best of val")]
)
def test_best_states_are_promised_only_with_validation(tmp_path, caplog, validate, kept):
    caplog.set_level("INFO", logger="ldm")
    fit(tmp_path, [policy_of(tmp_path)], validate=validate, enable_checkpointing=True)
    assert kept in caplog.text


def test_a_monitor_that_is_not_logged_is_named_with_the_metrics_that_are(tmp_path, caplog):
    fit(tmp_path, [policy_of(tmp_path, monitor="val/lost")], enable_checkpointing=True)
    text = "the monitor 'val/lost' is not logged, so only last.ckpt is kept; logged are train/loss, val/loss"
    assert caplog.text.count(text) == 1 and "did you mean 'val/loss'?" in caplog.text
