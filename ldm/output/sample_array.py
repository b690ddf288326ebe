"""The array of a run's samples, as evaluation code reads it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.output.images import make_folder


class SampleArray:
    """All samples of a run in one `<shape>-samples.npz`: arr_0 uint8 (N, H, W, 3) and, with classes, arr_1 int64 (N,).

    Samples are written to disk one by one; the file appears once all N are complete.
    """

    def __init__(self, folder: str | Path, count: int) -> None:
        self.folder, self.count, self.classes = Path(folder), count, list[int]()
        self._part, self._filled = self.folder / ".samples.npy.part", 0
        self._array: np.memmap | None = None
        make_folder(self.folder)

    def append(self, image: Image.Image, label: int | None = None) -> None:
        pixels = np.asarray(image)
        if self._array is None:
            self._array = np.lib.format.open_memmap(self._part, "w+", np.uint8, (self.count, *pixels.shape))
        self._array[self._filled] = pixels
        self._filled += 1
        if label is not None:
            self.classes.append(label)

    def finish(self) -> Path:
        """Write the file -> its path; raise ValueError unless exactly N samples were appended."""
        if self._array is None or self._filled != self.count:
            raise ValueError(f"expected {self.count} samples, got {self._filled}")
        path = self.folder / f"{'x'.join(map(str, self._array.shape))}-samples.npz"
        self._array.flush()
        self._array = None
        # The layout of np.savez, without the array in memory.
        with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
            archive.write(self._part, "arr_0.npy")
            if self.classes:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(self.classes, dtype=np.int64))
        return path

    def close(self) -> None:
        """Remove the temporary file."""
        self._array = None
        self._part.unlink(missing_ok=True)
