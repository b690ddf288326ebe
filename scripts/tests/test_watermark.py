"""Read the invisible watermark of a picture: python scripts/tests/test_watermark.py IMAGE [--method dwtDctSvd]."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout that this script is in, installed or not

from ldm.cli import Parser, run_command
from ldm.output.watermark import METHODS, Watermark


def parser() -> Parser:
    parser = Parser(
        prog="test_watermark.py",
        description="Print the watermark that is read out of a picture, and how much of it is there.",
    )
    parser.add_argument("image", metavar="IMAGE", help="the picture")
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="how the mark was made; the first is the published way"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    from ldm.data.image import load_image

    watermark = Watermark(opt.method)
    found = watermark.read(load_image(opt.image))
    bits = 8 * len(watermark.content)
    agree = watermark.agreement(found)
    text = found.decode("ascii", errors="backslashreplace")
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))  # where there is no mark, the bytes are any
    if agree < bits:
        print(f"{agree} of {bits} bits are those of {watermark.content.decode()}; about {bits // 2} are by chance")


if __name__ == "__main__":
    sys.exit(run_command(main))
