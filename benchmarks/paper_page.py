"""docs/results.md: tables and plots of the paper's claims, from the JSON files of results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from benchmarks.paper import (
    CLAIMS,
    CURVE,
    MARKS,
    RUNS,
    SAMPLERS,
    SAMPLES,
    SCALES,
    SEEDS,
    STEP_COUNTS,
    Run,
    Sampling,
    read_results,
)
from benchmarks.report import INK, SMALL
from ldm.atomic import save_bytes, save_text
from ldm.paths import ROOT

DOCS = ROOT / "docs"
COLORS = ("#1f77b4", "#c2410c", "#2b8a3e", "#7c3aed")
LABELS = {"pixel": "f=1 (pixels)", "latent-f2": "f=2", "latent-f4": "f=4", "latent-f8": "f=8"}
DROPOUTS = {"dropout-0": "dropout 0", "latent-f4": "dropout 0.1", "dropout-0.2": "dropout 0.2"}
Results = Mapping[str, Sequence[Mapping[str, Any]]]  # run -> the result of each seed


class Point(NamedTuple):
    """One value of x, and those of y of all seeds."""

    x: float
    ys: Sequence[float]
    label: str = ""

    @property
    def y(self) -> float:
        return fmean(self.ys)


Lines = Mapping[str, Sequence[Point]]


def write_page(out: Path, docs: Path = DOCS) -> Path:
    """Replace each claim's block between its marks in docs/results.md, and the plots; return the page."""
    results: Results = {run.name: found for run in RUNS if (found := read_results(out, run))}
    if not results:
        raise ValueError(f"--out {out}: no results; run python -m benchmarks.paper")
    page = docs / "results.md"
    text = replaced(page.read_text(encoding="utf-8"), "cost", cost(results), page)
    for number in CLAIMS:
        plot, block = BLOCKS[number](results)
        save_text(docs / f"results-{number}.svg", plot)
        title = CLAIMS[number][0].upper() + CLAIMS[number][1:]
        text = replaced(text, f"claim {number}", f"![{title}](results-{number}.svg)\n\n{block}", page)
    save_samples(out, [run for run in RUNS if run.name in results], docs / "results-samples.png")
    return save_text(page, text)


def replaced(text: str, name: str, block: str, page: Path) -> str:
    """The page's text with what stands between two marks replaced."""
    begin, end = f"<!-- {name}: python -m benchmarks.paper --report -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page}: the lines {begin} and {end} are missing")
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


def cost(results: Results) -> str:
    """Machine, CPU time, seeds, and the runs that are missing for the default seeds."""
    every = [each for found in results.values() for each in found]
    machines = ", ".join(sorted({each["environment"]["machine"] for each in every}))
    done = {(each["run"], each["seed"]) for each in every}
    seeds = sorted({seed for _, seed in done})
    lines = [
        f"Measured on one thread of {machines}: {len(every)} runs, {sum(each['cpu_minutes'] for each in every):.0f} "
        f"CPU minutes in all, seeds {', '.join(map(str, seeds))}."
    ]
    for seed in sorted({*SEEDS, *seeds}):
        left = [run.name for run in RUNS if (run.name, seed) not in done]
        names = "every run" if len(left) == len(RUNS) else ", ".join(f"`{name}`" for name in left)
        lines += [f"Not run for seed {seed}: {names}."] if left else []
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- values


def values(results: Results, run: str, sampling: Sampling, key: str) -> list[float]:
    """A metric of a sampling for each seed of a run."""
    wanted = [sampling.sampler, sampling.steps, sampling.scale, sampling.mark]
    return [
        each[key]
        for result in results.get(run, ())
        for each in result["samplings"]
        if [each[name] for name in ("sampler", "steps", "scale", "mark")] == wanted
    ]


def of_stage(results: Results, run: str, key: str) -> list[float]:
    return [result[key] for result in results.get(run, ()) if key in result]


def training_rate(results: Results, run: str) -> list[float]:
    """Training steps per CPU second."""
    return [result["marks"][-1]["step"] / result["marks"][-1]["cpu_seconds"] for result in results.get(run, ())]


def sampling_rate(results: Results, run: str) -> list[float]:
    """Images per CPU second."""
    return [SAMPLES / seconds for seconds in values(results, run, CURVE[-1], "sampling_cpu_seconds")]


