"""Strategies on two ranks: curves, weights and averages of one process; runs by main.py on images, shards, caches."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import read_checkpoint
from tests.ranks import ROOT, largest_difference, train, train_on
from tests.tiny import text_model_config

PARTS = ("curves", "resume", "run", "data")
JOB = {"kind": "latent diffusion", "length": 47, "validation": 11}
GROUPS = {"trained weights": "model.", "EMA weights": "model_ema.", "text encoder": "cond_stage_model."}


def run(parts: Sequence[str] = PARTS) -> Iterator[str]:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            yield from {"curves": _curves, "resume": _resume, "run": _run, "data": _data}[part](Path(folder))


def weight_differences(path: Path, other: Path) -> str:
    """Relative differences of the trained weights, the averages and the text encoder of two checkpoints."""
    one, two = (read_checkpoint(each)["state_dict"] for each in (path, other))
    texts = []
    for group, prefix in GROUPS.items():
        names = [name for name in one if name.startswith(prefix)]
        a, b = (torch.cat([weights[name].double().flatten() for name in names]) for weights in (one, two))
        texts.append(f"{group} {float((a - b).norm() / a.norm()):.0e}")
    return ", ".join(texts)


def _curves(folder: Path) -> Iterator[str]:
    one = train(batch_size=8, steps=10, save=str(folder / "one.ckpt"), **JOB)
    ways = {
        f"{name}{', 2 accumulated' if accumulate > 1 else ''}": {
            "strategy": name,
            "accumulate": accumulate,
            "batch_size": 4 // accumulate,
            "save": str(folder / f"{name}-{accumulate}.ckpt"),
        }
        for name in ("ddp", "fsdp")
        for accumulate in (1, 2)
    }
    records = train_on(2, [{**JOB, "steps": 10, **way} for way in ways.values()], folder / "curves")
    for (name, way), others in zip(ways.items(), records):
        training = max(largest_difference(one["curves"], other["curves"]) for other in others)
        validation = max(largest_difference(one["validations"], other["validations"]) for other in others)
        weights = weight_differences(folder / "one.ckpt", Path(way["save"]))
        yield f"{name}, 2 ranks against 1, 10 steps: losses {training:.0e}, validation {validation:.0e}, {weights}"


def _resume(folder: Path) -> Iterator[str]:
    """2 -> 1 -> 2 ranks against uninterrupted training, and 2 -> 2."""
    paths = {name: str(folder / f"{name}.ckpt") for name in ("whole", "a", "b", "c", "d")}
    train(batch_size=8, steps=12, save=paths["whole"], **JOB)
    sharded: dict[str, Any] = {**JOB, "batch_size": 4, "strategy": "fsdp"}
    first = {"steps": 4, "save": paths["a"]}
    second = {"steps": 12, "resume": paths["a"], "save": paths["d"]}
    straight = {"steps": 12, "save": str(folder / "e.ckpt")}
    train_on(2, [{**sharded, **job} for job in (first, second, straight)], folder / "2")
    train(batch_size=8, steps=8, resume=paths["a"], save=paths["b"], **JOB)
    train_on(2, [{**sharded, "steps": 12, "resume": paths["b"], "save": paths["c"]}], folder / "2 again")
    yield f"2 -> 1 -> 2 ranks, 12 steps against 1: {weight_differences(Path(paths['whole']), Path(paths['c']))}"
    exact = weight_differences(folder / "e.ckpt", Path(paths["d"]))
    yield f"2 -> 2 ranks, 12 steps against 2 without a stop: {exact}"


def _run(folder: Path) -> Iterator[str]:
    """Train with main.py on two ranks, resume on one and back, export, generate an image."""
    place = folder / "run"
    _images(place / "images")
    OmegaConf.save(OmegaConf.create(_config(place / "images")), place / "tiny.yaml")
    base = ["--base", "tiny.yaml", "-t", "--accelerator", "cpu", "--num_sanity_val_steps", "0"]
    for strategy in ("ddp", "fsdp"):
        logdir = ["--logdir", strategy]
        command(place, "main.py", *base, *logdir, "--devices", "2", "--strategy", strategy, "--max_steps", "4")
        (directory,) = (place / strategy).iterdir()
        last = directory / "checkpoints" / "last.ckpt"
        ways: list[tuple[int, list[str]]] = [(1, ["--strategy", "auto"]), (2, ["--strategy", strategy])]
        for number, (devices, words) in enumerate(ways, 1):
            more = ["--devices", str(devices), *words, "--max_steps", str(4 + 2 * number)]
            command(place, "main.py", "-r", str(directory), "-t", *more)
            assert (step := read_checkpoint(last)["global_step"]) == 4 + 2 * number, step
        images = sorted(path.name for path in (directory / "images").rglob("*.png"))
        command(place, "scripts/convert.py", "--ckpt", str(directory), "--out", f"{strategy}.ckpt")
        prompt = ["--prompt", "a cat", "--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1", "--safety", "off"]
        size = ["--H", "32", "--W", "32", "--device", "cpu", "--precision", "full", "--skip_grid", "--seed", "1"]
        found = []
        for name, flags in (
            ("run", ["--ckpt", str(directory)]),
            ("file", ["--ckpt", f"{strategy}.ckpt", "--config", "tiny.yaml"]),
        ):
            outdir = f"{strategy}-{name}"
            command(place, "scripts/txt2img.py", *flags, *prompt, *size, "--outdir", outdir)
            found.append(np.asarray(Image.open(place / outdir / "samples" / "00000.png")))
        assert np.array_equal(*found)
        opens = "the exported file opens in txt2img.py"
        yield f"{strategy}: main.py on 2 -> 1 -> 2 ranks, {len(images)} image logs; {opens}"
        shutil.rmtree(place / strategy)


def _data(folder: Path) -> Iterator[str]:
    """Train with main.py on shards in buckets and on their cache: two ranks as one, stopped on two and ended on one."""
    place = folder / "data"
    _images(place / "images", sizes=((32, 32), (32, 48), (48, 32)))
    shards = ["--captions", "sidecar", "--samples", "12", "--workers", "1"]
    command(place, "scripts/make_shards.py", "--root", "images", "--out", "shards", *shards)
    config = _config(place / "images")
    config["model"]["params"]["cond_stage_trainable"] = False
    buckets = {"step": 16, "min_side": 16, "max_side": 64}
    params = {"shards": str(place / "shards"), "size": 32, "buckets": buckets}
    dataset = {"target": "ldm.data.webdataset.ImageShards", "params": params}
    config["data"]["params"] |= {"train": dataset, "validation": dataset}
    OmegaConf.save(OmegaConf.create(config), place / "tiny.yaml")
    trained = yield from _on_ranks(place, "shards in buckets", ["tiny.yaml"])
    weights = f"model.params.ckpt_path={trained}"
    cached = ["--out", "cache", "--dtype", "float32", "--global_batch", "4", "--device", "cpu", "--variants", "2"]
    command(place, "scripts/cache_latents.py", "--base", "tiny.yaml", *cached, weights)
    yield from _on_ranks(place, "their cache", ["tiny.yaml", "cache/data.yaml"], weights)


def _on_ranks(place: Path, name: str, base: Sequence[str], *overrides: str) -> Generator[str, None, Path]:
    """Compare runs of main.py -> the last checkpoint of one rank."""
    runs = {ranks: place / f"{name}-{ranks}" for ranks in (1, 2)}
    for ranks, steps in ((1, 10), (2, 5)):
        flags = ["--base", *base, "-t", "--accelerator", "cpu", "--num_sanity_val_steps", "0", "--scale_lr", "false"]
        flags += ["--devices", str(ranks), "--strategy", "ddp" if ranks > 1 else "auto", "--max_steps", str(steps)]
        more = [f"data.params.batch_size={4 // ranks}", "lightning.callbacks.image_logger=null", *overrides]
        command(place, "main.py", *flags, "--logdir", str(runs[ranks]), *more)
    (stopped,) = runs[2].iterdir()
    alone = ["--devices", "1", "--strategy", "auto", "--max_steps", "10", "data.params.batch_size=4"]
    command(place, "main.py", "-r", str(stopped), "-t", *alone)
    one, two = (next(run.iterdir()) / "checkpoints" / "last.ckpt" for run in runs.values())
    yield f"{name}, 5 steps on 2 ranks and 5 on 1 against 10 on 1: {weight_differences(one, two)}"
    return one


def command(folder: Path, script: str, *words: str) -> str:
    """Run a script in a folder -> its output; RuntimeError with its last lines if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"{script} {' '.join(words)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"[-4000:]
        )
    return done.stderr


def _images(folder: Path, sizes: Sequence[tuple[int, int]] = ((32, 32),)) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(24):
        pixels = random.integers(0, 256, (*sizes[number % len(sizes)], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a cat")


def _config(images: Path) -> dict[str, Any]:
    config = text_model_config(untrained_first_stage=True, monitor="val/loss_simple_ema")
    config["model"]["base_learning_rate"] = 1e-4
    dataset = {
        "target": "ldm.data.folder.ImageFolder",
        "params": {"root": str(images), "captions": "sidecar", "size": 32},
    }
    train_set = {**dataset, "params": {**dataset["params"], "split": "train"}}
    validation = {**dataset, "params": {**dataset["params"], "split": "validation"}}
    config["data"] = {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 2, "num_workers": 0, "train": train_set, "validation": validation},
    }
    config["lightning"] = {"trainer": {"enable_progress_bar": False}}
    return config
