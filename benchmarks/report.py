"""docs/performance.md and its plot, from the JSON files of results alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from benchmarks.results import floor_percent, seconds
from ldm.atomic import save_text
from ldm.paths import ROOT

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- results: python -m benchmarks report -->", "<!-- end of results -->"
HEAD = "| row | what | this project | diffusers | ratio (p10 to p90) | CPU time | of the peak | memory, GB | outputs |"
INK, MUTED, BETTER, WORSE = "#1f2933", "#61707f", "#2b8a3e", "#c2410c"


class Row(NamedTuple):
    machine: str
    name: str
    row: Mapping[str, Any]


def read_results(folder: Path) -> list[Row]:
    """Every row of the folder's files, each the newest of its machine, in the order of a run."""
    newest: dict[tuple[str, str], Row] = {}
    for path in sorted(folder.glob("*.json")):
        saved = json.loads(path.read_text(encoding="utf-8"))
        machine = saved["environment"]["machine"]
        for name, row in saved["rows"].items():
            known = newest.get((machine, name))
            if known is None or known.row["time"] < row["time"]:
                newest[machine, name] = Row(machine, name, row)
    if not newest:
        raise ValueError(f"--out {folder}: no results; run python -m benchmarks cpu")
    return sorted(newest.values(), key=lambda each: (each.machine, each.row["order"]))


def write_report(folder: Path, page: Path = PAGE) -> Path:
    """Replace the results between the two marks of a page, new or not, and the plot beside it; return the page."""
    rows, plot = read_results(folder), page.with_suffix(".svg")
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Performance\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: the lines {BEGIN} and {END} are missing")
    save_text(plot, draw([row for row in rows if "ratio" in row.row]))
    save_text(page, f"{before}{BEGIN}\n\n![Ratios by row]({plot.name})\n\n{table(rows)}\n\n{END}{after}")
    return page


def table(rows: Sequence[Row]) -> str:
    """Markdown tables, one for each machine."""
    lines: list[str] = []
    for machine in dict.fromkeys(row.machine for row in rows):
        lines += [f"**{machine}**\n" if not lines else f"\n**{machine}**\n"]
        lines += [HEAD, "|---" * 9 + "|"]
        lines += [" | ".join(["", *cells(each), ""]).strip() for each in rows if each.machine == machine]
    return "\n".join(lines)


def cells(each: Row) -> list[str]:
    """The cells of a row; a row without timings says why."""
    name, row = f"`{each.name}`", each.row
    if "ratio" not in row:
        return [name, row["what"], "", "", f"void: {row['void']}" if "void" in row else row["failed"], "", "", "", ""]
    ours, theirs, ratio, floor = row["ours"], row["theirs"], row["ratio"], floor_percent(row)
    size = "" if row["size"] == "full" else f" ({row['size']} model)"
    memory = [ours["peak_bytes"], theirs["peak_bytes"]]
    against = "" if row["against"] == "diffusers" else f" ({row['against']})"
    return [
        name,
        row["what"] + size,
        f"{seconds(ours['median'])} per {row['unit']}",
        f"{seconds(theirs['median'])}{against}",
        f"**{ratio['median']:.2f}** ({ratio['p10']:.2f} to {ratio['p90']:.2f}, {row['pairs']} pairs)",
        f"{row['cpu_ratio']['median']:.2f}",
        "" if floor is None else f"{floor:.0f} %",
        "" if None in memory else " / ".join(f"{value / 1e9:.2f}" for value in memory),
        row.get("parity", {}).get("text", ""),
    ]


def draw(rows: Sequence[Row]) -> str:
    """The ratios as SVG: a point for the median, a line from p10 to p90; left of 1 this project is faster."""
    width, left, step, top = 900, 430, 22, 54
    height = top + step * (len(rows) + len({row.machine for row in rows})) + 30
    most = max([1.25, *(row.row["ratio"]["p90"] for row in rows if row.row["ratio"]["p90"] < 4)])

    def x(ratio: float) -> float:
        return left + (width - left - 60) * min(ratio, most) / most

    def parts() -> Iterator[str]:
        title = "time of this project / time of the other; below 1 is faster"
        yield f'<text x="{left}" y="20" font-size="13">{title}</text>'
        for tick in [k / 4 for k in range(int(most * 4) + 1)]:
            stroke = f'stroke="{INK if tick == 1 else "#e4e7eb"}"'
            yield f'<line x1="{x(tick)}" x2="{x(tick)}" y1="34" y2="{height - 26}" {stroke}/>'
            yield f'<text x="{x(tick)}" y="{height - 10}" {SMALL} text-anchor="middle">{tick:g}</text>'
        y, machine = top, ""
        for row in rows:
            if row.machine != machine:
                machine = row.machine
                yield f'<text x="10" y="{y}" font-size="12" font-weight="600">{escape(machine)}</text>'
                y += step
            ratio = row.row["ratio"]
            color = BETTER if ratio["median"] < 1 else WORSE
            other = "" if row.row["against"] == "diffusers" else f", against {row.row['against']}"
            yield f'<text x="10" y="{y}" {SMALL}>{escape(row.row["what"] + other)}</text>'
            ends = f'x1="{x(ratio["p10"])}" x2="{x(ratio["p90"])}" y1="{y - 4}" y2="{y - 4}"'
            yield f'<line {ends} stroke="{color}" stroke-width="3"/>'
            yield f'<circle cx="{x(ratio["median"])}" cy="{y - 4}" r="5" fill="{color}"/>'
            yield f'<text x="{width - 50}" y="{y}" {SMALL}>{ratio["median"]:.2f}</text>'
            y += step

    size = f'viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" fill="{INK}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, *parts(), "</svg>\n"])


SMALL = f'font-size="11" fill="{MUTED}"'
