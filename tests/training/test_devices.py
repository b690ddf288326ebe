"""`--gpus`, `accelerator` and `devices` against the machine."""

import pytest

from ldm.config.instantiate import ConfigError
from ldm.training.devices import Machine, choose_devices

NO_GPU, TWO_GPUS = Machine(), Machine(2)


@pytest.mark.parametrize(
    "settings, machine, accelerator, devices, count",
    [
        ({"gpus": "0,1"}, TWO_GPUS, "cuda", [0, 1], 2),
        ({"gpus": "1,"}, TWO_GPUS, "cuda", [1], 1),
        ({"gpus": "2"}, TWO_GPUS, "cuda", [0, 1], 2),
        ({"gpus": 1}, TWO_GPUS, "cuda", [0], 1),
        ({"gpus": [1]}, TWO_GPUS, "cuda", [1], 1),
        ({"gpus": -1}, TWO_GPUS, "cuda", [0, 1], 2),
        ({"gpus": "0"}, TWO_GPUS, "cpu", 1, 1),
        ({"gpus": "0,"}, Machine(1, "mps"), "mps", [0], 1),
        ({}, NO_GPU, "cpu", 1, 1),
        ({}, TWO_GPUS, "cuda", [0], 1),
        ({"accelerator": "auto"}, Machine(1, "mps"), "mps", [0], 1),
        ({"accelerator": "gpu", "devices": 2}, TWO_GPUS, "cuda", [0, 1], 2),
        ({"accelerator": "gpu", "devices": "auto"}, TWO_GPUS, "cuda", [0, 1], 2),
        ({"accelerator": "gpu", "devices": "1,"}, TWO_GPUS, "cuda", [1], 1),
        ({"accelerator": "cpu", "devices": 2}, TWO_GPUS, "cpu", 2, 2),
        ({"gpus": "0,1", "accelerator": "gpu"}, TWO_GPUS, "cuda", [0, 1], 2),
    ],
)
def test_a_comma_means_indices_and_a_bare_number_a_count(settings, machine, accelerator, devices, count):
    chosen = choose_devices(settings, machine)
    assert (chosen.accelerator, chosen.devices, chosen.processes) == (accelerator, devices, count)


@pytest.mark.parametrize(
    ("settings", "machine", "name"),
    [
        ({"gpus": "1,"}, TWO_GPUS, "cuda:1"),
        ({"gpus": "2"}, TWO_GPUS, "cuda:0"),
        ({"gpus": "0,"}, Machine(1, "mps"), "mps"),
        ({"gpus": "0"}, TWO_GPUS, "cpu"),
    ],
)
def test_the_first_device_is_one_that_was_asked_for(settings, machine, name):
    assert choose_devices(settings, machine).first == name


@pytest.mark.parametrize(
    "settings, machine, message",
    [
        ({"gpus": "0,2"}, TWO_GPUS, "--gpus 0,2: no GPU 2; this machine has 2 GPUs"),
        ({"gpus": "0,"}, NO_GPU, "--gpus 0,: no GPU 0; this machine has no GPU"),
        ({"gpus": "3"}, TWO_GPUS, "--gpus 3: this machine has 2 GPUs"),
        ({"gpus": "-1"}, NO_GPU, "this machine has no GPU"),
        ({"gpus": "0,0"}, TWO_GPUS, "given twice"),
        ({"gpus": "all"}, TWO_GPUS, "--gpus all: expected indices"),
        ({"gpus": "0,", "devices": 2}, TWO_GPUS, "one setting only"),
        ({"accelerator": "gpu"}, NO_GPU, "--accelerator gpu: this machine has no GPU"),
        ({"accelerator": "cpu", "devices": "0,1"}, NO_GPU, "number of processes"),
    ],
)
def test_missing_devices_are_refused_in_one_line(settings, machine, message):
    with pytest.raises(ConfigError, match=message) as error:
        choose_devices(settings, machine)
    assert "\n" not in str(error.value)
