"""docs/results.md: tables, findings and plots of the paper's claims, from the JSON files of results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from benchmarks.paper import (
    CLAIMS,
    CURVE,
    DIGITS,
    MARKS,
    RUNS,
    SAMPLERS,
    SCALES,
    SEEDS,
    STEP_COUNTS,
    STEPS,
    Samples,
    Study,
    covers,
    load,
    plan,
    read_results,
)
from benchmarks.report import INK, SMALL
from ldm.atomic import save_bytes, save_text
from ldm.cli import counted
from ldm.paths import ROOT

DOCS = ROOT / "docs"
COLORS = ("#1f77b4", "#c2410c", "#2b8a3e", "#7c3aed")
LABELS = {"pixel": "f=1 (pixels)", "latent-f2": "f=2", "latent-f4": "f=4", "latent-f8": "f=8"}
REGULARIZED = {"latent-f4": "KL", "latent-vq-f4": "VQ"}
DROPOUTS = {"dropout-0": "dropout 0", "latent-f4": "dropout 0.1", "dropout-0.2": "dropout 0.2"}
NAMES = {**LABELS, "latent-vq-f4": "f=4, VQ", "dropout-0": "f=4, dropout 0", "dropout-0.2": "f=4, dropout 0.2"}
QUALITY = {"fid": "FID", "precision": "precision, %", "recall": "recall, %", "recognized": "recognized, %"}
STAGE = {"psnr": 3, "rfid": 3, "codes_used": 2}  # values of a first stage, and their digits
FID = "FID on the classifier's features, lower is better"
END, EARLY = CURVE[-1], CURVE[0]
GUIDED: Mapping[float, Samples] = {scale: Samples(scale=scale) for scale in SCALES}
BySeed = Mapping[int, float]


class Point(NamedTuple):
    """One value of x, and those of y of all seeds."""

    x: float
    ys: Sequence[float]

    @property
    def y(self) -> float:
        return fmean(self.ys)


Lines = Mapping[str, Sequence[Point]]


class Block(NamedTuple):
    """A claim's findings, the lines of its plot, what else `draw` needs, and the rows of its table, head first."""

    findings: Sequence[Sequence[str]]
    lines: Lines
    axes: Mapping[str, Any]
    rows: Sequence[Sequence[str]]


def write_page(out: Path, study: Study, docs: Path = DOCS) -> Path:
    """Replace a study's blocks between their marks in docs/results.md, and its plots; return the page.

    Blocks without marks are added at the end.
    """
    found = Found(study, read_results(out, study))
    if not found.results:
        raise ValueError(f"--out {out}: no results; run python -m benchmarks.paper")
    page, prefix = docs / "results.md", "results" if study == DIGITS else f"results-{study.name}"
    samples = save_samples(out, [(run, 1.0) for run in NAMES], docs / f"{prefix}-samples.png")
    content = f"{setup(found)}\n\n![Samples of one seed of each model]({samples})"
    text = replaced(page.read_text(encoding="utf-8"), "setup", content, study)
    for number, claim in CLAIMS.items():
        title, content = claim[0].upper() + claim[1:], "No seed has finished the runs of this claim."
        if found.finished(number):
            block, plot = BLOCKS[number](found), f"{prefix}-{number}.svg"
            save_text(docs / plot, draw(block.lines, **block.axes))
            parts = [
                table(["finding", "seeds", "by"], block.findings),
                f"![{title}]({plot})",
                table(block.rows[0], block.rows[1:]),
            ]
            if number == 4:
                scales = [("latent-f4", scale) for scale in SCALES[::2]]
                parts.append(f"![Samples at each scale]({save_samples(out, scales, docs / f'{prefix}-guided.png')})")
            content = "\n\n".join(parts)
        elif number not in study.claims:
            continue
        text = replaced(text, f"claim {number}", content, study, f"### {title}")
    return save_text(page, text)


def replaced(text: str, name: str, block: str, study: Study, heading: str = "") -> str:
    """The page with what stands between two marks replaced; with the marks and a heading at its end if it has none."""
    named, data = (name, "") if study == DIGITS else (f"{name} of {study.name}", f" --data {study.name}")
    begin, end = f"<!-- {named}: python -m benchmarks.paper{data} --report -->", f"<!-- end of {named} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        before, after = f"{text.rstrip()}\n\n{heading or f'## {study.name}'}\n\n", "\n"
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


