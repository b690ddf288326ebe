"""The benchmarks run; their results are in docs/."""

from benchmarks.watermark_survival import CHANGES, smooth, survival
from ldm.paths import ROOT


def test_the_watermark_table_and_its_document_have_a_row_for_every_change():
    table, psnr = survival("dwtDctSvd", smooth(1))
    assert [*table] == ["no mark", *CHANGES] and psnr > 38
    assert table["PNG"] == (1.0, 1.0) and table["no mark"][0] < 0.7
    text = (ROOT / "docs" / "provenance.md").read_text(encoding="utf-8")
    assert all(text.count(f"| {name} |") == 2 for name in table)
