"""Figures of cards and sweeps."""

import numpy as np
import pytest

from ldm.evaluation.figure import Section, card_figure, cell, distance_plot, even_ticks, trade_off_plot


def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_scaled_down():
    assert [cell(np.zeros((side, side, 3), np.uint8)).size[0] for side in (16, 24, 64, 100, 512)] == [
        64,
        72,
        64,
        100,
        128,
    ]


def test_a_figure_holds_every_section_and_the_plot():
    rows = [[np.full((32, 32, 3), 9, np.uint8)] * 4] * 2
    plot = distance_plot(np.array([0.1, 0.2, 0.3]), np.array([0.2]), 0.1)
    small, large = card_figure("t", [Section("a", rows)]), card_figure("t", [Section("a", rows)] * 2, plot)
    assert large.height > 2 * small.height - 40 + plot.height - 40 and large.width >= plot.width


@pytest.mark.parametrize("low, high", [(0, 1), (0.0256, 0.153), (3, 950), (5, 5)])
def test_ticks_are_a_few_round_numbers_within_the_values(low, high):
    ticks = even_ticks([low, high])
    assert 1 <= len(ticks) <= 8 and all(low <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_a_trade_off_keeps_the_order_of_its_points_if_asked():
    groups = {"ddim": [(0.9, 2.0), (0.1, 1.0), (0.5, 3.0)]}
    kept = trade_off_plot(groups, "t", "x", by_x=False)
    assert kept.size == (720, 420) and kept.tobytes() != trade_off_plot(groups, "t", "x").tobytes()


def test_a_title_is_whole_above_few_images():
    rows = [[np.zeros((32, 32, 3), np.uint8)]]
    texts = ["below each, the nearest training image", "below each, the nearest training images"]
    a, b = (card_figure("t", [Section(text, rows)]) for text in texts)
    assert a.tobytes() != b.tobytes()
