"""A diffusers folder is complete or absent."""

import pytest

from ldm.checkpoint.diffusers import write
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.checkpoint.diffusers.write import new_folder


def test_a_disk_that_refuses_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConversionError, match="could not be written: No space"), new_folder(tmp_path / "a") as made:
        (made / "config.json").write_text("{}")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_swept_and_a_living_one_spared(tmp_path):
    (tmp_path / ".out.abandoned.tmp" / "unet").mkdir(parents=True)
    with new_folder(tmp_path / "out") as first, new_folder(tmp_path / "other.out"):
        assert first.is_dir() and not (tmp_path / ".out.abandoned.tmp").exists()
        with pytest.raises(ConversionError, match="already exists"), new_folder(tmp_path / "out"):
            assert first.is_dir()
            (tmp_path / "out").mkdir()
        (tmp_path / "out").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.out", "out"]
