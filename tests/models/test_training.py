"""Laws that all trained modules share, on a module of two linear layers."""

import copy
import pickle
from abc import ABC
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from ldm.config.instantiate import ConfigError
from ldm.config.signature import constructor_arguments
from ldm.models.training import TrainedModule, fixed_noise, freeze
from ldm.modules.ema import EMAConfig
from ldm.util import instantiate_from_config
from tests.models.first_stages import QUIET


class Toy(TrainedModule):
    def __init__(self, width: int = 2, **weights) -> None:
        super().__init__(**weights)
        self.model = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(()))
        self.add_ema(decay=0.5)
        self.learning_rate = 0.1

    def training_step(self, batch, batch_idx):
        return self.scale * self.model(batch).square().mean()


class WithPart(Toy, ABC):
    """A foreign subclass that passes its keywords on and adds a part afterwards."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.part = nn.Linear(2, 3)


class LoadsItself(Toy):
    """A foreign subclass that takes the keyword and loads in its constructor, as in forks of the published code."""

    loads = 0

    def __init__(self, **kwargs) -> None:
        path = kwargs.pop("ckpt_path", None)
        super().__init__(**kwargs)
        self.init_from_ckpt(path)

    def init_from_ckpt(self, *args, **kwargs) -> None:
        super().init_from_ckpt(*args, **kwargs)
        self.loads += 1


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("cls", [Toy, WithPart, LoadsItself])
def test_weights_are_loaded_once_and_after_construction(cls, tmp_path):
    source = cls.__base__() if cls is LoadsItself else cls()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.ckpt")
    model = cls(ckpt_path=str(tmp_path / "a.ckpt"))
    state = source.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert getattr(model, "loads", 1) == 1 and not model.untrained_weights() and source.untrained_weights()


def test_ignored_keys_stay_and_a_file_of_the_network_alone_is_enough_if_asked_for(tmp_path):
    source = Toy()
    torch.save({"state_dict": {**source.state_dict(), "scale": torch.tensor(7.0)}}, tmp_path / "a.ckpt")
    model = Toy(ckpt_path=str(tmp_path / "a.ckpt"), ignore_keys=["scale"])
    assert model.scale == 1.0 and torch.equal(model.model.weight, source.model.weight)
    Toy.load_only_unet = True
    try:
        torch.save(source.model.state_dict(), tmp_path / "network.ckpt")
        model = Toy(ckpt_path=str(tmp_path / "network.ckpt"))
    finally:
        Toy.load_only_unet = False
    assert model.scale == 1.0 and torch.equal(model.model.weight, source.model.weight)


DIFFUSION = ("DDPM", "LatentDiffusion", "LatentInpaintDiffusion", "LatentUpscaleDiffusion", "Layout2ImgDiffusion")
FIRST_STAGES = ("AutoencoderKL", "VQModel", "VQModelInterface")
CLASSIFIER = "ldm.models.diffusion.classifier.NoisyLatentImageClassifier"
TARGETS = [f"ldm.models.diffusion.ddpm.{name}" for name in DIFFUSION]
TARGETS += [f"ldm.models.autoencoder.{name}" for name in FIRST_STAGES] + [CLASSIFIER]


@pytest.mark.parametrize("target", TARGETS)
def test_configs_may_name_initial_weights_and_misspelt_names_are_refused(target):
    accepted = set(constructor_arguments(target))
    assert {"ckpt_path", "ignore_keys"} <= accepted and ("load_only_unet" in accepted) == (".ddpm." in target)
    with pytest.raises(ConfigError, match=r"no such parameter.* did you mean 'ckpt_path'"):
        instantiate_from_config({"target": target, "params": {"ckpt_pat": "a.ckpt"}})


# --------------------------------------------------------------------------------------------------------------- frozen


def test_a_frozen_module_stays_in_eval_mode_without_gradients_even_in_copies():
    parent = nn.Sequential(freeze(nn.Sequential(nn.Dropout(), nn.Linear(2, 2))), nn.Linear(2, 2))
    names = list(parent.state_dict())
    for model in (parent, copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))):
        model.train()
        assert model.training and model[1].training and not any(module.training for module in model[0].modules())
        assert not any(p.requires_grad for p in model[0].parameters()) and list(model.state_dict()) == names
        assert model[0].eval() is model[0].train() is model[0]
    copied = copy.deepcopy(parent)
    assert copied[0].train() is copied[0] is not parent[0]


def test_the_optimizer_takes_what_has_gradients_and_own_parameters_last():
    model = Toy()
    parameters = [*model.model.parameters(), model.scale]
    assert [id(p) for p in model.trainable_parameters()] == [id(p) for p in parameters]
    model.model.requires_grad_(False)
    (group,) = model.configure_optimizers().param_groups
    assert [id(p) for p in group["params"]] == [id(model.scale)] and group["lr"] == 0.1


def test_training_without_a_learning_rate_says_so():
    model = Toy()
    model.learning_rate = None
    with pytest.raises(ValueError, match="learning_rate is not set"):
        model.configure_optimizers()


# ----------------------------------------------------------------------------------------------------- averaged weights


def test_the_ema_scope_restores_bitwise_even_when_nested_or_broken():
    model = Toy()
    average = model.model.weight.detach().clone()
    with torch.no_grad():
        model.model.weight.add_(1.0)
    trained = model.model.weight.detach().clone()
    with pytest.raises(RuntimeError), model.ema_scope():
        with model.ema_scope("inner"):
            assert torch.equal(model.model.weight, average)
        assert torch.equal(model.model.weight, average)
        raise RuntimeError
    assert torch.equal(model.model.weight, trained)
    model.use_ema = False
    with model.ema_scope():
        assert torch.equal(model.model.weight, trained)


def test_averages_move_on_optimizer_steps_not_on_micro_batches():
    model, options = Toy(), {**QUIET, "max_epochs": 1, "accumulate_grad_batches": 2}
    pl.Trainer(**options).fit(model, DataLoader(torch.ones(4, 2), batch_size=1))
    assert int(model.model_ema.num_updates) == 2


def test_averages_stand_still_if_the_scaler_skipped_the_step():
    model, scales = Toy(), iter([1024.0, 512.0, 512.0, 512.0])
    scaler = SimpleNamespace(get_scale=lambda: next(scales))
    model._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    optimizer = SimpleNamespace(step=lambda closure=None: None)
    for updates in (0, 1):
        model.optimizer_step(0, 0, optimizer, None)
        assert int(model.model_ema.num_updates) == updates


def test_in_a_new_run_the_published_average_continues_and_the_others_start_anew(tmp_path):
    class Averaged(Toy):
        def __init__(self, widths, **weights) -> None:
            super().__init__(**weights)
            self.add_ema(config=EMAConfig([{"decay": 0.5}, *({"sigma_rel": width} for width in widths)]))

    source = Averaged([0.1])
    with torch.no_grad():
        source.model.weight.add_(1.0)
    source.update_ema()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.ckpt")
    for widths in ([0.1], [0.2], [0.1, 0.2]):
        first, *others = Averaged(widths, ckpt_path=str(tmp_path / "a.ckpt")).model_ema.all_averages()
        assert torch.equal(first.weight, source.model_ema.weight) and int(first.num_updates) == 1
        for average in others:
            assert torch.equal(average.weight, source.model.weight) and int(average.num_updates) == 0


@pytest.mark.parametrize(
    "average, updates", [({"decay": 0.75}, 3), ({"decay": 0.75, "warm_up": False}, -1), ({"sigma_rel": 0.1}, 0)]
)
@pytest.mark.parametrize("saved", [{"decay": 0.5}, {"decay": 0.5, "warm_up": False}, {"sigma_rel": 0.2}])
def test_in_a_new_run_the_decay_of_the_config_holds_and_not_that_of_its_weights(saved, average, updates, tmp_path):
    class Averaged(Toy):
        def __init__(self, each) -> None:
            super().__init__()
            self.add_ema(config=EMAConfig([each]))

    source, model = Averaged(saved), Averaged(average)
    for _ in range(3):
        source.update_ema()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.ckpt")
    model.init_from_ckpt(str(tmp_path / "a.ckpt"))
    expected = max(0, int(source.model_ema.num_updates)) if updates == 3 else updates
    assert float(model.model_ema.decay) == average.get("decay", 0.0) and int(model.model_ema.num_updates) == expected


# ---------------------------------------------------------------------------------------------------------------- noise


def test_fixed_noise_is_the_same_each_time_and_disturbs_no_random_numbers():
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    with fixed_noise(5, torch.device("cpu")):
        first = torch.randn(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    with fixed_noise(5, torch.device("cpu")):
        assert torch.equal(torch.randn(3), first)
