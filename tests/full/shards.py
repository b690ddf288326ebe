"""20,000 images in 40 shards: every sample once an epoch, whatever the ranks, the workers and the stops; speed, memory.

The images are noise, or those of the captioned folder that the environment variable IMAGES names.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.cli import counted
from ldm.data.order import EpochSampler, Position, SeededDataset
from ldm.data.shard_writer import Layout, Selection, write_shards
from ldm.data.webdataset import ImageShards
from ldm.data.workers import Loader, Traced

PARTS = ("once", "speed", "memory")
COUNT, SHARDS, STOPS, SEED = 20_000, 40, 10, 7
WORKERS, RANKS = (0, 1, 2, 4), (1, 2)


def run(parts: Sequence[str] = PARTS) -> Iterator[str]:
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than CPUs
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        root = Path(os.environ["IMAGES"]) if "IMAGES" in os.environ else _noise(Path(folder, "images"))
        done = write_shards(
            Selection(str(root), captions="sidecar"), Path(folder, "shards"), Layout(COUNT // SHARDS), workers=1
        )
        seconds = time.perf_counter() - start
        yield f"{done.samples:,} images in {done.shards} shards, {done.bytes / 1e6:.1f} MB, written in {seconds:.1f} s"
        data = ImageShards(str(Path(folder, "shards")), size=32, lanes=8)
        if "once" in parts:
            for ranks in RANKS:
                yield f"{counted(ranks, 'rank')}: {_shards_of_a_rank(data, ranks)}"
                for workers in WORKERS:
                    place = f"{counted(ranks, 'rank')}, {counted(workers, 'worker')}, {STOPS} stops"
                    yield f"{place}: {once(data, ranks, workers, STOPS, 64)}"
        for workers in WORKERS if "speed" in parts else ():
            start, used = time.perf_counter(), time.process_time()
            count = sum(len(batch["__key__"]) for batch in loader(data, 64, workers))
            rate, cost = count / (time.perf_counter() - start), (time.process_time() - used) / count
            alone = f", {1e6 * cost:.0f} us of CPU time each" if not workers else ""
            yield f"{counted(workers, 'worker')}: {rate:,.0f} images a second{alone}"
        if "memory" in parts:
            yield _memory(data)


def _noise(folder: Path) -> Path:
    """Write captioned JPEGs of 32x32 pixels."""
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (256, 32, 32, 3), dtype=np.uint8)
    for number in range(COUNT):
        Image.fromarray(np.roll(pixels[number % 256], number // 256, axis=0)).save(folder / f"{number:05d}.jpg")
        (folder / f"{number:05d}.txt").write_text(f"caption {number:05d}")
    return folder


def loader(
    data: Any, batch_size: int, workers: int, rank: int = 0, ranks: int = 1, position: Position | None = None
) -> Loader:
    """Return the loader that the data module makes for a rank and a position."""
    sampler = EpochSampler(data, batch_size, SEED, True, rank, ranks, lambda: position)
    seeded: Any = SeededDataset(data, SEED)
    return Loader(Traced(seeded, workers) if workers else seeded, batch_size, sampler=sampler, num_workers=workers)


def once(data: ImageShards, ranks: int, workers: int, stops: int, batch_size: int, epochs: int = 2) -> str:
    """Read all epochs, stopped and resumed at random batches; AssertionError unless each sample comes once in each."""
    step = batch_size * ranks
    per_epoch = -(-len(data) // step)  # batches
    places = sorted(random.Random(stops).sample(range(1, epochs * per_epoch), stops))
    seen: Counter[tuple[int, str]] = Counter()
    for begin, end in zip([0, *places], [*places, epochs * per_epoch]):
        for rank in range(ranks):
            at = begin
            while at < end:  # a loader gives the rest of an epoch
                epoch, batches = divmod(at, per_epoch)
                place = Position(epoch, batches * step)
                reader = loader(data, batch_size, workers, rank, ranks, place)
                for number, batch in enumerate(reader):
                    if at + number >= end:
                        break  # killed here
                    sampler: Any = reader.sampler
                    part = sampler.slice_at(Position(epoch, place.samples + number * step))
                    assert batch["__key__"] == [data.key(index) for index in part.indices]
                    seen.update((epoch, key) for key in batch["__key__"][: part.size])
                at = min(end, (epoch + 1) * per_epoch)
    keys = {data.key(index) for index in range(len(data))}
    for epoch in range(epochs):
        counts = {key: seen[epoch, key] for key in keys}
        assert set(counts.values()) == {1}, f"epoch {epoch}: {Counter(counts.values())}"
    assert len(seen) == epochs * len(data) == seen.total()
    return f"each of {len(data):,} samples once in each of {epochs} epochs"


def _shards_of_a_rank(data: ImageShards, ranks: int) -> str:
    order = data.order(SEED, 0, 64 * ranks, True)
    read = [len({data.shard_of(index) for index in order[rank::ranks]}) for rank in range(ranks)]
    return f"a rank reads {max(read)} of {len(data.shards)} shards in an epoch"


def _memory(data: ImageShards) -> str:
    """Return the memory of the process and of two workers along an epoch."""
    reader = iter(loader(data, 64, 2))
    processes = [os.getpid(), *(worker.pid for worker in reader._workers)]  # type: ignore[attr-defined]
    total, shown = -(-len(data) // 64), []
    for number, _ in enumerate(reader):
        if number in (total // 10, total // 2, total - 3):
            resident = [int(Path(f"/proc/{each}/statm").read_text().split()[1]) * 4096 / 1e6 for each in processes]
            shown.append(f"{number / total:.0%} {'/'.join(f'{each:.0f}' for each in resident)} MB")
    return f"process and two workers along an epoch: {', '.join(shown)}"
