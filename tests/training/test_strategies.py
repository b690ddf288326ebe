"""Strategies: sharded training equals one process, its checkpoints open anywhere, no frozen weight is sent around."""

import signal
from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import nn

from ldm.checkpoint import read_checkpoint, verify_checkpoint
from ldm.checkpoint.formats import PARTS
from ldm.cli import stop_on_signals
from ldm.config.instantiate import ConfigError
from ldm.training import strategies
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.strategies import DDPStrategy, FSDPStrategy, make_strategy
from ldm.training.trainer import default_strategy
from tests.checkpoint.models import SPLIT
from tests.ranks import MODELS, largest_difference, train, train_on

KIND = "latent diffusion"
JOB = {"kind": KIND, "length": 21}
SHARDED = {**JOB, "batch_size": 4, "strategy": "fsdp"}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Records and checkpoints of one process and of two ranks, by name; 4 steps, or 2 and 2 with a resume between."""
    folder = tmp_path_factory.mktemp("strategies")
    paths = {
        name: str(folder / f"{name}.ckpt") for name in ("one", "one-2", "two", "two-2", "one-two", "two-two", "two-one")
    }
    records = {
        "one": [train(batch_size=8, steps=4, validation=5, save=paths["one"], **JOB)],
        "one-2": [train(batch_size=8, steps=2, save=paths["one-2"], **JOB)],
    }
    jobs = {
        "two": {"steps": 4, "validation": 5},
        "two-2": {"steps": 2},
        "one-two": {"steps": 4, "resume": paths["one-2"]},
        "two-two": {"steps": 4, "resume": paths["two-2"]},
    }
    sharded = train_on(2, [{**SHARDED, **job, "save": paths[name]} for name, job in jobs.items()], folder)
    records |= dict(zip(jobs, sharded))
    records["two-one"] = [train(batch_size=8, steps=4, resume=paths["two-2"], save=paths["two-one"], **JOB)]
    return records, paths


def differences(path, other):
    """Relative difference of trained weights, averages and optimizer states of two checkpoints."""
    one, two = read_checkpoint(path), read_checkpoint(other)
    assert one["global_step"] == two["global_step"] and one["state_dict"].keys() == two["state_dict"].keys()

    def values(checkpoint):
        weights = checkpoint["state_dict"]
        for prefix in ("model.", "model_ema.", "cond_stage_model."):
            yield [tensor for name, tensor in weights.items() if name.startswith(prefix)]
        yield [tensor for state in checkpoint["optimizer_states"][0]["state"].values() for tensor in state.values()]

    def flat(tensors):
        return torch.cat([tensor.double().flatten() for tensor in tensors])

    pairs = [(flat(a), flat(b)) for a, b in zip(values(one), values(two))]
    return [float((a - b).norm() / a.norm()) for a, b in pairs]


def test_sharded_ranks_train_as_one_process(runs):
    records, paths = runs
    for record in records["two"]:
        assert largest_difference(records["one"][0]["curves"], record["curves"]) < 1e-5
        assert largest_difference(records["one"][0]["validations"], record["validations"]) < 1e-5
    assert max(differences(paths["one"], paths["two"])) < 1e-5


@pytest.mark.parametrize("path", ["one-two", "two-one"])
def test_a_sharded_run_resumes_on_another_number_of_ranks(runs, path):
    records, paths = runs
    assert max(differences(paths["one"], paths[path])) < 1e-5
    before = path.split("-")[0] + "-2"
    used = Counter(tuple(sample) for record in (*records[before], *records[path]) for sample in record["samples"])
    assert set(used.values()) == {1} and {(0, index) for index in range(21)} < set(used)


def test_a_sharded_resume_is_exact(runs):
    assert max(differences(runs[1]["two"], runs[1]["two-two"])) == 0


@pytest.mark.parametrize("place", ["part", "index"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space")])
def test_an_interrupted_save_leaves_the_checkpoint_before(tmp_path, monkeypatch, place, error):
    environment, io, path = LightningEnvironment(), AtomicCheckpointIO(), tmp_path / "last.ckpt"
    strategy = FSDPStrategy(parallel_devices=[torch.device("cpu")], cluster_environment=environment, checkpoint_io=io)
    strategy.save_checkpoint({**SPLIT, "global_step": 1}, path)
    with monkeypatch.context() as patch:
        owner, name = (strategies, "write_checkpoint") if place == "part" else (io, "save_checkpoint")
        patch.setattr(owner, name, Mock(side_effect=error))
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            strategy.save_checkpoint({**SPLIT, "global_step": 2}, path)
    verify_checkpoint(path)
    assert read_checkpoint(path)["global_step"] == 1
    strategy.save_checkpoint({**SPLIT, "global_step": 3}, path)
    assert read_checkpoint(path)["global_step"] == 3
    assert [each.name.split("-")[0] for each in (tmp_path / PARTS).iterdir()] == ["3"]


def test_replicas_send_neither_frozen_weights_nor_averages():
    model = MODELS[KIND]()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        strategy = DDPStrategy(parallel_devices=[torch.device("cpu")], cluster_environment=LightningEnvironment())
        replica = strategy._setup_model(model)
        ignored = replica.parameters_to_ignore
    finally:
        dist.destroy_process_group()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in model.state_dict() if name.startswith(("first_stage_model.", "model_ema."))} <= ignored
    assert not ignored & trained and sum(map(torch.numel, replica.modules_buffers)) < 2000  # the noise schedule


@pytest.mark.parametrize(
    "name, message",
    [
        ("potato", "expected one of auto, ddp, fsdp"),
        ("fspd", "did you mean 'fsdp'"),
        ("fsdp_cpu_offload", "expected one of auto, ddp, fsdp"),
        ("deepspeed_stage_2", r'pip install -e "\.\[deepspeed\]"'),
    ],
)
def test_an_unknown_or_missing_strategy_is_refused_with_the_choices(monkeypatch, name, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        make_strategy(name)


@pytest.mark.parametrize("kind", ["autoencoder", "autoencoder with GAN"])
def test_only_diffusion_models_are_sharded(kind):
    strategy = make_strategy("fsdp")
    strategy.connect(MODELS[kind]())
    with pytest.raises(ConfigError, match="AutoencoderKL is not a diffusion model; choose ddp"):
        strategy._shard()


def test_the_state_of_more_parameters_than_there_are_is_refused_by_the_optimizer():
    saved, fewer = (torch.optim.AdamW([nn.Parameter(torch.ones(2)) for _ in range(count)]) for count in (2, 1))
    for parameter in saved.param_groups[0]["params"]:
        parameter.grad = torch.ones(2)
    saved.step()
    with pytest.raises(ValueError, match="loaded state dict"):
        FSDPStrategy.load_optimizer_state_dict(
            SimpleNamespace(optimizers=[fewer]), {"optimizer_states": [saved.state_dict()]}
        )


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_signal_ends_a_process_that_waits_for_the_others_at_the_start(name, monkeypatch):
    """It waits in C++, where a handler in Python would never run."""
    seen = []
    parent = "pytorch_lightning.strategies.DDPStrategy.setup_distributed"
    monkeypatch.setattr(parent, lambda self: seen.append(signal.getsignal(signal.SIGTERM)))
    with stop_on_signals():
        handler = signal.getsignal(signal.SIGTERM)
        make_strategy(name).setup_distributed()
        assert signal.getsignal(signal.SIGTERM) is handler
    assert seen == [signal.SIG_DFL]


def test_only_networks_that_take_turns_need_the_search_for_unused_parameters():
    def model(automatic, **loss):
        return SimpleNamespace(automatic_optimization=automatic, loss=SimpleNamespace(**loss))

    searching = "ddp_find_unused_parameters_true"
    assert default_strategy(model(True)) == "ddp"
    assert default_strategy(model(False, discriminator=object())) == searching
    assert default_strategy(model(False, discriminator=None)) == "ddp"
    assert default_strategy(SimpleNamespace(automatic_optimization=False)) == searching  # of another package
