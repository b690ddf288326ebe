"""The measuring scripts still run; their figures are in docs/."""

from benchmarks.watermark_survival import CHANGES, smooth, survival
from ldm.paths import ROOT


def test_the_watermarks_table_has_a_row_for_every_change_and_so_has_the_document():
    table, psnr = survival("dwtDctSvd", smooth(1))
    assert [*table] == ["no mark", *CHANGES] and psnr > 38
    assert table["PNG"] == (1.0, 1.0) and table["no mark"][0] < 0.7
    text = (ROOT / "docs" / "provenance.md").read_text(encoding="utf-8")
    assert all(text.count(f"| {name} |") == 2 for name in table)
