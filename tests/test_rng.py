"""Laws of restoring the random generators, on the CPU and on the device of a model."""

import random

import numpy as np
import pytest
import torch

from ldm.rng import preserve_rng, preserve_torch_rng


def numbers():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("error", [False, True])
def test_all_generators_continue_as_if_unused(error):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = numbers()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    try:
        with preserve_rng():
            assert numbers() == wanted
            random.seed(7), np.random.seed(7), torch.manual_seed(7)
            if error:
                raise RuntimeError
    except RuntimeError:
        pass
    assert numbers() == wanted


@pytest.mark.parametrize("kept", [preserve_rng, preserve_torch_rng])
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_generator_of_the_models_device_continues_as_if_unused(monkeypatch, kept, kind):
    states = {torch.device(kind, 0): torch.tensor([5])}
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(module, "set_rng_state", lambda state, device: states.update({device: state}))
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    with kept(torch.device(kind, 0)):
        torch.rand(5)
        states[torch.device(kind, 0)] = torch.tensor([6])
    assert states[torch.device(kind, 0)].tolist() == [5] and torch.equal(torch.rand(2), wanted)