def shown(numbers: Sequence[float], digits: int = 3, percent: bool = False) -> str:
    """Mean and range over seeds: "12.3 (11.0 to 13.1)"."""
    if not numbers:
        return ""
    scaled = [100 * number if percent else number for number in numbers]
    mean, low, high = (significant(number, digits) for number in (fmean(scaled), min(scaled), max(scaled)))
    return mean if len(numbers) == 1 else f"{mean} ({low} to {high})"


def significant(number: float, digits: int) -> str:
    """A number with that many significant digits, never as 1e+02."""
    places = digits - 1 - (math.floor(math.log10(abs(number))) if number else 0)
    return f"{round(number, places):.{max(0, places)}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def quality(results: Results, run: str, sampling: Sampling) -> list[str]:
    """Cells: FID, precision, recall, recognized, n."""
    get = partial(values, results, run, sampling)
    percents = [shown(get(key), percent=True) for key in ("precision", "recall", "recognized")]
    return [shown(get("fid")), *percents, str(len(get("fid")))]


QUALITY = ("FID", "precision, %", "recall, %", "recognized, %", "seeds")


def over_time(results: Results, runs: Mapping[str, str]) -> Lines:
    """FID over CPU seconds of training."""
    return {
        label: [Point(MARKS[each.mark], ys) for each in CURVE if (ys := values(results, run, each, "fid"))]
        for run, label in runs.items()
    }


# --------------------------------------------------------------------------------------------------------------- claims


def compare(results: Results, runs: Mapping[str, str]) -> tuple[str, str]:
    """FID over time, and throughput and quality after the whole budget, of models on different first stages."""
    head = ["", "PSNR, dB", "rFID", "codes used", "steps per CPU second", "images per CPU second", *QUALITY]
    rows = []
    for run, label in runs.items():
        stage = next(each.first_stage for each in RUNS if each.name == run) or ""
        first = [shown(of_stage(results, stage, key)) for key in ("psnr", "rfid")]
        first.append(shown(of_stage(results, stage, "codes_used"), digits=2))
        rates = [shown(training_rate(results, run)), shown(sampling_rate(results, run))]
        rows.append([label, *first, *rates, *quality(results, run, CURVE[-1])])
    kept = [k for k in range(len(head)) if k == 0 or any(row[k] for row in rows)]
    columns = [[row[k] for k in kept] for row in [head, *rows]]
    plot = draw(over_time(results, runs), "training, CPU seconds", "FID, lower is better", log_y=True)
    return plot, table(columns[0], columns[1:])


def guidance(results: Results) -> tuple[str, str]:
    get = partial(values, results, "latent-f4")
    rows, lines = [], {}
    for key in ("precision", "recall", "recognized"):
        lines[key] = [
            Point(scale, [100 * y for y in ys]) for scale in SCALES if (ys := get(Sampling(scale=scale), key))
        ]
    for scale in SCALES:
        rows.append([f"{scale:g}", *quality(results, "latent-f4", Sampling(scale=scale))])
    return draw(lines, "guidance scale", "percent"), table(("scale", *QUALITY), rows)


def samplers(results: Results) -> tuple[str, str]:
    get = partial(values, results, "latent-f4")
    lines = {
        name: [Point(steps, ys) for steps in STEP_COUNTS if (ys := get(Sampling(name, steps), "fid"))]
        for name in SAMPLERS
    }
    rows = [[f"`{name}`", *(shown(get(Sampling(name, steps), "fid")) for steps in STEP_COUNTS)] for name in SAMPLERS]
    head = ("FID at steps", *map(str, STEP_COUNTS))
    return draw(lines, "sampler steps", "FID, lower is better", log_x=True, log_y=True), table(head, rows)


def dropouts(results: Results) -> tuple[str, str]:
    lines: dict[str, list[Point]] = {}
    rows = []
    for run, label in DROPOUTS.items():
        get = partial(values, results, run)
        lines[label] = [Point(scale, ys) for scale in SCALES if (ys := get(Sampling(scale=scale), "fid"))]
        for scale in SCALES:
            rows.append([label, f"{scale:g}", *quality(results, run, Sampling(scale=scale))])
    return draw(lines, "guidance scale", "FID, lower is better", log_y=True), table(("", "scale", *QUALITY), rows)


