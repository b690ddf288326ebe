"""Memory that torch frees on the CPU and glibc's malloc keeps for the next allocation."""

from __future__ import annotations

import ctypes
import os
import platform
import threading

_keeps_large = False  # by keep_freed_memory
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # of mallopt(3)
_BLOCK = 64 * 2**20  # bytes that `reserve_memory` gets at a time


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2, in bytes: fordblks is what was freed and kept."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")]


def kept_memory() -> int:
    """Bytes that this process freed and keeps for its next allocation; 0 where the C library is not glibc 2.33."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if platform.libc_ver()[0] == "glibc" else None
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    return int(mallinfo2().fordblks)


def return_kept_memory() -> None:
    """Give what `keep_freed_memory(large=True)` kept so far back to the system, where the next work has other sizes."""
    if _keeps_large:
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory(large: bool = False) -> None:
    """Make malloc keep up to 2 GiB of freed memory, if it is glibc's and the environment does not say otherwise.

    By default it returns the activations of each step to the system and gets them back page by page in the next, which
    takes up to a quarter of the time of a training step on a CPU, and a third of that of a first stage at 512x512.
    large: also blocks of more than 32 MiB, which are else mapped one by one; the peak is higher where sizes vary.
    """
    if not _may_be_set():
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # glibc's upper limit
    if large:
        global _keeps_large
        mallopt(_M_MMAP_MAX, 0)
        _keeps_large = True


def share_freed_memory() -> None:
    """Let every thread use what another one freed. Has an effect on the threads that start after it."""
    if _may_be_set():
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def reserve_memory(size: int) -> threading.Thread | None:
    """Get `size` bytes from the system ahead, in a thread, and keep them for the allocations to come.

    The system clears each page at its first use, which takes half a second for 2 GB. This does it while libraries are
    imported, for threads that share freed memory. Implies `keep_freed_memory(large=True)`. Return None, and do nothing,
    for less than a block and where malloc may not be set.
    """
    if size < _BLOCK or not _may_be_set():
        return None
    keep_freed_memory(large=True)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(_BLOCK) for _ in range(size // _BLOCK)]

    def reserve() -> None:
        for block in filter(None, blocks):
            ctypes.memset(block, 0, _BLOCK)
            libc.free(block)

    thread = threading.Thread(target=reserve, daemon=True)
    thread.start()
    return thread


def _may_be_set() -> bool:
    """True if malloc is glibc's and the environment does not set it."""
    return platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ)
