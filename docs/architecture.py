"""Draws docs/architecture.svg: `python docs/architecture.py`."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1180, 560
INK, MUTED = "#1f2933", "#61707f"
FILL = {"data": "#eef2f6", "frozen": "#e3eefc", "trained": "#fdebd6", "result": "#e2f4e6"}


class Drawing:
    """SVG elements, in the order in which they are painted."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def add(self, tag: str, body: str = "", **attributes: float | str) -> None:
        given = "".join(f' {name.rstrip("_").replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.parts.append(f"<{tag}{given}>{body}</{tag}>" if body else f"<{tag}{given}/>")

    def text(self, x: float, y: float, words: str, size: int = 14, color: str = INK, **more: str) -> None:
        self.add("text", escape(words), x=x, y=y, font_size=size, fill=color, **{"text_anchor": "middle", **more})

    def box(self, x: float, y: float, title: str, where: str, kind: str, width: float = 150) -> None:
        """A box of height 64 with its upper left corner at (x, y): a title and, below it, where the code is."""
        self.add("rect", x=x, y=y, width=width, height=64, rx=8, fill=FILL[kind], stroke=INK, stroke_width=1.2)
        self.text(x + width / 2, y + 28, title, font_weight="600")
        self.text(x + width / 2, y + 48, where, size=11, color=MUTED, font_family="monospace")

    def arrow(self, *points: tuple[float, float], label: str = "", dashed: bool = False) -> None:
        """An arrow through points (x, y), with a label above the middle of its first piece."""
        line = {"d": "M" + " L".join(f"{x} {y}" for x, y in points), "stroke": INK, "stroke_width": 1.4, "fill": "none"}
        self.add("path", **line, marker_end="url(#head)", **({"stroke_dasharray": "5 4"} if dashed else {}))
        (x0, y0), (x1, y1) = points[:2]
        if label:
            self.text((x0 + x1) / 2, (y0 + y1) / 2 - 7, label, size=12, color=MUTED)

    def svg(self) -> str:
        head = f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/>'
        size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"'
        font = 'font-family="Helvetica, Arial, sans-serif"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>',
                f'<defs><marker id="head" {size}>{head}</marker></defs>',
                f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def architecture() -> str:
    """The picture as SVG: training above, sampling below, the same modules in both."""
    d = Drawing()
    d.text(24, 36, "Training: python main.py", size=17, text_anchor="start", font_weight="700")
    d.box(24, 70, "batch", "ldm/data", "data", width=110)
    d.box(190, 70, "first stage, encoder", "models/autoencoder.py", "frozen", width=172)
    d.box(430, 70, "q_sample(z, t, eps)", "gaussian_diffusion.py", "data", width=176)
    d.box(682, 70, "UNet", "openaimodel.py", "trained", width=150)
    d.box(908, 70, "loss", "loss_weighting.py", "result", width=140)
    d.box(190, 174, "condition stage", "encoders/modules.py", "frozen", width=172)
    d.box(430, 174, "conditioning", "conditioning.py", "data", width=176)
    d.box(908, 174, "optimizer, EMA", "models/training.py", "trained", width=140)
    d.arrow((134, 102), (190, 102), label="image")
    d.arrow((362, 102), (430, 102), label="z")
    d.arrow((606, 102), (682, 102), label="z_t, t")
    d.arrow((832, 102), (908, 102), label="eps, x0, v")
    d.arrow((79, 134), (79, 206), (190, 206))
    d.text(132, 199, "caption, class, ...", size=12, color=MUTED)
    d.arrow((362, 206), (430, 206), label="c")
    d.arrow((606, 206), (757, 206), (757, 134))
    d.text(680, 199, "attention, concat, adm", size=11, color=MUTED)
    d.arrow((978, 134), (978, 174))
    d.arrow((908, 214), (800, 214), (800, 134), dashed=True)
    d.text(852, 231, "weights", size=12, color=MUTED)
    d.add("path", d=f"M24 282 H{WIDTH - 24}", stroke="#d5dce3", stroke_width=1)

    d.text(24, 324, "Sampling: python scripts/txt2img.py", size=17, text_anchor="start", font_weight="700")
    d.box(24, 358, "flags", "inference/cli", "data", width=110)
    d.box(190, 358, "request, checked", "inference/requests.py", "data", width=172)
    d.box(430, 358, "pipeline", "inference/pipeline.py", "frozen", width=176)
    d.box(682, 358, "sampler loop", "diffusion/samplers", "trained", width=150)
    d.box(908, 358, "first stage, decoder", "models/autoencoder.py", "frozen", width=172)
    d.box(430, 462, "condition stage", "prompt, negative prompt", "frozen", width=176)
    d.box(682, 462, "UNet, guided", "samplers/guidance.py", "trained", width=150)
    d.box(908, 462, "PNG", "ldm/output", "result", width=172)
    d.arrow((134, 390), (190, 390), label="prompt")
    d.arrow((362, 390), (430, 390), label="config")
    d.arrow((606, 390), (682, 390), label="noise")
    d.arrow((832, 390), (908, 390), label="z_0")
    d.arrow((518, 422), (518, 462))
    d.arrow((606, 494), (682, 494), label="c, uncond")
    d.arrow((740, 422), (740, 462))
    d.arrow((774, 462), (774, 422))
    d.text(806, 447, "S steps", size=12, color=MUTED)
    d.arrow((988, 422), (988, 462))
    d.text(1000, 447, "safety check, watermark", size=11, color=MUTED, text_anchor="start")
    for k, kind in enumerate(("frozen", "trained", "data", "result")):
        d.add("rect", x=800 + 92 * k, y=22, width=16, height=16, rx=3, fill=FILL[kind], stroke=INK)
        d.text(822 + 92 * k, 35, kind, size=12, color=MUTED, text_anchor="start")
    return d.svg()


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(architecture(), encoding="utf-8")
