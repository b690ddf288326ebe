"""Laws of the learning-rate schedules. The published implementation's values: golden/numerics/lr_schedules.npz."""

import numpy as np
import pytest
import torch

from ldm.config.instantiate import ConfigError, instantiate_from_config
from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2
from tests.reference import GOLDEN, TOLERANCE, rel_error

TWO_CYCLES = ([10, 5], [0.1, 0.2], [1.0, 0.7], [1e-3, 1e-2], [100, 200])  # warm-up, f_min, f_max, f_start, length
SCHEDULES = {
    "warmup_cosine": LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 1e-3, 300),
    "warmup_cosine2": LambdaWarmUpCosineScheduler2(*TWO_CYCLES),
    "linear": LambdaLinearScheduler(*TWO_CYCLES),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_agrees_with_the_published_values(name):
    reference = np.load(GOLDEN / "numerics/lr_schedules.npz")
    assert rel_error(np.array([SCHEDULES[name](int(step)) for step in reference["steps"]]), reference[name]) < TOLERANCE


@pytest.mark.parametrize("name", SCHEDULES)
def test_gives_plain_floats_between_start_and_maximum(name):
    values = [SCHEDULES[name](n) for n in range(400)]
    assert all(type(value) is float for value in values)
    assert min(values) == pytest.approx(1e-3) and max(values) <= 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_stays_at_its_minimum_after_the_last_cycle(name):
    schedule = SCHEDULES[name]
    assert schedule(300) == schedule(10_000) == pytest.approx(0.1 if name == "warmup_cosine" else 0.2)


def test_numpy_arguments_leave_no_trace():
    schedule = LambdaLinearScheduler(*(np.array(values) for values in TWO_CYCLES))
    assert type(schedule(np.int64(3))) is float and type(schedule(np.int64(70))) is float


def test_its_state_in_a_checkpoint_is_plain(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES["warmup_cosine"].schedule)
    for _ in range(12):
        optimizer.step()
        scheduler.step()
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["_last_lr"] == [0.5 * SCHEDULES["warmup_cosine"](12)]


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"'f_min': 1"):
        LambdaLinearScheduler([10, 5], [0.1], [1.0, 0.7], [1e-3, 1e-2], [100, 200])


def test_a_warm_up_longer_than_its_cycle_is_refused():
    with pytest.raises(ValueError, match=r"200.*cycle length 100"):
        LambdaLinearScheduler([200], [0.1], [1.0], [1e-3], [100])


def test_logs_at_its_interval(caplog):
    schedule = LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 1e-3, 300, verbosity_interval=5)
    with caplog.at_level("INFO", logger="ldm.lr_scheduler"):
        for n in range(11):
            schedule(n)
    assert len(caplog.records) == 3


def test_a_multiplier_is_finite_and_not_negative_in_a_config():
    params = {"warm_up_steps": [1], "f_min": [0.0], "f_max": [-1.0], "f_start": [0.0], "cycle_lengths": [9]}
    with pytest.raises(ConfigError, match=r"params\.f_max \[-1\.0\]: expected a list \(each item: a number >= 0\)"):
        instantiate_from_config({"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": params})
