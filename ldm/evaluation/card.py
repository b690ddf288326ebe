"""Evaluation cards: metrics and their provenance, as JSON and Markdown; comparison of two cards."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Self

from PIL import Image

from ldm import __version__
from ldm.atomic import save_bytes, save_text
from ldm.output.images import png_bytes

FORMAT = 1
PACKAGES = ("torch", "torchmetrics", "pytorch-lightning", "transformers", "torch-fidelity", "open-clip-torch", "numpy")


class Kind(NamedTuple):
    """The display of a metric: its name, the factor and digits of its values, its unit, and which values are better."""

    label: str
    factor: float
    digits: int
    unit: str
    better: str


METRICS = {
    "fid": Kind("Frechet distance", 1, 3, "", "lower"),
    "kid": Kind("kernel distance x 1000", 1000, 3, "", "lower"),
    "precision": Kind("precision", 1, 3, "", "higher"),
    "recall": Kind("recall", 1, 3, "", "higher"),
    "recognized": Kind("recognized as their class", 100, 1, " %", "higher"),
    "clip_score": Kind("CLIP score", 1, 2, "", "higher"),
    "copies": Kind("nearer to a training image than 99 % of held-out images", 100, 1, " %", "about 1 %"),
    "novelty": Kind("distance to the nearest training image, held-out images = 1", 1, 3, "", "about 1"),
    "psnr": Kind("PSNR", 1, 2, " dB", "higher"),
    "ssim": Kind("SSIM", 1, 4, "", "higher"),
    "lpips": Kind("LPIPS", 1, 4, "", "lower"),
    "rfid": Kind("Frechet distance to the originals (rFID)", 1, 3, "", "lower"),
}


class Metric(NamedTuple):
    """A value, its 95 % interval, or its standard deviation over subsets."""

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None


@dataclass
class Card:
    """An evaluation, all in plain JSON values."""

    kind: str  # samples, images or first stage
    title: str
    command: str
    metrics: dict[str, Metric]
    skipped: dict[str, str]  # metric -> why it has no value
    settings: dict[str, Any] = field(default_factory=dict)  # of sampling
    weights: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    latents: dict[str, Any] = field(default_factory=dict)
    copies: list[dict[str, Any]] = field(default_factory=list)  # flagged samples, the nearest first
    seconds: dict[str, float] = field(default_factory=dict)
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    versions: dict[str, str] = field(default_factory=lambda: versions())
    format: int = FORMAT

    def save(self, folder: Path, figure: Image.Image) -> Path:
        """Write card.png, card.md and card.json, which marks a complete card, into a folder."""
        save_bytes(folder / "card.png", png_bytes(figure))
        save_text(folder / "card.md", self.markdown())
        values = {**asdict(self), "metrics": {name: metric._asdict() for name, metric in self.metrics.items()}}
        return save_text(folder / "card.json", json.dumps(values, indent=1, default=str) + "\n")

    @classmethod
    def read(cls, path: Path, flag: str = "--compare") -> Self:
        """The card of a folder or of its card.json; raise ValueError for anything else."""
        file = path / "card.json" if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            values["metrics"] = {name: Metric(**each) for name, each in values["metrics"].items()}
            card = cls(**values)._checked()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{flag} {path}: no card.json; pass the folder of an evaluation") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{flag} {file}: not a card of scripts/evaluate.py, or damaged") from error
        if card.format != FORMAT:
            raise ValueError(f"{flag} {file}: format {card.format}, this version reads {FORMAT}; evaluate it again")
        return card

    def _checked(self) -> Self:
        """This card; raise TypeError for values that no card has."""
        sections = (self.skipped, self.settings, self.weights, self.data, self.latents, self.seconds)
        numbers = [x for metric in self.metrics.values() for x in (metric.value, *filter(None, metric[1:]))]
        if not (
            all(isinstance(each, dict) for each in sections)
            and all(isinstance(x, int | float) for x in (*numbers, *self.seconds.values()))
            and all(isinstance(x, str) for x in (self.title, self.data.get("images", "")))
        ):
            raise TypeError("values of other types")
        return self

    def markdown(self) -> str:
        lines = [f"# {self.title}", "", f"    {self.command}", ""]
        rows = [
            [METRICS[name].label, shown(name, metric), interval(name, metric), METRICS[name].better]
            for name, metric in self.metrics.items()
        ]
        lines += [*table(["metric", "value", "95 % interval", "better"], rows), "", "![](card.png)", ""]
        lines += [f"- {METRICS[name].label}: not measured, {reason}" for name, reason in self.skipped.items()]
        lines += [""] * bool(self.skipped)
        for title, values in self._sections():
            if values:
                lines += [*table([title, ""], [[name, plain(value)] for name, value in values.items()]), ""]
        if self.copies:
            lines += ["Flagged as near copies (the nearest first):", ""]
            lines += table(list(self.copies[0]), [[plain(value) for value in each.values()] for each in self.copies])
        return "\n".join(lines).rstrip() + "\n"

    def _sections(self) -> Iterable[tuple[str, Mapping[str, Any]]]:
        yield "sampling", {name: value for name, value in self.settings.items() if value not in (None, "", [], ())}
        yield "weights", self.weights
        yield "data", self.data
        yield "latents", self.latents
        yield (
            "seconds",
            {name: f"{value:.3g}" if value < 10 else f"{value:.0f}" for name, value in self.seconds.items()},
        )
        yield "versions", {"created": self.created, **self.versions}


def versions() -> dict[str, str]:
    """Versions of this project, of Python, and of the packages that metrics depend on."""
    found = {"ldm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def shown(name: str, metric: Metric) -> str:
    kind = METRICS[name]
    spread = f" ± {_number(metric.spread, kind)}" if metric.spread is not None else ""
    return f"{_number(metric.value, kind)}{spread}{kind.unit}"


def interval(name: str, metric: Metric) -> str:
    kind = METRICS[name]
    if metric.low is None or metric.high is None:
        return "± over subsets" if metric.spread is not None else ""
    return f"{_number(metric.low, kind)} to {_number(metric.high, kind)}"


def _number(value: float, kind: Kind) -> str:
    """Return a value with the digits of its kind; a distance that these would show as 0 with an exponent."""
    scaled = value * kind.factor
    small = not kind.unit and 1e-9 < abs(scaled) < 10**-kind.digits / 2
    return f"{scaled:.1e}" if small else f"{scaled:.{kind.digits}f}"


def plain(value: Any) -> str:
    """A value of a card as a cell of a table."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return str(value).replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown lines of a table."""
    return [" | ".join(["", *cells, ""]).strip() for cells in (head, ["---"] * len(head), *rows)]


