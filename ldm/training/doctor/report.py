"""The report of an examination as text, a line for each value."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from datetime import timedelta

from ldm.cli import counted
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.optimizers import class_names
from ldm.training.doctor.estimates import (
    EFFICIENCY,
    checkpoint_size,
    device_memory,
    expected_step,
    memory_rows,
    product_speed,
    size_text,
)
from ldm.training.doctor.examined import Examined


def report_lines(run: Examined) -> Iterator[str]:
    """Yield the lines: parameters, training, memory, problems and notes."""
    if run.model is not None:
        yield from _parameters(run)
    yield from _training(run)
    if run.footprint is not None:
        yield from _memory(run)
    for title, kind in (("problems", True), ("notes", False)):
        lines = [finding.text for finding in run.findings if finding.is_problem == kind]
        if lines or kind:
            yield f"{title}: {len(lines) or 'none'}"
            yield from (f"  {line}" for line in lines)


def _parameters(run: Examined) -> Iterator[str]:
    yield f"{'parameters':28}{'all':>15}{'trainable':>15}{'frozen':>15}"
    total, seen = [0, 0], set[int]()
    for name, part in run.model.named_children():
        own = {id(p): p for p in part.parameters() if id(p) not in seen}
        counts = [sum(p.numel() for p in own.values() if p.requires_grad == trained) for trained in (True, False)]
        seen |= own.keys()
        total = [a + b for a, b in zip(total, counts)]
        if any(counts):
            yield f"  {name:26}{sum(counts):15,}{counts[0]:15,}{counts[1]:15,}"
    yield f"  {'sum':26}{sum(total):15,}{total[0]:15,}{total[1]:15,}"


def _training(run: Examined) -> Iterator[str]:
    yield "training"
    nodes = f", {run.settings.num_nodes} nodes" if run.settings.num_nodes > 1 else ""
    rows = {"device": f"{run.devices.text}{nodes}, precision {run.precision}"}
    if run.rate is not None:
        rows["effective batch"], _, rows["learning rate"] = run.rate.rule.partition("; ")
        rows["effective batch"] = rows["effective batch"].removeprefix("effective batch ")
        rows["learning rate"] = rows["learning rate"].removeprefix("learning rate ")
    if isinstance(run.model, DDPM):
        rows["objective"] = run.model.describe_objective()
    rows["optimizer"] = _optimizer_text(run)
    data = run.datasets.get("train")
    if run.samples:
        size = counted(len(data), "sample") if isinstance(data, Sized) else "a stream"
        rows["data"] = f"{size}; {len(run.samples)} read in {run.sample_seconds * len(run.samples):.2f} s"
    if text := getattr(data, "bucket_text", ""):
        rows["buckets"] = text
    if run.epoch_steps:
        rows["epoch"] = f"{counted(run.batches or 0, 'batch', 'batches')}, {counted(run.epoch_steps, 'step')}"
    if run.steps is not None:
        epochs = f", {run.steps / run.epoch_steps:,.1f} epochs" if run.epoch_steps else ""
        rows["run"] = f"{counted(run.steps, 'step')}{epochs}"
    if run.latent_text:
        rows["latents"] = run.latent_text
    rows["step"] = run.step_text
    if seconds := expected_step(run):
        source = f"the step of {counted(min(2, len(run.samples)), 'sample')}" if run.step_seconds else _speed_text(run)
        whole = f", {_duration(seconds * run.steps)} for the run" if run.steps else ""
        rows["time, estimated"] = f"{_duration(seconds)} for a step{whole}, from {source}"
    if run.footprint is not None:
        rows["checkpoint"] = size_text(checkpoint_size(run))
    yield from (f"  {name:26}{text}" for name, text in rows.items())


def _speed_text(run: Examined) -> str:
    assert run.footprint is not None
    count = run.footprint.flops * run.accumulated / 1e12
    speed = product_speed(run) / 1e12
    return f"{count:,.1f} TFLOP at {EFFICIENCY:.0%} of {speed:,.2f} TFLOP/s of a matrix product here"


def _optimizer_text(run: Examined) -> str:
    texts = []
    for optimizer in run.optimizers:
        rates = dict.fromkeys(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
        texts.append(f"{class_names(optimizer)}, learning rate {', '.join(f'{rate:.3e}' for rate in rates)}")
    factors, steps = run.rate_factor, run.steps
    if texts and factors is not None and steps:
        texts[0] += f", times {factors(0):.3g} at step 0, {factors(steps // 2):.3g} at {steps // 2:,}"
        texts[0] += f", {factors(steps):.3g} at the end"
    return "; ".join(texts) or "unknown"


def _memory(run: Examined) -> Iterator[str]:
    yield f"memory of one device, computed from shapes at batch size {run.batch_size} (not measured)"
    rows = memory_rows(run)
    yield from (f"  {name:34}{size_text(size):>12}" for name, size in rows)
    available = device_memory(run)
    of = f" of {size_text(available)}" if available else ""
    yield f"  {'sum':34}{size_text(sum(size for _, size in rows)):>12}{of}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    return str(timedelta(seconds=round(seconds)))
