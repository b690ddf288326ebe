"""LSUN scenes in the published layout:

    data/lsun/churches/    images as written by LSUN's `data.py export` (.webp, .jpg, ...), at any depth
    data/lsun/church_outdoor_{train,val}.txt    the splits: one path below churches/ on each line
    data/lsun/bedrooms/, data/lsun/bedrooms_{train,val}.txt
    data/lsun/cats/, data/lsun/cat_{train,val}.txt

`download: true` downloads the published lists; the images are at https://www.yf.io/p/lsun.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.atomic import save_bytes
from ldm.data.archives import ArchiveError, Remote, fetch, unpack
from ldm.data.folder import ListedImages
from ldm.paths import expand_user

LISTS = Remote("https://ommer-lab.com/files/lsun.zip", "lsun.zip")


class _LSUN(ListedImages):
    """download: download the published lists if `files` is missing. Other parameters as in ListedImages."""

    def __init__(self, download: bool = False, **options: Any) -> None:
        super().__init__(**options)  # `prepare_data` downloads

    @classmethod
    def prepare_data(cls, files: str | None = None, split: str | None = None, download: bool = False, **_: Any) -> None:
        """Download the published lists if requested."""
        published = cls.defaults["files"]
        wanted = expand_user(files or published)
        if not download or split is not None or wanted.is_file():
            return
        lists = wanted.parent / "published-lists"
        if not lists.is_dir():
            unpack(fetch(LISTS, wanted.parent), lists)
        name = Path(published).name
        found = min(lists.rglob(name), default=None)
        if found is None:
            raise ArchiveError(f"{lists}: has no {name}; save a list as {wanted}")
        save_bytes(wanted, found.read_bytes())


class LSUNChurchesTrain(_LSUN, root="data/lsun/churches", files="data/lsun/church_outdoor_train.txt", flip_p=0.5):
    """Training images of churches, randomly flipped."""


class LSUNChurchesValidation(_LSUN, root="data/lsun/churches", files="data/lsun/church_outdoor_val.txt"):
    """Validation images of churches."""


class LSUNBedroomsTrain(_LSUN, root="data/lsun/bedrooms", files="data/lsun/bedrooms_train.txt", flip_p=0.5):
    """Training images of bedrooms, randomly flipped."""


class LSUNBedroomsValidation(_LSUN, root="data/lsun/bedrooms", files="data/lsun/bedrooms_val.txt"):
    """Validation images of bedrooms."""


class LSUNCatsTrain(_LSUN, root="data/lsun/cats", files="data/lsun/cat_train.txt", flip_p=0.5):
    """Training images of cats, randomly flipped."""


class LSUNCatsValidation(_LSUN, root="data/lsun/cats", files="data/lsun/cat_val.txt"):
    """Validation images of cats."""
