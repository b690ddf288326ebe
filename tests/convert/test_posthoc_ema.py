"""Post-hoc EMA against averages that were tracked (arXiv 2312.02696, section 3.2)."""

import pytest
import torch
from torch import nn

from ldm.checkpoint import read_weights, write_weights
from ldm.checkpoint.formats import CheckpointError, read_metadata
from ldm.checkpoint.snapshots import Profile, write_snapshot
from ldm.convert.posthoc_ema import combinations, inner_products, reconstruct
from ldm.modules.ema import EMAConfig, PowerEma, average_name, power_gamma
from tests.reference import randn, rel_error, seed_weights

TRACKED = (0.05, 0.07, 0.10, 0.15, 0.20)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """300 steps towards a moving target with noise, snapshots every 10 -> (folder, checkpoint, averages by width)."""
    folder = tmp_path_factory.mktemp("run")
    model = nn.Module()
    model.model = seed_weights(nn.Linear(16, 8))
    ema = EMAConfig([{"sigma_rel": 0.05}, {"sigma_rel": 0.1}]).build(model.model)
    tracked = {width: PowerEma(model.model, width) for width in TRACKED}
    for step in range(1, 301):
        with torch.no_grad():
            target = torch.linspace(0, 1, 8)[:, None] * step / 300
            model.model.weight.lerp_(target + randn(step, 8, 16), 0.05)
        for average in (*ema.all_averages(), *tracked.values()):
            average(model.model)
        if step % 10 == 0:
            powers = {average_name("sigma_rel", each.width): each for each in ema.all_averages()}
            shadows = {name: dict(each.named_buffers(recurse=False)) for name, each in powers.items()}
            shadows = {name: {key: each[key] for key in ("weight", "bias")} for name, each in shadows.items()}
            profiles = {name: Profile(each.width, each.time) for name, each in powers.items()}
            write_snapshot(folder, step, shadows, profiles)
    model.model_ema = ema
    write_weights(model.state_dict(), folder / "last.ckpt")
    return folder, folder / "last.ckpt", {width: each.get_buffer("weight") for width, each in tracked.items()}


def test_reconstructed_averages_are_those_that_were_tracked(training, tmp_path):
    folder, ckpt, tracked = training
    done = reconstruct(folder, ckpt, {width: tmp_path / f"{width}.safetensors" for width in TRACKED})
    for each in done:
        weights = read_weights(each.path)
        assert set(weights) == {"model.weight", "model.bias"}
        expected = tracked[each.sigma_rel]
        assert rel_error(weights["model.weight"], expected) < 1e-3 and each.error < 0.01
        others = [value for width, value in tracked.items() if width != each.sigma_rel]
        assert all(rel_error(value, expected) > 0.01 for value in others)


def test_an_average_may_end_before_the_training_does(training, tmp_path):
    folder, ckpt, _ = training
    (done,) = reconstruct(folder, ckpt, {0.1: tmp_path / "a.safetensors"}, until=155)
    expected = read_weights(folder / "step=000000150.safetensors")["sigma_rel_0_1.weight"]
    assert rel_error(read_weights(done.path)["model.weight"], expected) < 1e-3
    expected = {"average": "sigma_rel 0.1", "step": "150", "end": "150", "run": folder.parent.name}
    assert read_metadata(done.path) == expected


def test_a_file_of_the_same_run_step_and_width_is_kept_and_any_other_refused(training, tmp_path):
    folder, ckpt, _ = training
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    reconstruct(folder, ckpt, {0.1: a}, until=150)
    before = a.stat().st_mtime_ns
    done = reconstruct(folder, ckpt, {0.1: a, 0.2: b}, until=150)
    assert [each.kept for each in done] == [True, False] and a.stat().st_mtime_ns == before and b.exists()
    for width, until in ((0.1, 140), (0.15, 150)):
        with pytest.raises(ValueError, match=r"a.safetensors: exists, of another run, step or width"):
            reconstruct(folder, ckpt, {width: a}, until=until)


def test_a_profile_far_from_the_one_asked_for_is_a_warning(training, tmp_path, caplog):
    folder, ckpt, _ = training
    (done,) = reconstruct(folder, ckpt, {0.01: tmp_path / "a.safetensors"}, until=10)
    assert done.error > 0.1 and "sigma_rel 0.01: the nearest profile has a relative error of" in caplog.text


def test_a_stored_profile_is_reconstructed_from_itself_alone():
    profiles = [Profile(width, time) for time in (10, 20, 30) for width in (0.05, 0.1)]
    factors, (error,) = combinations(profiles, [Profile(0.1, 30)])
    x = factors[:, 0]
    assert error < 1e-6 and x[-1] == pytest.approx(1.0, abs=1e-6) and abs(x[:-1]).max() < 1e-6


def test_inner_products_are_integrals_of_the_profiles():
    profiles = [Profile(0.05, 7), Profile(0.1, 10), Profile(0.2, 3)]
    t = torch.arange(0, 10, 1e-3, dtype=torch.float64) + 5e-4
    values = []
    for width, time in profiles:
        gamma = power_gamma(width)
        values.append((gamma + 1) / time * (t / time) ** gamma * (t <= time))
    expected = torch.stack([torch.stack([(a * b).sum() * 1e-3 for b in values]) for a in values])
    torch.testing.assert_close(torch.from_numpy(inner_products(profiles, profiles)), expected, rtol=1e-5, atol=0.0)


def test_runs_without_snapshots_are_refused(training, tmp_path):
    with pytest.raises(CheckpointError, match=r"no snapshots: train with model.params.ema_config.snapshot_every"):
        reconstruct(tmp_path, training[1], {0.1: tmp_path / "a.safetensors"})
    with pytest.raises(ValueError, match=r"sigma_rel 0.3: choose a number between 0 and 0.28"):
        reconstruct(training[0], training[1], {0.3: tmp_path / "a.safetensors"})