BLOCKS: Mapping[int, Callable[[Results], tuple[str, str]]] = {
    1: lambda results: compare(results, {name: LABELS[name] for name in ("pixel", "latent-f4")}),
    2: lambda results: compare(results, LABELS),
    3: lambda results: compare(results, {"latent-f4": "KL", "latent-vq-f4": "VQ"}),
    4: guidance,
    5: samplers,
    6: dropouts,
}


# --------------------------------------------------------------------------------------------------------------- plots


def draw(lines: Lines, x_title: str, y_title: str, log_x: bool = False, log_y: bool = False) -> str:
    """An SVG of labelled lines through the means; bars reach from the lowest to the highest seed."""
    width, height, left, right, top, bottom = 640, 360, 60, 120, 30, 44
    lines = {label: points for label, points in lines.items() if points}
    points = [point for line in lines.values() for point in line]
    xs = [point.x for point in points]
    ys = [y for point in points for y in point.ys]
    x_scale = Axis(min(xs), max(xs), left + 12, width - right - 8, log_x)
    y_scale = Axis(min(ys) / 1.15 if log_y else 0, max(ys) * (1.15 if log_y else 1.05), height - bottom, top, log_y)

    def parts() -> Iterator[str]:
        yield f'<text x="{left}" y="16" font-size="12" font-weight="600">{escape(y_title)}</text>'
        middle = (left + width - right) / 2
        yield f'<text x="{middle:.0f}" y="{height - 8}" {SMALL} text-anchor="middle">{escape(x_title)}</text>'
        for tick in y_scale.ticks():
            y = y_scale(tick)
            yield f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e7eb"/>'
            yield f'<text x="{left - 6}" y="{y + 4:.1f}" {SMALL} text-anchor="end">{tick:g}</text>'
        for tick in sorted(set(xs)):
            place = f'x="{x_scale(tick):.1f}" y="{height - bottom + 16}"'
            yield f'<text {place} {SMALL} text-anchor="middle">{tick:g}</text>'
        heights = spread([y_scale(line[-1].y) for line in lines.values()])
        for k, (label, line) in enumerate(lines.items()):
            color, shift = COLORS[k], 3 * (k - (len(lines) - 1) / 2)  # so that bars do not hide one another
            path = " ".join(f"{x_scale(point.x) + shift:.1f},{y_scale(point.y):.1f}" for point in line)
            yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
            for point in line:
                x, low, high = x_scale(point.x) + shift, y_scale(min(point.ys)), y_scale(max(point.ys))
                yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{color}"/>'
                yield f'<circle cx="{x:.1f}" cy="{y_scale(point.y):.1f}" r="3.5" fill="{color}"/>'
            place = f'x="{width - right + 12}" y="{heights[k] + 4:.1f}"'
            yield f'<text {place} font-size="12" fill="{color}">{escape(label)}</text>'

    size = f'viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" fill="{INK}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, *parts(), "</svg>\n"])


class Axis(NamedTuple):
    """Maps values from low..high to pixels from start..end."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1)

    def ticks(self) -> list[float]:
        """Round values: 1, 2, 5, 10, ... on a logarithmic axis, else about five."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = [k * 10.0**power for power in decades for k in (1, 2, 5)]
        else:
            step = 10.0 ** math.floor(math.log10(self.high / 2))
            step *= next(k for k in (1, 2, 5, 10) if self.high / (k * step) <= 6)
            every = [k * step for k in range(int(self.high / step) + 1)]
        return [tick for tick in every if self.low <= tick <= self.high]


def spread(heights: Sequence[float], gap: float = 15) -> list[float]:
    """The heights of labels, moved down so that none hides another."""
    moved, last = list(heights), -math.inf
    for k in sorted(range(len(moved)), key=moved.__getitem__):
        moved[k] = last = max(moved[k], last + gap)
    return moved


def save_samples(out: Path, runs: Sequence[Run], path: Path) -> None:
    """Save the samples that the runs of the first seed kept, below one another with their names."""
    from PIL import Image

    from ldm.visualize import grid

    files = {run.name: next(iter(sorted(out.glob(f"{run.name}-*.png"))), None) for run in runs if run.samplings}
    small = {name: Image.open(file).convert("RGB") for name, file in files.items() if file is not None}
    strips = {name: strip.resize((2 * strip.width, 2 * strip.height)) for name, strip in small.items()}
    if strips:
        content = BytesIO()
        grid(list(strips.values()), list(strips), columns=1, padding=4).save(content, "PNG", optimize=True)
        save_bytes(path, content.getvalue())