def setup(found: Found) -> str:
    """Table of the data, the budget, the machine and the missing runs."""
    study, every = found.study, [result for seeds in found.results.values() for result in seeds.values()]
    real, seeds = every[0]["real"], sorted({result["seed"] for result in every})
    percents = {key: f"{100 * real[key]:.1f} %" for key in ("precision", "recall", "recognized") if key in real}
    read = f", which reads {percents['recognized']} of the held-out images right" if "recognized" in real else ""
    marks = [f"{study.seconds * share:g}" for share in MARKS]
    stages = [result["training_cpu_seconds"] for result in every if "training_cpu_seconds" in result]
    sizes = [result["parameters"] / 1e6 for result in every if "parameters" in result] or [math.nan]
    batches = [load(config)["data"]["params"]["batch_size"] for config in study.configs]
    rows = {
        "images": f"{real['training_images']:,} for training, {real['held_out_images']:,} held out, "
        + (f"{real['classes']} classes" if real["classes"] else "with captions"),
        "features": f"{real['features']}{read}",
        "compared with": f"{real['compared_with']:,} training images",
        "held-out images, as many as samples": f"FID {significant(real['fid'], 3)}, precision {percents['precision']}, "
        f"recall {percents['recall']}",
        "first stage": f"{study.stage_steps} steps of {batches[0]} images, {shown(stages)} CPU seconds",
        "diffusion model": f"{min(sizes):.1f} to {max(sizes):.1f} M parameters, batches of {batches[1]} images",
        "its training": f"{marks[-1]} CPU seconds, with checkpoints at {', '.join(marks)}",
        "samples": f"{study.count} for each value; DDIM, {STEPS} steps, scale 1, where nothing else is stated",
        "runs": f"{len(every)}, {sum(result['cpu_minutes'] for result in every):.0f} CPU minutes in all",
        "seeds": ", ".join(map(str, seeds)),
        "machine": f"one thread of {', '.join(sorted({result['environment']['machine'] for result in every}))}",
    }
    wanted = plan(study.claims)
    for seed in sorted({*SEEDS, *seeds}):
        left = [run.name for run in wanted if seed not in found.results.get(run.name, ())]
        names = "every run" if len(left) == len(wanted) else ", ".join(f"`{name}`" for name in left)
        rows |= {f"not run for seed {seed}": names} if left else {}
    return table(["", ""], rows.items())


# --------------------------------------------------------------------------------------------------------------- values


class Found(NamedTuple):
    """The results of a study by run and seed, and their values."""

    study: Study
    results: Mapping[str, Mapping[int, Mapping[str, Any]]]

    def finished(self, claim: int) -> bool:
        """True if a seed has all runs of a claim."""
        runs = plan([claim])
        seeds = set.intersection(*(set(self.results.get(run.name, ())) for run in runs))
        return any(all(covers(self.results[run.name][s], run.samples([claim])) for run in runs) for s in seeds)

    def __call__(self, run: str, key: str = "fid", samples: Samples = END) -> dict[int, float]:
        """A metric of a set of samples for each seed of a run."""
        return {
            seed: each[key]
            for seed, result in self.results.get(run, {}).items()
            for each in result["samples"]
            if covers({"samples": [each]}, [samples]) and key in each
        }

    def stage(self, run: str, key: str) -> dict[int, float]:
        """A value of the first stage of a diffusion model for each seed; empty in pixel space."""
        stage = next(each.first_stage for each in RUNS if each.name == run)
        every = self.results.get(stage.name if stage else "", {})
        return {seed: result[key] for seed, result in every.items() if key in result}

    def rates(self, run: str) -> tuple[dict[int, float], dict[int, float]]:
        """Training steps, and generated images, per CPU second."""
        ends = {seed: result["marks"][-1] for seed, result in self.results.get(run, {}).items()}
        steps = {seed: end["step"] / end["cpu_seconds"] for seed, end in ends.items()}
        return steps, {seed: self.study.count / s for seed, s in self(run, "sampling_cpu_seconds").items()}

    def cells(self, run: str, samples: Samples = END) -> list[str]:
        """Cells of QUALITY, and the number of seeds."""
        every = [shown(self(run, key, samples).values(), percent=key != "fid") for key in QUALITY]
        return [*every, str(len(self(run, samples=samples)))]

    def line(self, run: str, samples: Mapping[float, Samples], key: str = "fid") -> list[Point]:
        """A metric over x."""
        scale = 1 if key == "fid" else 100
        return [
            Point(x, [scale * y for y in ys.values()]) for x, each in samples.items() if (ys := self(run, key, each))
        ]


def finding(text: str, larger: BySeed, smaller: BySeed, unit: str = "") -> list[str]:
    """A row: in how many seeds the first value is larger than the second, and their ratio, or difference in a unit."""
    seeds = sorted(larger.keys() & smaller.keys())
    held = sum(larger[seed] > smaller[seed] for seed in seeds)
    scale = 100 if unit == "points" else 1
    by = [scale * (larger[s] - smaller[s]) if unit else larger[s] / (smaller[s] or math.nan) for s in seeds]
    return [text, f"**{held} of {len(seeds)}**", f"{shown(by)} {unit}" if unit else f"a factor of {shown(by)}"]


