"""The registry: what the classes say, read without torch."""

import dataclasses
import subprocess
import sys

import pytest

from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.registry import SAMPLERS, SamplerEntry, make_sampler
from tests.models.diffusion.samplers.toy import SHAPE, ToyModel


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_entry_is_what_the_class_says(name):
    sampler, entry = make_sampler(name, ToyModel()), dataclasses.asdict(SAMPLERS[name])
    assert entry.pop("target") == f"{type(sampler).__module__}.{type(sampler).__name__}"
    assert entry == {key: getattr(sampler, key) for key in entry}


def test_eta_and_noise_are_those_of_the_papers():
    assert {name for name, entry in SAMPLERS.items() if entry.takes_eta} == {"ddim", "euler_ancestral", "dpmpp_2m_sde"}
    noisy = {"ancestral", "euler_ancestral", "dpmpp_2m_sde", "lcm"}
    assert {name: entry.default_eta for name, entry in SAMPLERS.items()} == {
        name: float(name in noisy) for name in SAMPLERS
    }
    assert {name for name, entry in SAMPLERS.items() if entry.adds_noise} == noisy | {"ddim"}


def test_it_is_read_without_torch():
    code = "import sys, ldm.models.diffusion.samplers.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_line_adds_a_sampler(tmp_path, monkeypatch):
    (tmp_path / "jump.py").write_text(
        "from ldm.models.diffusion.samplers.ddim import DDIMSampler\n\n"
        "class JumpSampler(DDIMSampler):\n"
        '    spacings = ("trailing",)\n'
        "    takes_eta = False\n\n"
        "    def step(self, x, k, run):\n"
        "        _, x0 = run.predict(x, k)\n"
        "        return x0, x0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SAMPLERS, "jump", SamplerEntry.of("jump.JumpSampler"))
    assert "jump" not in sys.modules
    assert SAMPLERS["jump"] == SamplerEntry("jump.JumpSampler", ("trailing",), 0.0, False, True, False)
    sampler = make_sampler("jump", ToyModel("x0"))
    assert isinstance(sampler, Sampler)
    x, inter = sampler.sample(3, 1, SHAPE, 0.0, ddim_discretize="trailing", verbose=False)
    assert x is inter["pred_x0"][-1]


def test_an_unknown_sampler_lists_the_choices():
    with pytest.raises(ValueError, match="unknown sampler 'dimm': choose one of ddim, plms"):
        make_sampler("dimm", ToyModel())
