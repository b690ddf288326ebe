"""Pages of mapped weights: released once they are copied, without losing a value."""

from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_weights, read_weights, weights_on_meta, write_weights
from ldm.checkpoint.mapped import mapped_files, release

pytestmark = pytest.mark.skipif(not mapped_files(), reason="needs /proc/self/smaps")
SIZE = 1 << 20  # values: 2 MB in float16


def resident(tensor: torch.Tensor) -> int:
    """Kilobytes of the tensor's mapping that are in memory."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first, *rest = line.split()
            if "-" in first:
                start, stop = (int(end, 16) for end in first.split("-"))
                inside = start <= tensor.data_ptr() < stop
            elif inside and first == "Rss:":
                return int(rest[0])
    raise AssertionError("not mapped")


@pytest.fixture(params=["a.ckpt", "a.safetensors"])
def path(request, tmp_path):
    write_weights({"weight": torch.arange(SIZE).remainder(1000).reshape(1, SIZE).half()}, tmp_path / request.param)
    return tmp_path / request.param


def test_cast_weights_are_in_memory_once(path):
    with weights_on_meta():
        layer = torch.nn.Linear(SIZE, 1, bias=False)
    weights = read_weights(path)
    load_weights(layer, path, weights=weights)
    assert resident(weights["weight"]) < 128 and torch.equal(layer.weight, weights["weight"].float())


def test_a_changed_mapping_and_own_memory_are_left_alone(path):
    weights = read_weights(path)["weight"]
    weights[0, 5] = 7.0
    own = torch.ones(SIZE)
    expected = weights.clone()
    for tensor in (weights, own):
        release(tensor, mapped_files())
    assert torch.equal(weights, expected) and own.sum() == SIZE


@pytest.mark.parametrize("anonymous, swapped, found", [(0, 0, True), (4, 0, False), (0, 4, False)])
def test_a_mapping_with_pages_that_were_written_to_is_none_of_the_files(monkeypatch, anonymous, swapped, found):
    def entry(start, anonymous, swapped):
        sizes = f"Rss: 8 kB\nAnonymous: {anonymous} kB\nKSM: 0 kB\nSwap: {swapped} kB\nSwapPss: 0 kB\n"
        return f"{start:x}-{start + 0x1000:x} rw-p 00000000 08:01 42 /a.ckpt\n{sizes}VmFlags: rd wr\n"

    smaps = entry(0xA000, anonymous, swapped) + entry(0xC000, 0, 0)
    monkeypatch.setattr(Path, "read_text", lambda *args, **options: smaps)
    expected = [range(0xA000, 0xB000), range(0xC000, 0xD000)]
    assert mapped_files() == (expected if found else expected[1:])
