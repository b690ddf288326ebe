"""scripts/evaluate.py as a user runs it: cards of models, first stages and images, sweeps, comparisons."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.cli import run_command
from ldm.config.instantiate import instantiate_from_config
from ldm.evaluation import features
from ldm.evaluation.figure import MARGIN
from ldm.paths import ROOT
from scripts.evaluate import main
from tests.inference.test_lora import write
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.scripts.test_sample_conditional import images, save_run  # noqa: F401
from tests.tiny import FIRST_STAGE


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Few resamples, a short training of the classifier, and outputs in a folder of the test's own."""
    monkeypatch.setattr(features, "train_classifier", partial(features.train_classifier, steps=2, progress=False))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs")
    return {name: save_run(folder, name, images).ckpt.parents[1] for name in ("text", "class", "inpainting")}


def flags(run, *others: str) -> list[str]:
    where = ["--ckpt", str(run), "--device", "cpu", "--precision", "full", "--steps", "2", "--n_samples", "5"]
    return [*where, "--batch_size", "2", "--features", "pixels", *others]


def card_in(folder) -> dict:
    return json.loads((folder / "card.json").read_text())


@pytest.mark.parametrize("name", ["text", "class", "inpainting"])
def test_a_model_of_each_kind_is_sampled_and_its_card_says_how(name, runs, tmp_path):
    assert run_command(main, flags(runs[name], "--outdir", str(tmp_path / "out"))) == 0
    card = card_in(tmp_path / "out")
    measured = {"fid", "kid", "precision", "recall", "copies"}
    assert measured | ({"recognized"} if name == "class" else set()) == set(card["metrics"])
    assert card["settings"]["steps"] == 2 and card["weights"]["step"] == 7 and card["weights"]["ckpt_fingerprint"]
    assert card["command"].startswith("python scripts/evaluate.py --ckpt") and card["versions"]["torch"]
    assert card["data"]["real"].startswith("4, train of ") and card["seconds"]["sampling"] > 0
    assert Image.open(tmp_path / "out" / "card.png").height > 300
    assert ("clip_score" in card["skipped"]) == (name == "text")
    assert len(list((tmp_path / "out" / "samples").glob("*.npz"))) == 3


def test_a_run_with_classes_is_measured_by_a_classifier_trained_on_them(runs, tmp_path):
    command = [word for word in flags(runs["class"], "--outdir", "out") if word not in ("--features", "pixels")]
    assert run_command(main, command) == 0
    assert card_in(tmp_path / "out")["data"]["features"]["name"] == "classifier"


def test_a_repeated_command_samples_nothing_and_other_settings_need_another_folder(runs, tmp_path, monkeypatch, capsys):
    command = flags(runs["class"], "--outdir", "out")
    assert run_command(main, command) == 0
    first = card_in(tmp_path / "out")
    monkeypatch.setattr("ldm.inference.load_model", None)
    assert run_command(main, command) == 0
    assert card_in(tmp_path / "out")["metrics"] == first["metrics"]
    capsys.readouterr()
    assert "holds samples with seed 42, now 3" in refused(main, [*command, "--seed", "3"], capsys)
    assert card_in(tmp_path / "out")["settings"]["seed"] == 42


def test_samples_with_another_lora_of_the_same_name_are_not_reused(images, tmp_path, capsys):  # noqa: F811
    saved = save_run(tmp_path, "text", images)
    for seed in range(2):
        write(tmp_path / "a.safetensors", saved, seed, ("attention",))
        command = flags(saved.ckpt.parents[1], "--outdir", "out", "--lora", "a.safetensors")
        assert run_command(main, command) == (2 if seed else 0)
    assert "holds samples with lora_fingerprint" in capsys.readouterr().err


def test_a_sweep_has_a_card_for_each_point_a_table_and_plots_and_resumes(runs, tmp_path, monkeypatch):
    command = flags(runs["class"], "--sweep", "scale=1,2", "--sweep", "sampler=ddim,heun", "--outdir", "out")
    assert run_command(main, command) == 0
    cards = sorted(file.parent.name for file in (tmp_path / "out").glob("*/card.json"))
    assert cards == ["scale1-ddim", "scale1-heun", "scale2-ddim", "scale2-heun"]
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert "| 2 | heun | " in table and "| scale | sampler | Frechet distance |" in table
    assert Image.open(tmp_path / "out" / "sweep.png").height == 840
    (tmp_path / "out" / "scale2-heun" / "card.json").unlink()
    monkeypatch.setattr("ldm.inference.load_model", None)  # its samples are there
    before = (tmp_path / "out" / "scale1-ddim" / "card.json").stat().st_mtime_ns
    assert run_command(main, command) == 0
    assert (tmp_path / "out" / "sweep.md").read_text() == table
    assert (tmp_path / "out" / "scale1-ddim" / "card.json").stat().st_mtime_ns == before
    assert run_command(main, [*command, "--features", "classifier"]) == 0
    assert card_in(tmp_path / "out" / "scale1-ddim")["data"]["features"]["name"] == "classifier"  # measured anew