def shown(numbers: Iterable[float], digits: int = 3, percent: bool = False) -> str:
    """Mean and range over seeds: "12.3 (11.0 to 13.1)"."""
    scaled = [100 * number if percent else number for number in numbers]
    if not scaled:
        return ""
    mean, low, high = (significant(number, digits) for number in (fmean(scaled), min(scaled), max(scaled)))
    return mean if len(scaled) == 1 else f"{mean} ({low} to {high})"


def significant(number: float, digits: int) -> str:
    """A number with that many significant digits, never as 1e+02."""
    places = digits - 1 - (math.floor(math.log10(abs(number))) if number else 0)
    return f"{round(number, places):.{max(0, places)}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, without the columns that are empty in every row."""
    body = [list(row) for row in rows]
    kept = [k for k in range(len(head)) if k == 0 or any(row[k] for row in body)]
    lines = ["| " + " | ".join(row[k] for k in kept) + " |" for row in [head, *body]]
    return "\n".join([lines[0], "|---" * len(kept) + "|", *lines[1:]])


# --------------------------------------------------------------------------------------------------------------- claims


def compare(found: Found, runs: Mapping[str, str], findings: Sequence[Sequence[str]]) -> Block:
    """FID over time, and throughput and quality after the whole budget, of models on different first stages."""
    rows = [["", "PSNR, dB", "rFID", "codes used", "steps per CPU s", "images per CPU s", *QUALITY.values(), "seeds"]]
    for run, label in runs.items():
        stage = [shown(found.stage(run, key).values(), digits) for key, digits in STAGE.items()]
        rows.append([label, *stage, *(shown(rate.values()) for rate in found.rates(run)), *found.cells(run)])
    lines = {label: found.line(run, {seconds(found, each): each for each in CURVE}) for run, label in runs.items()}
    axes = {"x_title": "training of the diffusion model, CPU seconds", "y_title": FID, "log_y": True}
    return Block(findings, lines, axes, rows)


def seconds(found: Found, samples: Samples) -> float:
    """CPU seconds of training before these samples."""
    return found.study.seconds * MARKS[samples.mark]


def space(found: Found) -> Block:
    latent, pixel, last = "latent-f4", "pixel", f"after {seconds(found, END):g} s"
    stage = shown(found.stage(latent, "training_cpu_seconds").values())
    paid = f"after {seconds(found, EARLY):g} s, and {stage} s of its first stage, than of pixels {last}"
    (steps, images), (pixel_steps, pixel_images) = found.rates(latent), found.rates(pixel)
    findings = [
        finding("f=4 makes more training steps in the same time", steps, pixel_steps),
        finding("f=4 generates more images in the same time", images, pixel_images),
        finding(f"FID of f=4 is lower than of pixels, {last}", found(pixel), found(latent)),
        finding(f"FID of f=4 is lower {paid}", found(pixel), found(latent, samples=EARLY)),
    ]
    return compare(found, {name: LABELS[name] for name in (pixel, latent)}, findings)


def factors(found: Found) -> Block:
    last, early = (f"after {seconds(found, each):g} s" for each in (END, EARLY))
    f1, f2, f4, f8 = LABELS
    findings = [
        finding(f"FID of f=2 is lower than of f=1, {last}", found(f1), found(f2)),
        finding(f"FID of f=4 is lower than of f=2, {last}", found(f2), found(f4)),
        finding(f"FID of f=8 is higher than of f=4, {early}", found(f8, samples=EARLY), found(f4, samples=EARLY)),
        finding(f"FID of f=8 is higher than of f=4, {last}", found(f8), found(f4)),
        finding("rFID of the first stage is higher for f=8 than f=4", found.stage(f8, "rfid"), found.stage(f4, "rfid")),
    ]
    return compare(found, LABELS, findings)


def regularization(found: Found) -> Block:
    kl, vq = REGULARIZED
    findings = [
        finding("VQ reconstructs with a lower PSNR", found.stage(kl, "psnr"), found.stage(vq, "psnr"), "dB"),
        finding("VQ reconstructs with a higher rFID", found.stage(vq, "rfid"), found.stage(kl, "rfid")),
    ]
    for each in CURVE:
        text = f"FID of samples is lower with VQ, after {seconds(found, each):g} s"
        findings.append(finding(text, found(kl, samples=each), found(vq, samples=each)))
    return compare(found, REGULARIZED, findings)


