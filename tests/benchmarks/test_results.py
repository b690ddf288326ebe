"""Results of a run, and the page that is made from them."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import results
from benchmarks.measure import Sample, Work
from benchmarks.report import read_results, write_report
from benchmarks.results import Results, floor_percent, seconds

ENVIRONMENT = {"machine": "Two Cores (test)", "torch": "1"}
MODELS: Any = SimpleNamespace(size="full", device=torch.device("cpu"))


@pytest.fixture
def rows(monkeypatch):
    """Rows `good`, `void`, `broken` and `killed` in place of the real ones."""

    def work(theirs):
        return Work(
            "what it is", "step", 2.0, lambda: Sample(1.0, 1.0, torch.ones(3)), lambda: Sample(4.0, 1.0, theirs)
        )

    def broken(models):
        raise RuntimeError("CUDA out of memory\nmore")

    def killed(models):
        raise KeyboardInterrupt

    every = {"good": lambda _: work(torch.ones(3)), "void": lambda _: work(torch.arange(3.0))}
    monkeypatch.setattr(results, "ROWS", {**every, "broken": broken, "killed": killed})


@pytest.mark.usefixtures("rows")
def test_a_run_that_is_cut_short_keeps_its_rows(tmp_path):
    run = Results(ENVIRONMENT, tmp_path)
    lines = [run.row(name, MODELS, 2, 10.0, 60.0) for name in ("good", "void", "broken")]
    with pytest.raises(KeyboardInterrupt):
        run.row("killed", MODELS, 2, 10.0, 60.0)
    saved = json.loads(run.path.read_text())
    assert [*saved["rows"]] == ["good", "void", "broken"] and saved["environment"] == ENVIRONMENT
    assert "ratio 0.250" in lines[0] and "void" in lines[1] and "CUDA out of memory" in lines[2] and run.failed


@pytest.mark.usefixtures("rows")
def test_a_second_run_of_the_day_adds_rows_unless_the_environment_changed(tmp_path):
    Results(ENVIRONMENT, tmp_path).row("good", MODELS, 1, 10.0, 60.0)
    assert [*Results(ENVIRONMENT, tmp_path).rows] == ["good"]
    other = Results({**ENVIRONMENT, "torch": "2"}, tmp_path)
    assert not other.rows and not other.path.exists()


@pytest.mark.usefixtures("rows")
def test_no_row_begins_after_the_time_of_the_run(tmp_path):
    run = Results(ENVIRONMENT, tmp_path)
    assert "skipped" in run.row("good", MODELS, 1, 10.0, -1.0) and not run.rows


@pytest.mark.usefixtures("rows")
def test_the_page_is_made_from_the_files_alone(tmp_path):
    run = Results(ENVIRONMENT, tmp_path)
    for name in ("good", "void"):
        run.row(name, MODELS, 2, 10.0, 60.0)
    page, plot = tmp_path / "page.md", tmp_path / "page.svg"
    page.write_text("before\n<!-- results: python -m benchmarks report -->\nold\n<!-- end of results -->\nafter\n")
    write_report(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "**0.25**" in text and "Two Cores (test)" in text and "void: the outputs differ" in text
    assert plot.read_text().count("<circle") == 1  # a void row has no point


@pytest.mark.usefixtures("rows")
def test_of_two_days_the_newer_row_counts(tmp_path):
    run = Results(ENVIRONMENT, tmp_path)
    run.row("good", MODELS, 1, 10.0, 60.0)
    old = json.loads(run.path.read_text())
    old["rows"]["good"] |= {"what": "old", "time": "1999-12-31 00:00:00"}
    old["rows"]["earlier"] = old["rows"]["good"]
    (tmp_path / "two-cores-test-1999-12-31.json").write_text(json.dumps(old))
    found = {row.name: row.row["what"] for row in read_results(tmp_path)}
    assert found == {"good": "what it is", "earlier": "old"}


def test_the_floor_is_the_time_of_the_operations_at_the_peak():
    assert floor_percent({"flop": 3e12, "peak_flops": 1e12, "ours": {"median": 6.0}}) == 50.0
    assert floor_percent({"flop": 0, "ours": {"median": 1.0}}) is None


@pytest.mark.parametrize(("value", "text"), [(5.6, "5.6 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 us"), (3e-8, "0.03 us")])
def test_times_have_three_digits_and_a_unit(value, text):
    assert seconds(value) == text
