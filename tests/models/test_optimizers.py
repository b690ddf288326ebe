"""The section `optimizer_config`: classes, groups of parameters, schedules, resume."""

import copy
import math

import pytest
import torch
from torch import nn

from ldm.config.instantiate import ConfigError
from ldm.models.optimizers import JointOptimizer
from ldm.models.training import TrainedModule
from tests.reference import randn, seed_weights

MUON, ADAFACTOR, EIGHT_BIT = "torch.optim.Muon", "torch.optim.Adafactor", "bitsandbytes.optim.AdamW8bit"
COSINE = {
    "target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {"warm_up_steps": 2, "lr_min": 0.1, "lr_max": 1.0, "lr_start": 0.5, "max_decay_steps": 8},
}


class Block(nn.Module):
    """A matrix, biases, a norm, an embedding and a convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, width)
        self.attn1, self.attn2 = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 1)

    def forward(self, ids):
        h = self.embedding(ids)  # (B, L, width)
        h = h + self.attn2(self.attn1(self.norm(h)).tanh())
        return self.conv(h.transpose(1, 2))


class Small(TrainedModule):
    def __init__(self, width: int = 8, scheduler_config=None, **options) -> None:
        super().__init__(**options)
        self.model = seed_weights(Block(width))
        self.scale = nn.Parameter(torch.ones(()))
        self.learning_rate, self.scheduler_config = 1e-2, scheduler_config


def configured(config, **options):
    """-> (model, its optimizer, its schedule or None)."""
    model = Small(optimizer_config=config, **options)
    found = model.configure_optimizers()
    if not isinstance(found, tuple):
        return model, found, None
    return model, found[0][0], found[1][0]["scheduler"]


def train(model, optimizer, schedule, steps):
    for step in steps:
        ids = torch.randint(4, (2, 5), generator=torch.Generator().manual_seed(step))
        loss = ((model.scale * model.model(ids) - randn(step, 2, model.model.conv.out_channels, 5)) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return loss.item()


def names_of(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def test_without_the_section_the_optimizer_is_the_published_one():
    model, optimizer, _ = configured(None)
    expected = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, fused=True)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.state_dict() == expected.state_dict()


def test_groups_split_the_parameters_in_their_published_order():
    groups = [{"match": r"attn2", "lr_factor": 0.1}, {"match": "attn|conv", "params": {"betas": [0.5, 0.9]}}]
    model, optimizer, _ = configured({"no_decay": True, "groups": groups, "params": {"weight_decay": 0.3}})
    found = {group["name"]: group for group in optimizer.param_groups}
    assert {name: names_of(model, group) for name, group in found.items()} == {
        "default, no decay": ["model.embedding.weight", "model.norm.weight", "model.norm.bias", "scale"],
        "attn2": ["model.attn2.weight"],
        "attn2, no decay": ["model.attn2.bias"],
        "attn|conv": ["model.attn1.weight", "model.conv.weight"],
        "attn|conv, no decay": ["model.attn1.bias", "model.conv.bias"],
    }
    for name, group in found.items():
        assert group["weight_decay"] == (0.0 if "no decay" in name else 0.3)
        assert group["lr"] == pytest.approx(1e-3 if "attn2" in name else 1e-2)
        assert group["betas"] == ((0.5, 0.9) if "|" in name else (0.9, 0.999))


@pytest.mark.parametrize("target", [None, MUON])
def test_a_schedule_keeps_the_factors_of_groups(target):
    config = {"target": target, "groups": [{"match": "attn2", "lr_factor": 0.1}]}
    model, optimizer, schedule = configured(config, scheduler_config=COSINE)
    for step in range(10):
        train(model, optimizer, schedule, [step])
        rates = {group["name"].startswith("attn2"): group["lr"] for group in optimizer.param_groups}
        assert rates[True] == pytest.approx(0.1 * rates[False]) and rates[False] == pytest.approx(
            1e-2 * schedule.lr_lambdas[0](step + 1)
        )


@pytest.mark.parametrize(
    "config",
    [
        {"no_decay": True, "groups": [{"match": "attn2", "lr_factor": 0.1}]},
        {"target": MUON, "no_decay": True, "groups": [{"match": "attn2", "lr_factor": 0.1}]},
        {"target": ADAFACTOR},
        {"target": "torch.optim.SGD", "params": {"momentum": 0.9}},
        {"target": EIGHT_BIT, "no_decay": True},
    ],
    ids=lambda config: config.get("target", "AdamW").rpartition(".")[2],
)
def test_optimizers_train_and_continue_bitwise_from_their_state(config, tmp_path):
    if config.get("target") == EIGHT_BIT:
        pytest.importorskip("bitsandbytes")
    options = {"width": 64, "scheduler_config": COSINE}
    whole = configured(config, **options)
    first, last = (train(*whole, [step]) for step in (0, 0))
    train(*whole, range(1, 6))
    assert last < first
    begun = configured(config, **options)
    train(*begun, [0, 0, 1, 2])
    model, optimizer, schedule = configured(config, **options)
    torch.save([part.state_dict() for part in begun], tmp_path / "state.pt")
    for part, state in zip((model, optimizer, schedule), torch.load(tmp_path / "state.pt", weights_only=True)):
        part.load_state_dict(state)
    train(model, optimizer, schedule, range(3, 6))
    for mine, expected in zip(model.parameters(), whole[0].parameters()):
        assert torch.equal(mine, expected)


def test_muon_takes_matrices_and_adamw_the_rest_bit_for_bit():
    options = {"weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    config = {"target": MUON, "params": {"weight_decay": 0.2}, "rest": {"params": {"betas": [0.8, 0.9]}}}
    model, optimizer, _ = configured(config)
    by_hand = copy.deepcopy(model)
    matrices = [by_hand.model.attn1.weight, by_hand.model.attn2.weight]
    rest = [p for p in by_hand.trainable_parameters() if all(p is not matrix for matrix in matrices)]
    parts = [
        torch.optim.Muon(matrices, lr=1e-2, **options),
        torch.optim.AdamW(rest, lr=1e-2, betas=(0.8, 0.9), fused=True),
    ]

    class Both:
        def step(self):
            for part in parts:
                part.step()

        def zero_grad(self):
            for part in parts:
                part.zero_grad()

    assert isinstance(optimizer, JointOptimizer)
    train(model, optimizer, None, range(4))
    train(by_hand, Both(), None, range(4))
    for mine, expected in zip(model.parameters(), by_hand.parameters()):
        assert torch.equal(mine, expected)


def test_eight_bit_states_take_a_quarter_of_the_memory():
    pytest.importorskip("bitsandbytes")

    def state_bytes(config):
        model, optimizer, _ = configured(config, width=256)
        train_once = sum((parameter**2).sum() for parameter in model.parameters())
        train_once.backward()
        optimizer.step()
        tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    assert state_bytes({"target": EIGHT_BIT}) < 0.3 * state_bytes(None)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"groups": [{"match": "atn2"}]},
            r"groups\[0\].match 'atn2': matches no trained parameter; did you mean 'attn2'",
        ),
        (
            {"groups": [{"match": "attn"}, {"match": "attn2"}]},
            r"groups\[1\].match 'attn2': all parameters .* earlier groups",
        ),
        ({"groups": [{"match": "("}]}, "not a regular expression"),
        ({"groups": [{"match": "attn2", "lr_factor": 0}]}, r"lr_factor 0: expected a number > 0"),
        ({"groups": [{"match": "attn2", "lr_factor": math.nan}]}, r"lr_factor nan: expected a number > 0"),
        ({"params": {"betas": [0.9, 0.99, 0.999]}}, r"params.betas \[.*\]: expected 2 values, such as \[0.9, 0.999\]"),
        ({"params": {"eps": math.inf}}, "params.eps inf: expected finite numbers"),
        ({"groups": [5]}, r"groups\[0\] 5: expected {match: PATTERN}"),
        ({"groups": [{"match": "attn2", "params": {"weight_decay": -1.0}}]}, "cannot be built: Invalid weight_decay"),
        ({"target": "torch.optim.SparseAdam"}, "takes sparse gradients"),
        (
            {"groups": [{"match": "attn2", "lr_facto": 1}]},
            r"groups\[0\].lr_facto: unknown key; did you mean 'lr_factor'",
        ),
        ({"groups": [{"match": "attn2", "lr": 0.1}]}, r"groups\[0\].lr: unknown key; set lr_factor"),
        ({"groups": [{"match": "attn2", "betas": 1}]}, r"arguments of the optimizer go under .*groups\[0\].params"),
        ({"params": {"lr": 1e-4}}, "params.lr: set model.base_learning_rate"),
        ({"target": MUON, "params": {"beta": 1}}, "params.beta: torch.optim.Muon takes no such argument"),
        ({"target": "torch.optim.Rprop", "no_decay": True}, "no_decay true: torch.optim.Rprop has no weight_decay"),
        ({"target": "torch.optim.lr_scheduler.LambdaLR"}, "is not an optimizer"),
        ({"target": "torch.nn.Linear"}, "is not an optimizer"),
        ({"rest": {}}, "only torch.optim.Muon leaves parameters to another"),
        (
            {"target": "torch.optim.AdamW", "params": {"betas": [2, 2]}},
            "torch.optim.AdamW cannot be built: Invalid beta",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        configured(config)
    assert "\n" not in str(error.value) and str(error.value).startswith("model.params.optimizer_config")


def test_muon_is_refused_for_a_model_without_matrices():
    model = Small(optimizer_config={"target": MUON})
    for layer in (model.model.attn1, model.model.attn2):
        layer.requires_grad_(False)
    with pytest.raises(ConfigError, match="this model has none"):
        model.configure_optimizers()


@pytest.mark.parametrize(
    "saved, loaded, named",
    [
        (None, {"target": ADAFACTOR}, "AdamW, the config's Adafactor;"),
        ({"target": ADAFACTOR}, None, "Adafactor, the config's AdamW;"),
        ({"target": MUON, "no_decay": True}, None, r"Muon \+ AdamW, the config's AdamW;"),
        (
            {"groups": [{"match": "attn1"}]},
            {"groups": [{"match": "attn2"}]},
            r"AdamW \(default; attn1\), the config's AdamW \(default; attn2\)",
        ),
    ],
)
def test_the_state_of_another_optimizer_or_of_other_groups_is_refused(saved, loaded, named):
    state = configured(saved)[1].state_dict()
    with pytest.raises(ConfigError, match=f"the checkpoint's optimizer is {named}"):
        configured(loaded)[1].load_state_dict(state)


def test_the_state_of_the_published_optimizer_fits_the_section_that_names_it():
    state = configured(None)[1].state_dict()
    configured({"target": "torch.optim.AdamW"})[1].load_state_dict(state)