def guidance(found: Found) -> Block:
    findings, run = [], "latent-f4"
    for scale in SCALES[1:-1]:
        each = Samples(scale=scale)
        precision, recall, fid = (found(run, key, each) for key in ("precision", "recall", "fid"))
        findings += [
            finding(f"scale {scale:g}: precision is higher than at 1", precision, found(run, "precision"), "points"),
            finding(f"scale {scale:g}: recall is lower than at 1", found(run, "recall"), recall, "points"),
            finding(f"scale {scale:g}: FID is lower than at 1", found(run), fid),
        ]
    lines = {key: found.line(run, GUIDED, key) for key in QUALITY if key != "fid"}
    rows = [["scale", *QUALITY.values(), "seeds"]]
    rows += [[f"{scale:g}", *found.cells(run, each)] for scale, each in GUIDED.items()]
    return Block(findings, lines, {"x_title": "guidance scale", "y_title": "share of images, percent"}, rows)


def samplers(found: Found) -> Block:
    run, least = "latent-f4", STEP_COUNTS[0]
    grids: dict[str, dict[float, Samples]] = {name: {n: Samples(name, n) for n in STEP_COUNTS} for name in SAMPLERS}
    ddim = {steps: found(run, samples=each) for steps, each in grids["ddim"].items()}
    findings = [
        finding(f"DDIM: FID of {more} steps is lower than of {less}", ddim[less], ddim[more])
        for less, more in pairwise(STEP_COUNTS)
    ]
    text, fast = f"FID of {least} steps of DPM-Solver++ is lower than of {STEPS} of DDIM", grids["dpm_solver"][least]
    findings.append(finding(text, found(run), found(run, samples=fast)))
    lines = {name: found.line(run, grid) for name, grid in grids.items()}
    rows = [["FID at steps", *map(str, STEP_COUNTS)]]
    for name, grid in grids.items():
        rows.append([f"`{name}`", *(shown(found(run, samples=each).values()) for each in grid.values())])
    return Block(findings, lines, {"x_title": "sampler steps", "y_title": FID, "log_x": True, "log_y": True}, rows)


def dropouts(found: Found) -> Block:
    findings, rows = [], [["", "scale", *QUALITY.values(), "seeds"]]
    for less, more in pairwise(DROPOUTS):
        for scale in SCALES[:-1]:
            each, text = Samples(scale=scale), f"lower with {DROPOUTS[more]} than {DROPOUTS[less]}"
            fids = found(less, samples=each), found(more, samples=each)
            findings.append(finding(f"scale {scale:g}: FID is {text}", *fids))
    for run, label in DROPOUTS.items():
        rows += [[label, f"{scale:g}", *found.cells(run, each)] for scale, each in GUIDED.items()]
    lines = {label: found.line(run, GUIDED) for run, label in DROPOUTS.items()}
    return Block(findings, lines, {"x_title": "guidance scale", "y_title": FID, "log_y": True}, rows)


BLOCKS: Mapping[int, Callable[[Found], Block]] = dict(
    enumerate((space, factors, regularization, guidance, samplers, dropouts), 1)
)


# --------------------------------------------------------------------------------------------------------------- plots


def draw(lines: Lines, x_title: str, y_title: str, log_x: bool = False, log_y: bool = False) -> str:
    """An SVG of labelled lines through the means; bars reach from the lowest to the highest seed."""
    width, height, left, right, top, bottom = 640, 360, 60, 120, 46, 44
    lines = {label: points for label, points in lines.items() if points}
    points = [point for line in lines.values() for point in line]
    seeds = max(len(point.ys) for point in points)
    xs = [point.x for point in points]
    ys = [y for point in points for y in point.ys]
    x_scale = Axis(min(xs), max(xs), left + 12, width - right - 8, log_x)
    y_scale = Axis(min(ys) / 1.15 if log_y else 0, max(ys) * (1.15 if log_y else 1.05), height - bottom, top, log_y)

    def parts() -> Iterator[str]:
        yield f'<text x="{left}" y="16" font-size="12" font-weight="600">{escape(y_title)}</text>'
        note = f"mean of {counted(seeds, 'seed')}" + ("; bars: lowest and highest" if seeds > 1 else "")
        yield f'<text x="{left}" y="32" {SMALL}>{note}</text>'
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


def save_samples(out: Path, samples: Sequence[tuple[str, float]], path: Path) -> str:
    """Save the samples that runs kept at a scale, one set below the other with its name; return the file's name."""
    from PIL import Image

    from ldm.output.images import png_bytes
    from ldm.visualize import grid

    shown: dict[str, Image.Image] = {}
    for run, scale in samples:
        file = out / f"{run}-scale{scale:g}.png"
        if file.is_file():
            small = Image.open(file).convert("RGB")
            name = f"scale {scale:g}" if len({name for name, _ in samples}) == 1 else NAMES[run]
            shown[name] = small.resize((2 * small.width, 2 * small.height), Image.Resampling.NEAREST)
    save_bytes(path, png_bytes(grid(list(shown.values()), list(shown), columns=1, padding=4)))
    return path.name
