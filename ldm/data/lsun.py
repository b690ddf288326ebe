"""LSUN scenes, in the published layout:

    data/lsun/churches/    pictures as LSUN's own `data.py export` writes them (.webp, .jpg, ...), at any depth
    data/lsun/church_outdoor_{train,val}.txt    the split: one path below churches/ on each line
    data/lsun/bedrooms/, data/lsun/bedrooms_{train,val}.txt
    data/lsun/cats/, data/lsun/cat_{train,val}.txt

`download: true` fetches the published lists; the pictures come from https://www.yf.io/p/lsun.
"""

from __future__ import annotations

from typing import Any

from ldm.data.archives import ArchiveError, Remote, fetch, unpack
from ldm.data.published import ListedPictures

LISTS = Remote("https://ommer-lab.com/files/lsun.zip", "lsun.zip")


class _LSUN(ListedPictures):
    """Squares from the middle of pictures, mirrored at random in training.

    download: fetch the published lists where `files` is missing. Other parameters are those of ListedPictures.
    """

    def __init__(self, download: bool = False, **options: Any) -> None:
        super().__init__(**options)  # prepare_data has fetched

    @classmethod
    def prepare_data(cls, files: str | None = None, split: str | None = None, download: bool = False, **_: Any) -> None:
        """Fetch the published lists where that is asked for."""
        wanted = cls.list_file(files)
        if not download or split is not None or wanted.is_file():
            return
        lists = wanted.parent / "published-lists"
        if not lists.is_dir():
            unpack(fetch(LISTS, wanted.parent), lists)
        name = cls.list_file(None).name
        found = next(iter(sorted(lists.rglob(name))), None)
        if found is None:
            raise ArchiveError(f"{lists}: holds no {name}; put a list at {wanted}")
        wanted.write_bytes(found.read_bytes())


class LSUNChurchesTrain(_LSUN):
    published_root, published_list, published_flip_p = "data/lsun/churches", "data/lsun/church_outdoor_train.txt", 0.5


class LSUNChurchesValidation(_LSUN):
    published_root, published_list = "data/lsun/churches", "data/lsun/church_outdoor_val.txt"


class LSUNBedroomsTrain(_LSUN):
    published_root, published_list, published_flip_p = "data/lsun/bedrooms", "data/lsun/bedrooms_train.txt", 0.5


class LSUNBedroomsValidation(_LSUN):
    published_root, published_list = "data/lsun/bedrooms", "data/lsun/bedrooms_val.txt"


class LSUNCatsTrain(_LSUN):
    published_root, published_list, published_flip_p = "data/lsun/cats", "data/lsun/cat_train.txt", 0.5


class LSUNCatsValidation(_LSUN):
    published_root, published_list = "data/lsun/cats", "data/lsun/cat_val.txt"
