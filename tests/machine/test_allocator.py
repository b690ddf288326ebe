"""Memory that malloc keeps."""

import ctypes
import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource
from ldm.machine.allocator import keep_freed_memory, kept_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size, large = {size}, {large}
def step():
    blocks = [libc.malloc(size) for _ in range(2**26 // size)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
keep_freed_memory(large)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, kept_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize("environment, reserved", [({}, True), ({"MALLOC_ARENA_MAX": "1"}, False)])
def test_reserved_memory_needs_no_new_pages_unless_the_environment_sets_malloc(environment, reserved, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    first = FAULTS[FAULTS.index("import") : FAULTS.index("keep_freed_memory(large)")]
    program = first.replace("{size}", str(2**22)).replace("{large}", "True") + (
        "from ldm.machine.allocator import reserve_memory\nthread = reserve_memory(2**28)\nthread and thread.join()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\nstep()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert (int(out) < 100) == reserved, out  # of 16,384 pages


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's malloc, from 2.33 on")
@pytest.mark.parametrize("large", [False, True])
def test_large_blocks_that_were_kept_can_be_returned(large):
    program = FAULTS.replace("{size}", str(2**22)).replace("{large}", str(large))
    resident = "int(open('/proc/self/statm').read().split()[1]) * 4096"
    program += f"from ldm.machine.allocator import return_kept_memory\nbefore = {resident}\n"
    program += f"return_kept_memory()\nprint(before - {resident})"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert (int(out.split()[-1]) > 2**25) == large, out


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize(
    "environment, size, large, kept",
    [
        ({}, 2**22, False, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, 2**22, False, False),
        ({}, 2**26, False, False),  # one block
        ({}, 2**26, True, True),
    ],
)
def test_memory_that_a_step_frees_is_kept_for_the_next_unless_the_environment_says_otherwise(
    environment, size, large, kept, monkeypatch
):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    program = FAULTS.replace("{size}", str(size)).replace("{large}", str(large))
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    faults, size = map(int, out.split())
    assert (faults < 100) == kept, out  # of 163,840 pages
    assert (2**26 <= size < 2**27) == (kept and hasattr(ctypes.CDLL(None), "mallinfo2")), out
