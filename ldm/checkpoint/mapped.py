"""Pages of memory-mapped weights, which count as memory of the process once they are read."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

# An entry of /proc/self/smaps with an inode, and no page that was written to, swapped out or not.
_UNCHANGED_FILE = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9].*\n(?:[A-Z].*\n)*?Anonymous: +0 kB\n(?:[A-Z].*\n)*?Swap: +0 kB$",
    re.MULTILINE,
)


def mapped_files() -> list[range]:
    """Addresses of the files that are mapped and unchanged in memory, largest first; none on systems without /proc."""
    try:
        entries = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    files = [range(int(start, 16), int(stop, 16)) for start, stop in _UNCHANGED_FILE.findall(entries)]
    return sorted(files, key=len, reverse=True)


def release(tensor: Tensor, files: Sequence[range]) -> None:
    """Return the whole pages of a tensor in one of `files` to the system; they are read again where they are used."""
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and tensor.is_contiguous() and any(start in file and stop <= file.stop for file in files):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
