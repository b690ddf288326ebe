"""OpenMP threads beside other processes."""

import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from ldm.machine import cores
from ldm.machine.cores import Sleepers, Use, Watch, share_cores


@pytest.fixture
def watch(monkeypatch):
    """A Watch whose sleepers are only recorded, as (threads, cores), and removed at their end."""
    alive = []

    class Recorded:
        def __init__(self, *asked):
            alive.append(asked)

        def end(self):
            alive.pop()

    monkeypatch.setattr(cores, "Sleepers", Recorded)
    watch = Watch()
    watch.alive = alive
    return watch


def test_threads_sleep_while_others_want_the_cores_that_they_use(watch):
    states = []
    for others in (0.0, 0.2, 1.0, 0.98, 0.2, 0.1, 0.25):  # of 2 cores
        watch.update(others, threads=2, cores=2)
        states.append(bool(watch.alive))
    assert states == [False, False, True, True, True, False, False]


@pytest.mark.parametrize(
    ("others", "threads", "cores", "sleep"), [(3.0, 4, 8, False), (5.0, 4, 8, True), (9.0, 1, 8, False)]
)
def test_free_cores_and_a_single_thread_need_no_sleep(watch, others, threads, cores, sleep):
    watch.update(others, threads, cores)
    assert watch.alive == ([(threads, cores)] if sleep else [])


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the cores")
def test_the_use_of_others_is_that_of_the_cores_without_this_process(watch, monkeypatch):
    seconds = iter([0.0, 2.0, 4.0])
    uses = iter([Use(10.0, 5.0), Use(14.0, 7.0), Use(16.0, 9.0)])  # in 2 s: 4 s of which 2 are own, then 2 of 2
    monkeypatch.setattr(cores.Use, "now", lambda: next(uses))
    monkeypatch.setattr(cores.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(cores.time, "sleep", lambda _: None)
    others = []
    monkeypatch.setattr(watch, "update", lambda *asked: others.append(asked))
    with pytest.raises(StopIteration):
        watch._watch()
    available = len(os.sched_getaffinity(0))
    assert others == [(1.0, torch.get_num_threads(), available), (0.0, torch.get_num_threads(), available)]


@pytest.mark.parametrize("chosen", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_environment_says_of_waiting_threads_is_kept(chosen):
    before = threading.enumerate()
    share_cores({chosen: "active"})
    assert threading.enumerate() == before


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_sleepers_are_more_openmp_threads_than_cores_until_their_end():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        python, system = threading.active_count(), len(os.listdir("/proc/self/task"))
        sleepers = Sleepers(threads=2, cores=5)
        teams = threading.active_count() - python
        added = len(os.listdir("/proc/self/task")) - system - teams  # threads of OpenMP
        sleepers.end()
        assert added >= teams and 2 + added > 5
        assert threading.active_count() == python
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_idle_time_waiting_and_niced_processes_are_no_use_of_the_cores(tmp_path):
    number = min(os.sched_getaffinity(0))
    stat = tmp_path / "stat"
    stat.write_text(f"cpu  9 9 9 9 9 9 9 9\ncpu{number} 100 70 20 9000 50 3 7 5 0 0\ncpu999 8 8 8 8 8 8 8 8\nintr 1\n")
    use = Use.now(Path(stat))
    assert use.cores == 130 / os.sysconf("SC_CLK_TCK") and use.own > 0
