"""Plots of a sweep."""

from types import SimpleNamespace

from ldm.evaluation import sweep
from ldm.evaluation.card import Card, Metric
from ldm.evaluation.plan import Point


def card(fid: float, **metrics: float) -> Card:
    found = {"fid": Metric(fid), **{name: Metric(value) for name, value in metrics.items()}}
    return Card("samples", "a", "b", found, {}, seconds={"per sample": 0.5})


def test_a_point_without_a_value_is_not_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(sweep, "trade_off_plot", lambda groups, *others, **options: drawn.append(dict(groups)))
    points = [Point({"scale": scale}, SimpleNamespace()) for scale in (1.0, 2.0)]
    cards = [card(3.0, recall=0.5), card(4.0)]
    sweep.trade_off(points, cards, "scale", lambda each: sweep.value_of(each, "recall"), "recall")
    assert drawn == [{"samples": [(0.5, 3.0)]}]
    assert sweep.trade_off(points, cards, "scale", lambda each: sweep.value_of(each, "psnr"), "PSNR") is None
    assert len(drawn) == 1