def test_held_out_images_of_a_run_folders_and_arrays_are_compared_with_real_ones(runs, images, tmp_path):  # noqa: F811
    common = ["--features", "pixels"]
    assert run_command(main, ["--ckpt", str(runs["class"]), "--images", "validation", *common]) == 0
    card = card_in(tmp_path / "outputs" / "evaluation" / "validation-of-class")
    assert card["metrics"]["copies"]["value"] == 1 and card["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-9)
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in sorted(images.rglob("*.png"))])
    np.savez(tmp_path / "a.npz", pixels)
    for out, given, real in (("b", "a.npz", str(images)), ("c", str(images), "a.npz")):
        assert run_command(main, ["--images", given, "--real", real, "--outdir", out, *common]) == 0
        assert card_in(tmp_path / out)["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-9)
    np.savez(tmp_path / "s.npz", mu=np.zeros(192), sigma=np.eye(192))
    assert run_command(main, ["--images", "a.npz", "--real", "s.npz", "--outdir", "s", *common]) == 0
    assert set(card_in(tmp_path / "s")["metrics"]) == {"fid"}


def test_a_first_stage_reconstructs_held_out_images(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LDM_VGG16", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = OmegaConf.load(next((runs["class"] / "configs").glob("*.yaml")))
    config.model = FIRST_STAGE
    (tmp_path / "stage" / "configs").mkdir(parents=True)
    OmegaConf.save(config, tmp_path / "stage" / "configs" / "2026-01-01T00-00-00-project.yaml")
    torch.manual_seed(0)
    model = instantiate_from_config(FIRST_STAGE)
    (tmp_path / "stage" / "checkpoints").mkdir()
    torch.save({"state_dict": model.state_dict(), "global_step": 3}, tmp_path / "stage" / "checkpoints" / "last.ckpt")
    assert run_command(main, ["--ckpt", "stage", "--features", "pixels", "--device", "cpu"]) == 0
    capsys.readouterr()
    for others, words in (
        (["--lora", "a"], "--lora: has no effect with a first stage"),
        (["--held_out", "none"], "name one"),
        (["--use_ema"], "--use_ema: stage/checkpoints/last.ckpt has no EMA weights; remove it"),
    ):
        assert words in refused(main, ["--ckpt", "stage", *others], capsys)
    card = card_in(tmp_path / "outputs" / "evaluation" / "stage")
    assert set(card["metrics"]) == {"psnr", "ssim", "rfid"} and "VGG16" in card["skipped"]["lpips"]
    assert card["latents"]["shape"] == [4, 8, 8] and len(card["latents"]["channel_std"]) == 4


def test_two_cards_are_compared_as_text_and_as_a_figure(runs, tmp_path, capsys):
    for name, scale in (("a", "1"), ("b", "2")):
        assert run_command(main, flags(runs["class"], "--scale", scale, "--outdir", name)) == 0
    capsys.readouterr()
    assert run_command(main, ["--compare", "a", "b"]) == 0
    assert "| scale | 1 | 2 |" in capsys.readouterr().out
    [folder] = (tmp_path / "outputs" / "evaluation").glob("compare-a-and-b-*")
    widths = [Image.open(tmp_path / name / "card.png").width for name in ("a", "b")]
    assert Image.open(folder / "compare.png").width == sum(widths) + 2 * MARGIN and (folder / "compare.md").is_file()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--ckpt: pass a run directory"),
        (["--ckpt", "gone"], "--ckpt gone: no such file or folder"),
        (["--images", "gone", "--real", "gone"], "--images gone: no such file or folder"),
        (["--ckpt", "RUN", "--sweep", "steps=0"], "--steps 0: choose 1 to 20"),
        (["--ckpt", "RUN", "--sweep", "step=1"], "did you mean 'steps'"),
        (["--ckpt", "RUN", "--n_samples", "1"], "--n_samples 1: choose 2 or more"),
        (["--ckpt", "RUN", "--steps", "2", "--sampler", "none"], "--sampler none: choose one of"),
        (["--ckpt", "RUN", "--steps", "2", "--real", "test"], "--real test: this run has no such dataset; choose one"),
        (["--ckpt", "RUN", "--images", "validation", "--sweep", "steps=1"], "--sweep: has no effect with --images"),
        (["--compare", "gone", "gone"], "--compare gone: no card.json"),
        (
            ["--images", "validation", "--ckpt", "RUN", "--steps", "7"],
            "--steps: has no effect with --images; remove it",
        ),
        (["--compare", "a", "b", "--n_real", "9"], "--n_real: has no effect with --compare; remove it"),
        (["--images", ".", "--real", ".", "--held_out", "test"], "--held_out test: it is a split of a run's data"),
        (["--ckpt", "RUN", "--features", "pixels", "--weights", "a.pth"], "--features pixels takes none; remove it"),
        (["--ckpt", "RUN", "--size", "16"], "--size 16: it is for folders of images"),
        (["--ckpt", "RUN", "--features", "dinov2", "--weights", "gone"], "--weights gone: no such file or folder"),
        (["--ckpt", "RUN", "--steps", "2", "--clip_weights", str(ROOT / "setup.py")], "not text-conditional; remove"),
        (["--ckpt", "RUN", "--feature", "pixels"], "did you mean --features"),
        (["--ckpt", "RUN", "--clip_weights", "gone"], "--clip_weights gone: no such file"),
        (["--ckpt", "RUN", "--steps", "2", "--cache", f"{ROOT}/setup.py"], "setup.py is a file or inside one"),
    ],
)
def test_a_mistake_is_one_line(words, message, runs, capsys):
    assert message in refused(main, [str(runs["class"]) if word == "RUN" else word for word in words], capsys)


def test_statistics_of_other_features_are_refused_before_sampling(runs, tmp_path, capsys):
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    said = refused(main, flags(runs["class"], "--real", "s.npz"), capsys)
    assert "its features have 3 dimensions, those of pixels have 192" in said
    assert not list(tmp_path.rglob("settings.json"))


def test_help_imports_nothing_heavy(tmp_path):
    shown = help_without_heavy_imports(ROOT / "scripts" / "evaluate.py", tmp_path)
    assert "--sweep" in shown and "--watermark" not in shown
