"""The array of a run's samples, as evaluation code reads it."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from ldm.atomic import publish, temporary_next_to, write_errors
from ldm.output.images import make_folder


class SampleArray:
    """All samples of a run in one `<shape>-samples.npz`: arr_0 uint8 (N, H, W, 3) and, with classes, arr_1 int64 (N,).

    Samples are written to disk one by one; the file appears once all N are complete.
    """

    def __init__(self, folder: str | Path, count: int) -> None:
        self.folder, self.count, self.classes = Path(folder), count, list[int]()
        self._open, self._filled = contextlib.ExitStack(), 0
        self._array: IO[bytes] | None = None
        make_folder(self.folder)

    def append(self, image: Image.Image, label: int | None = None) -> None:
        pixels = np.asarray(image)
        array = self._array or self._start((self.count, *pixels.shape))
        with write_errors(self.path, self.count * pixels.nbytes):
            array.write(pixels.tobytes())
        self._filled += 1
        if label is not None:
            self.classes.append(label)

    def _start(self, shape: tuple[int, ...]) -> IO[bytes]:
        """Begin the file in the layout of np.savez, without the array in memory."""
        self.path = self.folder / f"{'x'.join(map(str, shape))}-samples.npz"
        with write_errors(self.path):
            self._temporary = self._open.enter_context(temporary_next_to(self.path))
            self._file = self._temporary.open("wb")
            self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
            self._array = self._archive.open("arr_0.npy", "w", force_zip64=True)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._array, header)
        return self._array

    def finish(self) -> Path:
        """Write the file -> its path; raise ValueError unless exactly N samples were appended."""
        if self._array is None or self._filled != self.count:
            raise ValueError(f"expected {self.count} samples, got {self._filled}")
        with write_errors(self.path):
            self._array.close()
            if self.classes:
                with self._archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(self.classes, dtype=np.int64))
            self._archive.close()
            self._file.close()
            publish(self._temporary, self.path, replace=False)
        return self.path

    def close(self) -> None:
        """Remove the temporary file."""
        if self._array is not None:
            self._file.raw.close()  # on a full disk, what is still buffered must not be written again
            for end in (self._array.close, self._archive.close):
                with contextlib.suppress(OSError, ValueError):
                    end()
        self._open.close()
