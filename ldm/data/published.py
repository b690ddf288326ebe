"""Data sets of pictures whose place and whose split, as a list of files, were published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.data.folder import ImageFolder
from ldm.data.image import Size


class ListedPictures(ImageFolder):
    """The pictures that a list names.

    root: their folder, files: the list, one path below root on each line; None are the published places, from the folder where training is
    started. With `split: train` and `split: validation` the folder is divided by a hash of the names instead, and needs no list.
    Other parameters are those of ImageFolder.
    """

    published_root, published_list, published_flip_p = "", "", 0.0

    def __init__(
        self,
        size: Size = 256,
        root: str | None = None,
        files: str | None = None,
        flip_p: float | None = None,
        **options: Any,
    ) -> None:
        flip_p = self.published_flip_p if flip_p is None else flip_p
        listed = str(self.list_file(files)) if options.get("split") is None else None
        super().__init__(root or self.published_root, size, flip_p=flip_p, files=listed, **options)

    @classmethod
    def list_file(cls, files: str | None) -> Path:
        """Where the list is looked for."""
        return Path(files or cls.published_list).expanduser()
