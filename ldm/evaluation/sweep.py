"""The table and the plots of a sweep of sampling settings."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.atomic import save_bytes, save_text
from ldm.evaluation.card import METRICS, Card, plain, shown, table
from ldm.evaluation.figure import stacked, trade_off_plot
from ldm.evaluation.plan import Point, without_places
from ldm.output.images import png_bytes

COLUMNS = ("fid", "kid", "precision", "recall", "recognized", "clip_score", "copies")


def finished(
    folder: Path, record: Mapping[str, Any], count: int, weights: Mapping[str, Any], data: Mapping[str, Any]
) -> Card | None:
    """The card of a point that an earlier run completed; None without one of these settings, weights and data."""
    if not (folder / "card.json").is_file():
        return None
    card = Card.read(folder, "--sweep")
    same = {name: plain(value) for name, value in card.settings.items()} == {k: plain(x) for k, x in record.items()}
    known = {name: card.data.get(name) for name in data}
    weights, data = json.loads(json.dumps([weights, data], default=str))
    same = same and known == data and without_places(card.weights) == without_places(weights)
    return card if same and card.data.get("images", "").startswith(f"{count},") else None


def write(folder: Path, swept: Mapping[str, Sequence[Any]], points: Sequence[Point], cards: Sequence[Card]) -> Path:
    """Write sweep.md and sweep.png into a folder -> the former."""
    names = [name for name in COLUMNS if any(name in card.metrics for card in cards)]
    head = [*swept, *(METRICS[name].label for name in names), "seconds per sample"]
    rows = [
        [
            *(plain(point.values[name]) for name in swept),
            *(shown(name, card.metrics[name]) if name in card.metrics else "" for name in names),
            f"{card.seconds['per sample']:.4f}" if "per sample" in card.seconds else "",
        ]
        for point, card in zip(points, cards, strict=True)
    ]
    plots = [
        trade_off(
            points, cards, "scale", lambda card: value_of(card, "recall"), "recall (lines: one setting, in order)"
        ),
        trade_off(points, cards, "steps", lambda card: card.seconds.get("per sample"), "seconds per sample"),
    ]
    save_bytes(folder / "sweep.png", png_bytes(stacked([each for each in plots if each is not None])))
    text = "\n".join([f"# {cards[0].title.partition(':')[0]}: sweep", "", *table(head, rows), "", "![](sweep.png)"])
    return save_text(folder / "sweep.md", text + "\n")


def trade_off(
    points: Sequence[Point], cards: Sequence[Card], along: str, x: Callable[[Card], float | None], x_label: str
) -> Any:
    """Frechet distance over x; a line for each combination of the settings other than `along`. None without any x."""
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for point, card in zip(points, cards, strict=True):
        others = [
            value if isinstance(value, str) else f"{name} {plain(value)}"
            for name, value in point.values.items()
            if name != along
        ]
        if (at := x(card)) is not None:
            groups[" ".join(others) or "samples"].append((round(at, 5), card.metrics["fid"].value))
    return trade_off_plot(groups, "Frechet distance", x_label, by_x=along != "scale") if groups else None


def value_of(card: Card, name: str) -> float | None:
    return card.metrics[name].value if name in card.metrics else None
