"""Read the invisible watermark of an image: python scripts/tests/test_watermark.py IMAGE [--method dwtDctSvd]."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this script's checkout, installed or not

from ldm import inference
from ldm.cli import Parser, run_command
from ldm.output.watermark import METHODS, Watermark


def parser() -> Parser:
    text = "Print the watermark that is decoded from an image and, if bits are wrong, how many are right."
    parser = Parser(prog="test_watermark.py", description=text)
    add = parser.add_argument
    add("image", metavar="IMAGE", help="the image file")
    add(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="the method that embedded it; the first is the published one",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    watermark = Watermark(opt.method)
    found = watermark.read(inference.load_image(opt.image))
    bits, agree = 8 * len(watermark.content), watermark.agreement(found)
    text = found.decode("ascii", errors="backslashreplace")  # arbitrary bytes without a watermark
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
    if agree < bits:
        print(f"{agree} of {bits} bits match {watermark.content.decode()}; about {bits // 2} match by chance")


if __name__ == "__main__":
    sys.exit(run_command(main))
