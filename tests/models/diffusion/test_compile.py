"""A network compiled in place."""

import shutil
import sys

import pytest
import torch
from torch import nn

from ldm.config.instantiate import ConfigError
from ldm.models.diffusion import compile
from ldm.models.diffusion.compile import check_compiler, compile_for_sampling, compile_network


def test_a_compiled_network_keeps_its_keys_and_output():
    network, x = nn.Sequential(nn.Linear(3, 4), nn.SiLU()), torch.ones(2, 3)
    keys, eager = list(network.state_dict()), network(x)
    compile_network(network, "eager", fullgraph=True)
    assert list(network.state_dict()) == keys and torch.equal(network(x), eager)


@pytest.mark.parametrize(
    "device, options",
    [("cuda", {"triton.cudagraphs": True}), ("cpu", {"freezing": True}), ("mps", {"freezing": False})],
)
def test_sampling_compiles_for_fixed_sizes_and_weights(monkeypatch, device, options):
    network, calls = nn.Linear(3, 4), []
    monkeypatch.setattr(compile, "check_compiler", lambda *args: None)
    monkeypatch.setattr(network, "compile", lambda **given: calls.append(given))
    compile_for_sampling(network, "inductor", device)
    assert calls == [{"backend": "inductor", "dynamic": False, "options": options}]


def test_a_python_without_support_is_an_error_of_one_line(monkeypatch):
    network = nn.Linear(3, 4)

    def compile(**options):
        raise RuntimeError("not supported on\nthis Python")

    monkeypatch.setattr(network, "compile", compile)
    with pytest.raises(ConfigError, match=r"^--compile eager: not supported on this Python; remove the flag$"):
        compile_network(network, "eager")


@pytest.mark.parametrize("device, needs", [("cpu", r"a C\+\+ compiler"), ("cuda", "triton")])
def test_inductor_is_refused_without_what_compiles_its_code(monkeypatch, device, needs):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match=f"^--compile inductor: needs {needs}"):
        check_compiler("inductor", device)
    check_compiler("aot_eager", device)


def test_a_compiler_named_by_the_environment_is_found(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "my-c++" else None)
    monkeypatch.setenv("CXX", "my-c++")
    check_compiler("inductor", "cpu")
