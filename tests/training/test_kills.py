"""Killed runs and damaged checkpoints, a few of each; python -m tests.full run_kills tries more."""

import pytest

from tests.full.run_kills import FAULTS, WAYS, check_damage, check_faults, check_kills


@pytest.fixture(autouse=True)
def prefixes(monkeypatch):
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", [])


def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(tmp_path):
    assert len(list(check_kills(tmp_path, "monitor", kills=3))) >= 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_killed_within_a_save_ends_as_an_uninterrupted_one(tmp_path, fault):
    assert list(check_faults(tmp_path, "monitor", [fault], [1])) == [f"{fault} 1"]


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_newest_checkpoint_loses_no_step(tmp_path, way):
    assert list(check_damage(tmp_path, way, lambda name: name in ("empty", "missing")))
