"""The same training on other numbers of ranks and batch sizes: curves of losses, samples of an epoch after a resume."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.ranks import largest_difference, train, train_on

PARTS = ("latent diffusion", "autoencoder", "autoencoder with GAN", "autoencoder with ActNorm", "VQ with GAN", "resume")
SHAPES = ((2, 4, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2))  # ranks, samples per batch, accumulated batches: 8 samples a step
# Batch normalization and the adaptive weight are those of one accumulated batch, so accumulation changes these curves.
WITH_DISCRIMINATOR = ("autoencoder with GAN", "autoencoder with ActNorm", "VQ with GAN")
# Neither is a multiple of 8: last batches are smaller and differ between ranks. Rounding stays rounding unless it flips
# the sign of a pixel's error, in whose absolute value the loss has a kink, or a code of VQ: both are rare in 20 steps.
LENGTH, VALIDATION = 47, 11


def run(parts: Sequence[str] = PARTS) -> Iterator[str]:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    kinds = [part for part in parts if part != "resume"]
    jobs = [{"kind": kind, "length": LENGTH, "validation": VALIDATION} for kind in kinds]
    with tempfile.TemporaryDirectory() as folder:
        expected = [train(batch_size=8, **job) for job in jobs]
        for ranks, batch_size, accumulate in SHAPES if kinds else ():
            shape = {"batch_size": batch_size, "accumulate": accumulate}
            records = train_on(ranks, [job | shape for job in jobs], Path(folder, f"{ranks}x{batch_size}"))
            for kind, one, others in zip(kinds, expected, records):
                if accumulate > 1 and kind in WITH_DISCRIMINATOR:
                    continue
                training = max(largest_difference(one["curves"], other["curves"]) for other in others)
                validation = max(largest_difference(one["validations"], other["validations"]) for other in others)
                name = f"{ranks}x{batch_size}" + (f", {accumulate} accumulated" if accumulate > 1 else "")
                steps = len(next(iter(one["curves"].values())))
                text = f"{steps} steps differ from 1x8 by at most {training:.0e}, validation by {validation:.0e}"
                yield f"{kind}, {name}: {text}"
        if "resume" in parts:
            yield from _resume(Path(folder))


def _resume(folder: Path) -> Iterator[str]:
    job = {"kind": "autoencoder", "length": LENGTH}
    for (ranks, size), (ranks_after, size_after) in (((2, 4), (1, 3)), ((1, 3), (2, 4)), ((2, 3), (3, 2))):
        for steps in (1, 3, 6, 7):
            path = str(folder / f"{ranks}x{size}-{steps}.ckpt")
            [before] = train_on(ranks, [job | {"batch_size": size, "steps": steps, "save": path}], folder / "before")
            [after] = train_on(
                ranks_after, [job | {"batch_size": size_after, "steps": steps + 20, "resume": path}], folder / "after"
            )
            used = Counter(tuple(sample) for record in before + after for sample in record["samples"])
            last = max(epoch for epoch, _ in used)
            missing = sum((epoch, index) not in used for epoch in range(last) for index in range(LENGTH))
            twice = sum(count > 1 for count in used.values())
            yield (
                f"resume {ranks}x{size} -> {ranks_after}x{size_after} at step {steps}: "
                f"{twice} samples twice, {missing} missing in {last} epochs"
            )
