"""Laws of captions, grids and label maps."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from ldm.visualize import Curve, _wrap, grid, labels_to_rgb, palette, plot, text_image, to_image


def solid(color: int, width: int = 8, height: int = 8) -> Image.Image:
    return Image.new("RGB", (width, height), (color, color, color))


def has_ink(image: Image.Image, box: tuple[int, int, int, int]) -> bool:
    return bool((np.asarray(image.crop(box)) < 128).any())


def test_text_image_has_the_size_asked_for_and_each_item_on_its_own_line():
    image = text_image((200, 60), ["first", "second"], font_size=12)
    assert image.size == (200, 60) and image.mode == "RGB"
    line = round(1.3 * 12)
    assert has_ink(image, (0, 0, 200, line)) and has_ink(image, (0, line + 2, 200, 2 * line + 2))
    assert not has_ink(image, (0, 3 * line, 200, 60))


def test_text_wraps_within_the_width_and_ends_in_dots_if_it_is_too_long():
    font = ImageFont.load_default(12)
    rows = _wrap("a painting of a virus monster playing guitar " * 3, font, 120, 2)
    assert len(rows) == 2 and rows[-1].endswith("...") and all(font.getlength(row) <= 120 for row in rows)
    assert all(font.getlength(row) <= 50 for row in _wrap("x" * 100, font, 50, 99))
    assert "".join(_wrap("x" * 100, font, 50, 99)) == "x" * 100


@pytest.mark.parametrize(
    "text", ["", "\n\n", "x" * 10_000, "日本語 🎨 prompt", "Zürich \u2013 “quoted”", "tab\tand\x00null"]
)
def test_any_caption_can_be_rendered(text):
    assert text_image((64, 32), text).size == (64, 32)
    assert grid([solid(0), solid(255)], [text, "b"]).width > 0


def test_accents_are_folded_to_letters_that_the_font_has():
    assert _wrap("Zürich \u2013 déjà", ImageFont.load_default(12), 500, 1) == ["Zurich - deja"]


@pytest.mark.parametrize("columns, padding, n", [(3, 2, 6), (4, 2, 6), (2, 0, 3), (9, 5, 2)])
def test_a_grid_without_captions_has_the_layout_of_make_grid(columns, padding, n):
    images = torch.rand(n, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sheet = np.asarray(grid(images, columns=columns, padding=padding, background="black"))
    per_row = min(columns, n)
    assert sheet.shape == (-(-n // per_row) * (5 + padding) + padding, per_row * (7 + padding) + padding, 3)
    for k in range(n):
        x, y = padding + k % per_row * (7 + padding), padding + k // per_row * (5 + padding)
        assert np.array_equal(sheet[y : y + 5, x : x + 7], np.asarray(to_image(images[k])))


def test_a_single_image_is_its_own_grid():
    assert grid([solid(9)], columns=3).size == (8, 8)


def test_a_caption_is_written_below_its_own_image():
    sheet = grid([solid(200, 64, 64)] * 4, ["", "here", "", ""], columns=2, padding=4)
    top = 4 + 64 + 2
    assert has_ink(sheet, (72, top, 136, top + 20)) and not has_ink(sheet, (0, top, 68, top + 20))


def test_images_of_different_sizes_are_centered_in_equal_cells():
    sheet = grid([solid(10, 4, 4), solid(20, 8, 6)], columns=2, padding=0)
    assert (
        sheet.size == (16, 6) and sheet.getpixel((2, 1)) == (10, 10, 10) and sheet.getpixel((0, 0)) == (255, 255, 255)
    )


def test_values_are_rounded_not_truncated_and_kept_in_range():
    values = torch.tensor([-5.0, -1.0, 0.996 / 127.5 - 1, 1.0, 7.0]).reshape(1, 1, 5)
    assert np.asarray(to_image(values))[0, :, 0].tolist() == [0, 0, 1, 255, 255]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: grid([]), "at least one image"),
        (lambda: grid([solid(0)] * 2, ["a"]), "1 captions for 2 images"),
        (lambda: grid([solid(0)] * 2, columns=0), "columns 0"),
        (lambda: text_image((0, 5), "a"), r"size \(0, 5\)"),
        (lambda: to_image(torch.zeros(4, 8, 8)), r"\(4, 8, 8\)"),
        (lambda: to_image(np.zeros((8, 8, 3), np.float32)), "float32"),
        (lambda: labels_to_rgb(torch.tensor([[[5]]]), n_labels=3), r"0\.\.2"),
        (lambda: labels_to_rgb(torch.zeros(1, 2, 2)), "float32"),
    ],
)
def test_invalid_arguments_are_refused_with_the_value(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_labels_get_one_color_each_the_same_in_every_map_and_form():
    labels = torch.arange(24).reshape(1, 4, 6)
    rgb = labels_to_rgb(labels, 24)
    assert rgb.shape == (1, 3, 4, 6) and rgb.min() >= -1 and rgb.max() <= 1
    assert len({tuple(c) for c in palette(24).tolist()}) == 24
    one_hot = torch.nn.functional.one_hot(labels, 24).permute(0, 3, 1, 2).float()
    assert torch.equal(labels_to_rgb(one_hot), rgb)
    assert torch.equal(labels_to_rgb(labels[:, :1], 24), rgb[:, :, :1])


def test_a_plot_has_its_curves_colors_at_the_points_and_survives_values_without_a_logarithm():
    points = [(-2.0, 0.1), (0.0, 0.3), (2.0, 1.0)]
    image = np.asarray(plot([Curve(points, "a", (200, 0, 0))], "title", "x", (0.1, 1.0), size=(300, 200)))
    red = np.argwhere((image[..., 0] > 150) & (image[..., 1] < 60))
    inside = red[red[:, 1] < 200]  # not the legend
    rows = [inside[inside[:, 1] == column, 0].mean() for column in (inside[:, 1].min() + 2, inside[:, 1].max() - 2)]
    assert image.shape == (200, 300, 3) and rows[0] > 130 and rows[1] < 60  # the larger value is higher
    broken = [(0.0, math.nan), (1.0, 0.0), (2.0, math.inf)]
    assert plot([Curve(broken, "b", (0, 0, 0)), Curve([], "c", (0, 0, 0))], "title", "x", (math.nan, 0.0)).size == (
        560,
        400,
    )
