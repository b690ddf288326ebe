"""A diffusers folder is complete or absent."""

import pytest

from ldm import atomic
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.checkpoint.diffusers.write import new_folder


def test_a_disk_that_refuses_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConversionError, match="could not be written: No space"), new_folder(tmp_path / "a") as made:
        (made / "config.json").write_text("{}")
    assert list(tmp_path.iterdir()) == []


def test_a_living_conversion_is_spared_and_a_name_taken_meanwhile_refused(tmp_path):
    with new_folder(tmp_path / "out") as first, new_folder(tmp_path / "other.out"):
        with pytest.raises(ConversionError, match="already exists"), new_folder(tmp_path / "out"):
            assert first.is_dir()
            (tmp_path / "out").mkdir()
        (tmp_path / "out").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.out", "out"]
