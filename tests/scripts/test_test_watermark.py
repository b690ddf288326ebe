"""scripts/tests/test_watermark.py as a user runs it."""

import numpy as np
import pytest
from PIL import Image

from ldm.cli import run_command
from ldm.output.images import GeneratedImage, Output
from ldm.output.watermark import METHODS, Watermark
from ldm.paths import ROOT
from scripts.tests.test_watermark import main
from tests.scripts.refusals import help_without_heavy_imports, refused


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("method", METHODS)
def test_the_mark_of_a_sample_is_printed(tmp_path, method, capsys):
    path = Output(tmp_path, Watermark(method)).save_sample(GeneratedImage(noise(512), {}))
    assert run_command(main, [str(path), "--method", method]) == 0
    assert capsys.readouterr().out == "StableDiffusionV1\n"


def test_an_image_without_mark_says_how_little_of_it_is_there(tmp_path, capsys):
    noise(512).save(tmp_path / "a.png")
    assert run_command(main, [str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    last = out.splitlines()[-1]
    assert int(last.split()[0]) < 110 and "of 136 bits match" in last


def test_images_too_small_for_a_mark_and_missing_files_are_refused(tmp_path, capsys):
    noise(64).save(tmp_path / "a.png")
    assert "64x64 pixels: a watermark needs" in refused(main, [str(tmp_path / "a.png")], capsys)
    assert "nowhere.png: no such file" in refused(main, ["nowhere.png"], capsys)


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "IMAGE" in help_without_heavy_imports(ROOT / "scripts" / "tests" / "test_watermark.py", tmp_path)
