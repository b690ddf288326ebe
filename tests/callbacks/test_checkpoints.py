"""Which checkpoints a run keeps."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from ldm.callbacks import CheckpointPolicy
from ldm.callbacks.checkpoints import share_file
from tests.callbacks.fit import fit
from tests.toys import Toy


def test_last_is_a_hard_link_to_the_best_of_the_same_step(tmp_path):
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
