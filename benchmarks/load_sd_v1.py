"""Time and memory for loading a Stable Diffusion v1 checkpoint: python benchmarks/load_sd_v1.py

Writes files with all names and shapes of sd-v1-4 and random weights in two common formats: float32 as saved by an old
Lightning (a zip .ckpt with a pickled ModelCheckpoint class), and float16 .safetensors. Each is loaded in fresh
processes, from the page cache. The files (6.4 GB, in --dir) are removed at the end unless --keep is given. Needs Linux
and 7 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CONFIG = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
FILES = {"sd-v1-shape.ckpt": ("full", "bf16"), "sd-v1-shape.safetensors": ("full", "bf16", "fp16")}
BYTES = {"full": 4, "bf16": 2, "fp16": 2}
# The promise: seconds after imports; peak RssAnon below FACTOR times the weights in their target dtype, plus EXTRA_GB.
SECONDS, FACTOR, EXTRA_GB = 5.0, 1.15, 1.0


def random_weights(ema: bool) -> dict[str, Any]:
    """Return a state dict of the config's model that preserves the scale of its input; norms are the identity."""
    import torch
    from omegaconf import OmegaConf

    from ldm.checkpoint import weights_on_meta
    from ldm.config.instantiate import instantiate_from_config

    config = OmegaConf.load(CONFIG).model
    config.params.use_ema = ema
    with weights_on_meta():
        model = instantiate_from_config(config)
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            weights[name] = tensor
        elif tensor.ndim < 2:
            weights[name] = (torch.zeros if name.endswith("bias") else torch.ones)(tensor.shape)
        else:
            weights[name] = torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5
    return weights


def write_files(folder: Path, ema: bool) -> None:
    import numpy as np
    import torch
    from pytorch_lightning.callbacks import ModelCheckpoint
    from safetensors.torch import save_file

    weights = random_weights(ema)
    values = sum(tensor.numel() for tensor in weights.values())
    print(f"{len(weights)} tensors, {values / 1e6:.1f} M values")
    saved_by_lightning_1 = {
        "epoch": 0,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {
            ModelCheckpoint: {
                "monitor": "val/loss_simple_ema",
                "best_model_score": np.float64(0.14),
                "dirpath": "checkpoints",
            }
        },
        "lr_schedulers": [{"last_epoch": 470000, "_last_lr": [np.float64(1e-4)]}],
        "optimizer_states": [],
        "state_dict": weights,
    }
    ckpt, safetensors = (folder / name for name in FILES)
    torch.save(saved_by_lightning_1, ckpt)
    for name, tensor in weights.items():  # one by one, to keep only one copy in memory
        weights[name] = tensor.half() if tensor.is_floating_point() else tensor
    save_file(weights, safetensors)
    for path in (ckpt, safetensors):
        print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")


def memory(field: str) -> float:
    """Return a field of /proc/self/status in GB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024 / 1e9


def measure(path: Path, precision: str) -> dict[str, float]:
    """Load one file in this fresh process and return its measurements."""
    import torch

    import ldm.models.autoencoder
    import ldm.models.diffusion.ddpm
    import ldm.modules.encoders.modules  # noqa: F401 (the time of imports is not measured)
    from ldm.inference import load_model

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    peak, done = memory("RssAnon"), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, memory("RssAnon"))

    before, watcher = peak, threading.Thread(target=watch)
    watcher.start()
    start, worked = time.perf_counter(), time.process_time()
    pipeline = load_model(CONFIG, path, "cpu", precision)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    done.set()
    watcher.join()
    count = sum(weight.numel() for weight in pipeline.model.parameters())
    weights = count * BYTES[precision] / 1e9
    return {"seconds": seconds, "cpu_seconds": worked, "before": before, "peak": peak, "weights": weights}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, default=Path("/tmp/load-sd-v1"), help="folder of the files (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=3, help="processes per file and precision (default: %(default)s)")
    parser.add_argument(
        "--ema", action="store_true", help="include EMA weights, as sd-v1-4-full-ema.ckpt (3.4 GB more)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the files, and reuse those of an earlier run")
    parser.add_argument(
        "--measure", nargs=2, metavar=("FILE", "PRECISION"), help="load one file in this process and print JSON"
    )
    opt = parser.parse_args(argv)
    if opt.measure:
        print(json.dumps(measure(Path(opt.measure[0]), opt.measure[1])))
        return
    opt.dir.mkdir(parents=True, exist_ok=True)
    paths = [opt.dir / name for name in FILES]
    try:
        if not (opt.keep and all(path.is_file() for path in paths)):
            write_files(opt.dir, opt.ema)
        print(f"{opt.runs} runs each, load average {os.getloadavg()[0]:.1f} at the start; the limit is {SECONDS:.0f} s")
        heads = f"{'CPU s':>8} {'RssAnon peak':>12} {'limit':>8} {'before':>7}  GB"
        print(f"{'file':<24} {'precision':<9} {'seconds (median, all)':<28} {heads}")
        for path in paths:
            with path.open("rb") as file:  # into the page cache
                while file.read(2**24):
                    pass
            for precision in FILES[path.name]:
                report(path, precision, opt.runs)
    finally:
        if not opt.keep:
            for path in paths:
                path.unlink(missing_ok=True)


def report(path: Path, precision: str, runs: int) -> None:
    """Print one row of the table, measured in fresh processes without network."""
    measured = []
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(path.parent / "no-cache")}
    for _ in range(runs):
        command = [sys.executable, __file__, "--measure", str(path), precision]
        measured.append(
            json.loads(
                subprocess.run(command, env=offline, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
        )
    seconds = [run["seconds"] for run in measured]
    peak, before = (max(run[key] for run in measured) for key in ("peak", "before"))
    text = f"{statistics.median(seconds):.2f} ({', '.join(f'{value:.2f}' for value in seconds)})"
    allowed = FACTOR * measured[0]["weights"] + EXTRA_GB
    worked = statistics.median(run["cpu_seconds"] for run in measured)
    print(
        f"{path.name:<24} {precision:<9} {text:<28} {worked:>8.2f} {peak:>12.2f} {allowed:>8.2f} {before:>7.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
