"""Pairs of timings and their statistics."""

import sys

import pytest
import torch

from benchmarks.measure import Sample, Work, flop_counter, in_child, in_process, measure, parity, statistics


def work(ours, theirs, **options):
    return Work(
        "a row", "step", 1.0, *(side if callable(side) else (lambda s=side: s) for side in (ours, theirs)), **options
    )


def test_ratios_are_those_of_pairs_and_not_of_medians():
    pairs = [
        (Sample(1.0, 1.0), Sample(2.0, 1.0)),
        (Sample(30.0, 1.0), Sample(20.0, 1.0)),
        (Sample(9.0, 1.0), Sample(3.0, 1.0)),
    ]
    result = statistics(pairs, per=2.0)
    assert result["ratio"]["median"] == 1.5  # 0.5, 1.5, 3; the ratio of the medians is 3
    assert result["ours"]["median"] == 4.5 and result["theirs"]["median"] == 1.5  # of a unit


@pytest.mark.parametrize(("exact", "changed"), [(True, 1 + 2e-4), (False, 1.2)])
def test_a_row_whose_outputs_differ_is_void(exact, changed):
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    row = measure(work(Sample(1.0, 1.0, x), Sample(1.0, 1.0, x * changed), exact=exact), 3, 10.0)
    assert "void" in row and "ratio" not in row
    row = measure(work(Sample(1.0, 1.0, x), Sample(1.0, 1.0, x * (1 + 1e-6)), exact=exact), 3, 10.0)
    assert row["ratio"]["median"] == 1.0 and row["pairs"] == 3


def test_a_later_pair_that_differs_voids_the_row():
    outputs = iter([torch.ones(4), torch.zeros(4)])
    row = measure(work(lambda: Sample(1.0, 1.0, next(outputs)), Sample(1.0, 1.0, torch.ones(4))), 5, 10.0)
    assert "void" in row


NAN, INFINITE = (torch.full((4,), value) for value in (torch.nan, torch.inf))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("ours", [NAN, INFINITE, torch.ones(5), None])
def test_outputs_that_are_not_finite_or_of_another_shape_never_pass(ours, exact):
    assert not parity(ours, torch.arange(4.0), exact)["passed"] and not parity(ours, NAN, exact)["passed"]
    assert not parity(INFINITE, INFINITE, exact)["passed"]


def test_the_side_that_begins_alternates_after_a_first_pair_that_is_not_timed():
    calls = []
    sides = (lambda name=name: calls.append(name) or Sample(1.0, 1.0) for name in ("ours", "theirs"))
    assert measure(work(*sides, compared=False), 3, 10.0)["pairs"] == 3
    assert [calls[k : k + 2] for k in range(2, 8, 2)] == [["ours", "theirs"], ["theirs", "ours"], ["ours", "theirs"]]


def test_operations_of_attention_on_a_cpu_are_counted():
    q = torch.randn(1, 2, 16, 8)
    with flop_counter() as counter, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * (2 * 2 * 16 * 16 * 8)  # two products of 2 heads


def test_a_child_that_fails_is_an_error_and_its_own_timing_counts():
    with pytest.raises(RuntimeError, match="exit code 3"):
        in_child([sys.executable, "-c", "raise SystemExit(3)"])()
    sample = in_child([sys.executable, "-c", 'print(\'{"seconds": 0.5, "cpu_seconds": 0.25}\')'])()
    assert (sample.seconds, sample.cpu_seconds) == (0.5, 0.25) and sample.peak_bytes > 1e6


def test_a_call_in_this_process_is_timed_with_its_output():
    sample = in_process(lambda: torch.ones(2), torch.device("cpu"))()
    assert sample.seconds > 0 and sample.peak_bytes is None and torch.equal(sample.output, torch.ones(2))
