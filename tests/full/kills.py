"""Kill -9 at random moments while files of every kind are written: each is whole or absent, and leftovers are swept."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from ldm.atomic import save_text, sweep_temporaries
from ldm.checkpoint import read_checkpoint, write_checkpoint, write_weights
from ldm.checkpoint.diffusers.write import new_folder, save_tensors
from ldm.checkpoint.formats import read_tensors
from ldm.output.images import GeneratedImage, NamedOutput
from ldm.output.sample_array import SampleArray
from ldm.retrieval import Database, Searcher

KILLS = 50  # of each kind
WEIGHTS = {"w": torch.arange(100_000.0)}
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def write_array(folder: Path, k: int) -> None:
    array = SampleArray(folder / str(k), 8)
    for _ in range(8):
        array.append(Image.fromarray(PIXELS), 1)
    array.finish()


def write_folder(folder: Path, k: int) -> None:
    with new_folder(folder / f"model-{k}") as made:
        save_tensors(WEIGHTS, made / "unet" / "weights.safetensors")
        save_text(made / "model_index.json", "{}")


def write_index(folder: Path, k: int) -> None:
    vectors = folder / "database" / "part.npz"
    if not vectors.exists():
        vectors.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            ids, boxes = np.arange(50).astype(str), np.zeros((50, 4), np.float32)
            np.savez(
                file, embedding=np.random.default_rng(0).random((50, 8), np.float32), img_id=ids, patch_coords=boxes
            )
        os.replace(file.name, vectors)
    Searcher.train(Database(vectors.parent), 5).save(folder / "searcher")


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "checkpoint": lambda folder, k: write_checkpoint({"step": k, **WEIGHTS}, folder / "last.ckpt"),
    "safetensors": lambda folder, k: write_weights(WEIGHTS, folder / "a.safetensors"),
    "image": lambda folder, k: NamedOutput(folder).save(GeneratedImage(Image.fromarray(PIXELS), {"k": k}), "x"),
    "config": lambda folder, k: save_text(folder / "project.yaml", yaml.safe_dump({"keys": list(range(2000))})),
    "array": write_array,
    "diffusers folder": write_folder,
    "index": write_index,
}


def check(path: Path) -> None:
    """Raise an error unless the file is whole."""
    if path.suffix == ".ckpt":
        assert torch.equal(read_checkpoint(path)["w"], WEIGHTS["w"])
    elif path.suffix == ".safetensors":
        assert torch.equal(read_tensors(path)["w"], WEIGHTS["w"])
    elif path.suffix == ".png":
        assert np.array_equal(np.asarray(Image.open(path)), PIXELS)
    elif path.suffix == ".yaml":
        assert yaml.safe_load(path.read_text()) == {"keys": list(range(2000))}
    elif path.name.endswith("samples.npz"):
        assert all(np.array_equal(image, PIXELS) for image in np.load(path)["arr_0"])
    elif path.name == "model_index.json":
        assert (path.parent / "unet" / "weights.safetensors").is_file()
    elif path.name == "searcher.json":
        Searcher.load(Database(path.parents[1] / "database"), path.parent)


def write_for_ever(write: Callable[[Path, int], object], folder: Path, first: int) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars
    for k in itertools.count(first):
        write(folder, k)


def run(kinds: Iterable[str] = tuple(WRITERS), kills: int = KILLS) -> Iterator[str]:
    """Yield one line per kind."""
    moments = random.Random(0)
    for kind in kinds:
        swept = files = 0
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            WRITERS[kind](folder, 0)
            for kill in range(kills):
                arguments = (WRITERS[kind], folder, 1000 * kill + 1)
                process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=arguments)
                process.start()
                time.sleep(moments.uniform(0.0, 0.1))
                os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
                swept += sum(map(sweep_temporaries, [folder, *filter(Path.is_dir, folder.iterdir())]))
                written = [path for path in folder.rglob("*") if path.is_file()]
                assert not [path for path in written if path.name.startswith(".")], written
                for path in written:
                    check(path)
                files = max(files, len(written))
        yield f"{kind}: {kills} kills, {swept} unfinished files swept, up to {files} files, all whole"
