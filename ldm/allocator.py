"""What the C library does with memory that torch frees on the CPU."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep freed memory for its next allocation; nothing happens where the C library is not glibc.

    By default glibc maps each block of more than 32 MiB anew and unmaps it when it is freed, so that the kernel clears
    its pages again and again: a third of the time of a first stage at 512x512. The peak stays in the process until it
    ends, and is higher where sizes vary.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
