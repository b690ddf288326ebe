"""Find the config and the checkpoint of a trained model by its run directory. Imports neither torch nor NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ldm.paths import expand_user


class SavedRun(NamedTuple):
    """A trained model: its directory, its config (a list, as `merge` takes them), its weights."""

    folder: Path
    configs: list[Path]
    ckpt: Path

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by number, from `classes.txt` beside the config; empty if the run has none."""
        files = (self.configs[-1].parent / "classes.txt", self.folder / "classes.txt")
        text = next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")
        return text.removesuffix("\n").split("\n") if text else []


def find_run(resume: str | Path, flag: str = "--resume") -> SavedRun:
    """Find the run of a path: a run directory, or a checkpoint in one or in its `checkpoints`.

    The config is `config.yaml`, as in the directories of released models, or the newest `configs/*-project.yaml`.
    Raises FileNotFoundError if one is missing.
    """
    given = expand_user(resume)
    if not given.exists():
        raise FileNotFoundError(f"{flag} {given}: no such file or folder; pass a run directory or a checkpoint")
    folder, ckpt = (given, _checkpoint_in(given, flag)) if given.is_dir() else (given.parent, given)
    for place in (folder, folder.parent) if folder.resolve().name == "checkpoints" else (folder,):
        if configs := _configs_in(place):
            return SavedRun(place, configs, ckpt)
    raise FileNotFoundError(f"{flag} {given}: the model's config is missing (config.yaml or configs/*-project.yaml)")


def run_of(ckpt: str | Path) -> SavedRun | None:
    """The run of a `--ckpt` path, as in `find_run`; None for weights that are not in a run.

    A file counts only in the `checkpoints` of a run directory: other weights may lie beside a config of another model.
    """
    given = expand_user(ckpt)
    if given.is_file():
        inside = given.resolve().parent.name == "checkpoints" and bool(_configs_in(given.parent.parent))
    else:
        places = (given, given.parent) if given.resolve().name == "checkpoints" else (given,)
        inside = given.is_dir() and any(map(_configs_in, places))
    return find_run(given, "--ckpt") if inside else None


def _configs_in(folder: Path) -> list[Path]:
    released = folder / "config.yaml"
    # Every start saves all values: older files would bring back keys that were deleted since.
    return [released] if released.is_file() else sorted((folder / "configs").glob("*-project.yaml"))[-1:]


def _checkpoint_in(folder: Path, flag: str) -> Path:
    for name in ("model.ckpt", "checkpoints/last.ckpt", "last.ckpt", "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    if (folder / "unet" / "config.json").is_file():  # diffusers' layout
        return folder
    hint = "; bash scripts/download_models.sh downloads released ones" if (folder / "config.yaml").is_file() else ""
    raise FileNotFoundError(
        f"{flag} {folder}: no model.ckpt or checkpoints/last.ckpt in it; pass the file itself{hint}"
    )
