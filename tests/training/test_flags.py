"""The command line of main.py."""

import inspect
from pathlib import Path

import pytest
import pytorch_lightning as pl

from ldm.config.merge import merge
from ldm.config.signature import constructor_arguments
from ldm.config.trainer_keys import trainer_keys
from ldm.config.validate import check_config
from ldm.training.flags import EPILOG, RunOptions, parse
from ldm.util import get_obj_from_str

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


def refused(words, capsys) -> str:
    """The one line with which a command line is refused, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        parse(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def test_every_published_flag_is_read():
    words = "-n run -b a.yaml b.yaml -t True --no-test -p proj -d -s 5 -f _x -l out --scale_lr False --gpus 0,1"
    assert parse([*words.split(), "model.params.x=1"]) == RunOptions(
        name="run",
        base=("a.yaml", "b.yaml"),
        train=True,
        no_test=True,
        project="proj",
        debug=True,
        seed=5,
        postfix="_x",
        logdir="out",
        scale_lr=False,
        trainer={"gpus": "0,1"},
        overrides=("model.params.x=1",),
    )


@pytest.mark.parametrize(
    "words, train", [("-t", True), ("-t True", True), ("-t false", False), ("--train", True), ("", False)]
)
def test_train_flag_stands_alone_or_with_a_boolean(words, train):
    assert parse(["-b", "a.yaml", *words.split()]).train is train


def test_overrides_may_stand_anywhere():
    options = parse(
        ["x.y=1", "-b", "a.yaml", "model.params.a=2", "-t", "data.params.b=3", "--benchmark", "lightning.trainer.c=4"]
    )
    assert options.overrides == ("x.y=1", "model.params.a=2", "data.params.b=3", "lightning.trainer.c=4")
    assert options.base == ("a.yaml",) and options.train and options.trainer == {"benchmark": True}


def test_only_explicit_trainer_flags_are_passed_on():
    given = {
        "max_epochs": 3,
        "limit_val_batches": 0.5,
        "check_val_every_n_epoch": None,
        "fast_dev_run": 2,
        "max_time": "0:1:0:0",
        "deterministic": "warn",
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert parse(["-b", "a", *words]).trainer == given


def test_flags_are_those_of_the_installed_trainer():

    signature = inspect.signature(pl.Trainer.__init__)
    assert set(constructor_arguments("pytorch_lightning.Trainer")) == set(signature.parameters) - {"self"}
    assert {"max_steps", "val_check_interval", "gradient_clip_val", "gpus", "precision"} <= trainer_keys()


TYPOS = """
max_epoch:max_epochs max-epochs:max_epochs bas:base gpu:gpus rezume:resume trian:train no_test:no-test notest:no-test
scale-lr:scale_lr logdirs:logdir sed:seed postfx:postfix precison:precision dbug:debug nmae:name strategie:strategy
acumulate_grad_batches:accumulate_grad_batches val_check_intervall:val_check_interval benchmrk:benchmark
limit_train_batch:limit_train_batches
"""


@pytest.mark.parametrize("typo, meant", [[f"--{flag}" for flag in pair.split(":")] for pair in TYPOS.split()])
def test_misspelt_flags_are_refused_with_the_flag_that_was_meant(typo, meant, capsys):
    assert f"unknown flag {typo}; did you mean {meant}?" in refused(["-b", "a.yaml", typo, "3"], capsys)


@pytest.mark.parametrize(
    "words, message",
    [
        ("-b a --max_epochs many", "--max_epochs: expected int, got 'many'"),
        ("-b a -t maybe", "expected true or false, got 'maybe'"),
        ("-b a -s x", "--seed: invalid int"),
        ("-b a --model.params.x=3", "an override has no dashes: model.params.x=3"),
        ("-b a -t yes stray", "unexpected argument 'stray'"),
        ("-b a --callbacks x", "lightning.callbacks"),
        ("-r logs/x -n new", "--name and --resume"),
        ("-t", "--base"),
    ],
)
def test_invalid_command_lines_are_refused_in_one_line(words, message, capsys):
    assert message in refused(words.split(), capsys)


def test_the_overrides_in_the_help_are_valid():
    words = [word for line in EPILOG.splitlines()[:2] for word in line.split() if "=" in word]
    assert len(words) == 4
    config = merge([RECIPES / "class-conditional-folder.yaml"], [w for w in words if "ddconfig" not in w])
    check_config(config, weights=False)
    get_obj_from_str(config.lightning.callbacks.timer.target)
    check_config(
        merge([RECIPES / "autoencoder-folder.yaml"], [w for w in words if "ddconfig" in w]),
        weights=False,
    )
