"""Killed runs and damaged checkpoints, a few of each; python -m tests.full run_kills and long_run try more."""

import pytest

from tests.full.long_run import check
from tests.full.run_kills import FAULTS, WAYS, check_damage, check_faults, check_kills


@pytest.fixture(autouse=True)
def prefixes(monkeypatch):
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the uninterrupted runs, which the tests share."""
    return tmp_path_factory.mktemp("kills")


def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(folder):
    assert len(list(check_kills(folder, "monitor", kills=3))) >= 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_killed_within_a_save_ends_as_an_uninterrupted_one(folder, fault):
    call = 0 if fault == "launch" else 1  # a start without torchrun has one
    assert [kills > 0 for _, kills in check_faults(folder, "monitor", [fault], [call])] == [True]


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_newest_checkpoint_loses_no_step(folder, way):
    assert list(check_damage(folder, way, lambda name: name in ("empty", "missing")))


def test_a_killed_training_of_images_ends_as_an_uninterrupted_one(tmp_path):
    """Checkpoints with EMA, metrics.csv and logged images; no temporary file stays."""
    parts = list(check(tmp_path / "run", steps=10, every=4, kill_after=0.0, pause=0.1, kills=1))
    assert [label for label, _ in parts if label != "uninterrupted"] == ["killed, part 1", "killed, part 2"]