# --- two cards


def compare(a: Card, b: Card) -> str:
    """Two cards side by side as Markdown: their metrics, and the settings that differ."""
    rows = []
    for name in METRICS:
        if name not in a.metrics and name not in b.metrics:
            continue
        cells = [shown(name, card.metrics[name]) if name in card.metrics else "" for card in (a, b)]
        rows.append([METRICS[name].label, *cells, verdict(name, a.metrics.get(name), b.metrics.get(name))])
    lines = ["# Two evaluations", "", f"- A: {a.title}", f"- B: {b.title}", ""]
    lines += table(["metric", "A", "B", ""], rows)
    differing = [
        [name, plain(of_a), plain(of_b)]
        for section in ("settings", "weights", "data")
        for name, of_a, of_b in _differences(getattr(a, section), getattr(b, section))
    ]
    if differing:
        lines += ["", *table(["differs", "A", "B"], differing)]
    if a.data.get("images", "").partition(",")[0] != b.data.get("images", "").partition(",")[0]:
        lines += ["", "The numbers of images differ: the Frechet distances do not compare."]
    if a.data.get("features") != b.data.get("features") or a.data.get("real") != b.data.get("real"):
        lines += ["", "The distances were measured on other features or other real images: they do not compare."]
    return "\n".join([*lines, "", "![](compare.png)"]) + "\n"


def verdict(name: str, a: Metric | None, b: Metric | None) -> str:
    """Which of two values is better, or that their intervals overlap."""
    better = METRICS[name].better
    if a is None or b is None or better not in ("lower", "higher"):
        return ""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return ""  # a spread over subsets is no interval
    if a.low <= b.high and b.low <= a.high:
        return "intervals overlap"
    return "A is better" if (a.value < b.value) == (better == "lower") else "B is better"


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield name, a.get(name, ""), b.get(name, "")
