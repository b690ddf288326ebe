"""A misspelt flag of any script is refused in one line with the right flag, before anything is imported or written."""

import importlib
from pathlib import Path

import pytest

from ldm.cli import EXIT_USAGE
from ldm.paths import ROOT
from ldm.training.flags import parse

SCRIPTS = sorted(
    path.stem for path in Path(ROOT / "scripts").glob("*.py") if "def parser()" in path.read_text(encoding="utf-8")
)


def misspelt(flag: str) -> list[str]:
    """Four ways in which a flag of five letters or more goes wrong."""
    word, middle = flag.removeprefix("--"), (len(flag) + 1) // 2 - 1
    swapped = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    other_dash = word.replace("-", "_") if "-" in word else word.replace("_", "-")
    return [f"--{each}" for each in (word[:middle] + word[middle + 1 :], f"{word}s", swapped, other_dash.upper())]


def test_these_are_the_scripts():
    assert {"txt2img", "img2img", "inpaint", "sample_diffusion", "upscale", "knn2img", "train_searcher"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_misspelt_flag_is_refused_with_the_one_that_was_meant(script, capsys):
    parser = importlib.import_module(f"scripts.{script}").parser
    flags = {option for action in parser()._actions for option in action.option_strings if option.startswith("--")}
    tried = 0
    for flag in sorted(flags):
        for wrong in misspelt(flag) if len(flag) > 6 else ():
            if wrong in flags:
                continue
            tried += 1
            with pytest.raises(SystemExit) as stop:
                parser().parse_args([wrong, "1"])
            said = capsys.readouterr().err
            assert stop.value.code == EXIT_USAGE and said.count("\n") == 1
            assert f"unknown flag {wrong}; did you mean {flag}?" in said, said
    assert tried >= 12


def test_misspelt_flags_of_training_are_refused_likewise(capsys):
    flags = "--base --name --resume --train --no-test --project --debug --seed --postfix --logdir --scale_lr"
    flags += " --allow-targets --max_epochs --max_steps --accumulate_grad_batches --gradient_clip_val --precision"
    flags += " --strategy --val_check_interval"
    for flag in flags.split():
        for wrong in misspelt(flag)[:3] if len(flag) > 6 else ():
            with pytest.raises(SystemExit):
                parse(["--base", "x.yaml", "-t", wrong, "1"])
            assert f"unknown flag {wrong}; did you mean --" in capsys.readouterr().err
