"""`main.py --doctor`: what it says about sound and about broken configs, on a tiny model."""

import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import main
from ldm.callbacks import ImageLogger
from ldm.models.cached import MOMENTS
from ldm.modules.ema import EMAConfig, LitEma
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.training.doctor import checks, examination, footprint
from tests.models.first_stages import loss_config
from tests.tiny import FIRST_STAGE, save_text_model, text_model_config

STAGE = "model.params.first_stage_config.params.ckpt_path"
SCHEDULE = {
    "target": "ldm.lr_scheduler.LambdaLinearScheduler",
    "params": {"warm_up_steps": [2], "cycle_lengths": [10**12], "f_start": [0.0], "f_max": [1.0], "f_min": [1.0]},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 24 captioned images of 40x32 pixels, and the YAMLs of a text model and of an autoencoder."""
    folder = tmp_path_factory.mktemp("doctor")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for k in range(24):
        pixels = random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{k:02}.png")
        (folder / "images" / f"{k:02}.txt").write_text("many words " * 20 if k == 0 else f"image {k}")
    saved = save_text_model(folder, scale_factor=1.0)
    torch.save({"state_dict": saved.model.first_stage_model.state_dict()}, folder / "stage.ckpt")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "stage.ckpt", folder / "run" / "checkpoints" / "last.ckpt")
    with torch.no_grad():
        std = saved.model.first_stage_model.encode(torch.rand(4, 3, 32, 32) * 2 - 1).sample().std()
    params = {"scheduler_config": SCHEDULE, "scale_factor": float(1 / std), "cond_dropout": 0.1}
    config = text_model_config(**params, monitor="val/loss_simple_ema")
    config["model"]["params"]["first_stage_config"]["params"]["ckpt_path"] = str(folder / "stage.ckpt")
    images = {"target": "ldm.data.folder.ImageFolder"}
    images["params"] = {"root": str(folder / "images"), "captions": "sidecar", "size": 32, "split": "train"}
    data = {"batch_size": 4, "num_workers": 0, "train": images, "validation": deepcopy(images)}
    data["validation"]["params"]["split"] = "validation"
    config["model"]["base_learning_rate"] = 1e-4
    config["data"] = {"target": "main.DataModuleFromConfig", "params": data}
    config["lightning"] = {"trainer": {"accelerator": "cpu", "max_steps": 40}, "scale_lr": False}
    OmegaConf.save(OmegaConf.create(config), folder / "text.yaml")
    autoencoder = {"base_learning_rate": 1e-4, **deepcopy(FIRST_STAGE)}
    autoencoder["params"]["lossconfig"] = loss_config(disc_start=10)
    OmegaConf.save(OmegaConf.create({**config, "model": autoencoder}), folder / "stage.yaml")
    return folder


@pytest.fixture
def doctor(place, tmp_path, monkeypatch, capsys):
    """A function that runs the doctor with the words of a command line -> (exit code, report, its problems).

    steps: also the steps without data and with numbers, which take a second.
    """
    monkeypatch.chdir(tmp_path)

    def call(*words, base="text", steps=True):
        if not steps:
            monkeypatch.setattr(examination, "_step_without_data", lambda run: None)
        code = main.main(["--base", str(place / f"{base}.yaml"), "-t", "--doctor", *words])
        report = capsys.readouterr()
        lines = (report.out + report.err).splitlines()
        start = next((k for k, line in enumerate(lines) if line.startswith("problems: ")), None)
        if start is None:
            return code, report.out, [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        problems = []
        for line in lines[start + 1 :]:
            if not line.startswith("  "):
                break
            problems.append(line.strip())
        assert list(Path().iterdir()) == []  # neither run directory nor logs
        return code, report.out, problems

    return call


def test_a_sound_run_has_no_problem_and_its_costs_are_listed(doctor):
    code, report, problems = doctor()
    assert code == 0 and problems == [] and "problems: none" in report
    rows = {line[:28].strip(): line[28:].split() for line in report.partition("memory")[0].splitlines()}
    trainable, frozen = rows["model"][1:], rows["first_stage_model"][1:]
    assert int(trainable[0].replace(",", "")) > 0 and trainable[1] == "0" and frozen[0] == "0"
    assert rows["effective batch"] == ["4", "=", "4", "x", "1", "device", "x", "1", "accumulated"]
    assert rows["objective"] == ["eps,", "l2"]
    assert rows["optimizer"][:4] == ["AdamW,", "learning", "rate", "1.000e-04,"]
    assert rows["run"] == ["40", "steps,", "6.7", "epochs"] and rows["epoch"] == ["6", "batches,", "6", "steps"]
    assert rows["latents"][0] == "std" and rows["step"][:3] == ["2", "samples:", "loss"]
    assert "1 of 24 texts truncated to 10 tokens" in report


UNET, DATA = "model.params.unet_config.params", "data.params.train.params"
GPUS = ("~lightning.trainer.accelerator", "--gpus", "0,1,2,3")
# [words of the command line, what the one problem begins with, what it advises]; {} is the folder of the test.
BROKEN = {
    "context width": ([f"{UNET}.context_dim=24"], f"{UNET}.context_dim 24: model.params.cond_stage_config", "equal"),
    "weights missing": ([f"{STAGE}=gone.ckpt"], f"{STAGE}: no such file: gone.ckpt", f"with {STAGE}=FILE"),
    "run directory": ([f"{STAGE}={{}}/run"], f"{STAGE}: {{}}/run is a run directory", "/run/checkpoints/last.ckpt"),
    "frozen first stage": ([f"{STAGE}=null"], f"{STAGE}: not set, and the first stage is frozen", f"set {STAGE}"),
    "frozen text encoder": (
        ["model.params.cond_stage_trainable=false"],
        "model.params.cond_stage_trainable false: CaptionEmbedder has random weights",
        "set model.params.cond_stage_trainable=true",
    ),
    "key of the batch": (
        ["model.params.cond_stage_key=caption_text"],
        "model.params.cond_stage_key caption_text: the samples have no such key, but image, file_path_, caption, txt",
        "set model.params.cond_stage_key=caption",
    ),
    "latent scale": (
        ["model.params.scale_factor=20"],
        "model.params.scale_factor 20: scaled latents have a standard deviation of ",
        "set it to 0.9",
    ),
    "small images": ([f"{DATA}.size=64"], f"{DATA}.size 64: 23 of 23 images are smaller", "set it to 32, or"),
    "broken image": (
        [f"{DATA}.root={{}}/broken"],
        "{}/broken/11.png: not an image",
        "repair or remove it, or set on_error to skip",
    ),
    "warm-up": (
        ["model.params.scheduler_config.params.warm_up_steps=[10000]"],
        "model.params.scheduler_config.params.warm_up_steps [10000]: the run ends at step 40, when the rate is 0%",
        "set it to [2]",
    ),
    "scaled learning rate": (
        ["model.base_learning_rate=0.05", "--scale_lr", "true"],
        "model.base_learning_rate 0.05: multiplied by the effective batch it is 0.2",
        "set lightning.scale_lr=false",
    ),
    "validation": (
        ["--max_steps", "4"],
        "lightning.trainer.val_check_interval 1.0: the run ends at batch 4, before the first validation at 6",
        "set lightning.trainer.val_check_interval=1",
    ),
    "devices": (GPUS, "--gpus 0,1,2,3: no GPU 0; this machine has no GPU", "--gpus 0 is the CPU"),
    "setting of the Trainer": (
        ["--strategy", "dpp"],
        "lightning.trainer.strategy dpp: expected one of auto, ",
        "did you mean 'ddp'?",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_is_one_problem_with_its_path_and_the_value_to_set(name, doctor, place):
    words, begins, advice = BROKEN[name]
    if name == "broken image" and not (place / "broken").exists():
        shutil.copytree(place / "images", place / "broken")
        (place / "broken" / "11.png").write_bytes(b"no image")
    code, _, problems = doctor(*(word.replace("{}", str(place)) for word in words), steps=False)
    assert code == 2 and len(problems) == 1, problems
    assert problems[0].startswith(begins.replace("{}", str(place))) and advice in problems[0]


def test_buckets_are_a_row_of_the_run_s_own_batch_and_a_single_size_a_note(doctor):
    code, report, problems = doctor(f"{DATA}.buckets.step=32", steps=False)
    assert (code, problems) == (0, []) and "buckets.step 32: one size only, 32x32, at size 32; " in report
    assert [line.split()[:4] for line in report.splitlines() if line.startswith("  buckets")] == [
        ["buckets", "batches", "of", "4,"]
    ]


def test_a_discriminator_that_the_run_never_reaches_is_a_problem(doctor):
    code, report, problems = doctor("model.params.lossconfig.params.disc_start=50001", base="stage")
    (line,) = problems
    assert code == 2 and report.count("Adam, learning rate") == 2
    assert line == (
        "model.params.lossconfig.params.disc_start 50001: the run ends at step 40, before the discriminator starts; "
        "set it to 20, or lightning.trainer.max_steps higher"
    )


def test_a_first_stage_for_sampling_cannot_train(doctor):
    words = ["model.params.lossconfig={_replace_: true, target: torch.nn.Identity}"]
    code, _, problems = doctor(*words, base="stage")
    (line,) = problems
    assert code == 2 and line.startswith("a training step fails: lossconfig.target is Identity, which cannot train")


def test_a_run_that_does_not_fit_into_memory_and_on_the_disk_has_two_problems(doctor, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**24))
    monkeypatch.setattr(checks, "device_memory", lambda run: int(7.5 * 2**20))
    code, _, problems = doctor()
    memory, disk = problems
    assert code == 2 and memory.startswith("data.params.batch_size 4: needs 8.8 MiB, the device has 7.5 MiB; set it")
    assert memory.endswith("set it to 1, with lightning.trainer.accumulate_grad_batches=4 for the same step")
    assert disk.startswith("lightning.modelcheckpoint.params.save_top_k 3: 5 checkpoints of ")
    assert disk.endswith("set it to 0")


def test_several_problems_are_all_listed(doctor):
    words = [f"{UNET}.context_dim=24", f"{STAGE}=gone.ckpt", "--gpus", "2", GPUS[0]]
    code, _, problems = doctor(*words, steps=False)
    assert code == 2 and len(problems) == 3


def test_what_the_run_refuses_once_its_model_is_built_is_a_problem(doctor):
    callbacks = "lightning.callbacks"
    words = [
        f"+{callbacks}.loss_by_snr={{target: ldm.callbacks.LossBySNR}}",
        f"{callbacks}.image_logger={{params: {{fixed_samples: {{count: 2}}}}}}",
        "model.params.optimizer_config={groups: [{match: atn}]}",
    ]
    code, _, problems = doctor(*words, "--strategy", "fsdp", "--compile", "eager", base="stage", steps=False)
    assert code == 2 and [line.partition(":")[0] for line in sorted(problems)] == [
        "--compile",
        "LossBySNR",
        f"{callbacks}.image_logger.params.fixed_samples",
        "lightning.trainer.strategy fsdp",
        "model.params.optimizer_config.groups[0].match 'atn'",
    ]


def test_class_images_that_the_run_generates_are_a_note_and_left_out(tmp_path):
    prior = {"target": "ldm.data.dreambooth.ClassImages", "params": {"root": str(tmp_path), "prompt": "a dog"}}
    train = {"target": "ldm.data.dreambooth.DreamBooth", "params": {"instance": {}, "prior": prior}}
    for base, is_problem in (("base.ckpt", False), (None, True)):
        config = {"model": {"params": {"ckpt_path": base}}, "data": {"params": {"train": deepcopy(train)}}}
        left, (found,) = examination._without_missing_class_images(OmegaConf.create(config))
        assert found.is_problem is is_problem and left.data.params.train.params.prior is None
        assert found.text.startswith(f"data.params.train.params.prior: {tmp_path} lacks 200 images; ")


def test_a_frozen_network_without_weights_is_one_problem_with_all_that_they_bring():
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    directory = SimpleNamespace(resumed=False, has_checkpoints=False)
    run = SimpleNamespace(model=torch.nn.ModuleDict({"model": frozen}), params={}, directory=directory)
    (found,) = checks.check_frozen_stages(run)
    assert found.text.startswith("model.params.ckpt_path: not set, and the network is frozen; set model.params.ckpt")
    run.params = {"adapters": {"rank": 4}}  # which the config check reports
    assert not list(checks.check_frozen_stages(run))


@pytest.mark.parametrize("validates", [True, False])
def test_a_run_whose_validations_log_images_has_no_note_about_them(validates):
    trainer = SimpleNamespace(val_check_interval=1.0, check_val_every_n_epoch=1)
    trainer.callbacks = [ImageLogger(200, 4, increase_log_steps=False)]
    datasets = {"train": range(40), **({"validation": range(4)} if validates else {})}
    run = {"trainer": trainer, "datasets": datasets, "steps": 20, "batches": 10, "accumulated": 1, "batch_size": 4}
    notes = list(checks.check_intervals(SimpleNamespace(**run, ranks=1, model=None)))
    assert bool(notes) is not validates


def test_a_model_that_looks_at_values_takes_a_step_without_data():
    with FakeTensorMode(allow_non_fake_inputs=True), footprint._Meter([]):
        labels = torch.empty(3, dtype=torch.int64)
        assert ClassEmbedder(4, n_classes=10)({"class": labels}).shape == (3, 1, 4)


def test_an_average_without_warm_up_that_keeps_its_first_weights_is_a_problem():
    model = torch.nn.Module()
    model.model_ema = LitEma(torch.nn.Linear(2, 2), decay=0.999, use_num_upates=False)
    (found,) = checks.check_ema(ema_run(model, 100))
    assert found.is_problem and found.text.startswith("model.params.ema_decay 0.999: after 100 steps 90%")
    assert "of the average are still the initial weights; set it to 0.9" in found.text
    assert not list(checks.check_ema(ema_run(model, 10_000)))
    model.model_ema = LitEma(torch.nn.Linear(2, 2), decay=0.9999)  # warms up
    assert not list(checks.check_ema(ema_run(model, 100)))


def test_snapshots_that_the_run_never_stores_or_that_cannot_be_combined_are_notes():
    def notes(averages, interval, every=1):
        section = {"averages": averages, "every": every, "snapshot_every": interval}
        model = torch.nn.Module()
        model.model_ema = EMAConfig(**section).build(torch.nn.Linear(2, 2))
        found = list(checks.check_ema(ema_run(model, 400, ema_config=section)))
        assert not any(each.is_problem for each in found)
        return [each.text for each in found]

    both = [{"sigma_rel": 0.05}, {"sigma_rel": 0.1}]
    assert notes(both, 400) == notes(both, 0) == notes(both[:1], 0) == []
    place = "model.params.ema_config"
    stored = f"{place}.snapshot_every 5000: the run of 400 steps stores none; set it to"
    assert notes(both, 5000) == [f"{stored} 20"] and notes(both, 5000, every=50) == [f"{stored} 50"]
    (text,) = notes(both[:1], 20)
    assert text.startswith(f"{place}.averages: snapshots of one sigma_rel; two, such as 0.05 and 0.1")


def ema_run(model, steps, target="ldm.models.diffusion.ddpm.LatentDiffusion", **params):
    return SimpleNamespace(model=model, steps=steps, params=params, plain={"model": {"target": target}})


def test_an_average_is_named_by_the_key_that_the_config_has():
    section = {"averages": [{"sigma_rel": 0.1}, {"decay": 0.999, "warm_up": False}]}
    model = torch.nn.Module()
    model.model_ema = EMAConfig(**section).build(torch.nn.Linear(2, 2))
    (found,) = checks.check_ema(ema_run(model, 100, ema_config=section))
    assert found.text.startswith("model.params.ema_config.averages[1].decay 0.999: ")
    model.model_ema = LitEma(torch.nn.Linear(2, 2), decay=0.999, use_num_upates=False)
    (found,) = checks.check_ema(ema_run(model, 100, "ldm.models.autoencoder.VQModel"))
    assert "set model.params.ema_config={averages: [{decay: 0.9}]}, or model.params.use_ema=false" in found.text


def test_cached_latents_need_no_images_in_the_batch():
    model = SimpleNamespace(first_stage_key="jpg", cond_stage_model=None)
    cached = SimpleNamespace(model=model, samples=[{MOMENTS: torch.zeros(8, 4, 4), "txt": "a caption"}])
    assert not list(checks.key_problems(cached))
    (line,) = checks.key_problems(SimpleNamespace(model=model, samples=[{"image": torch.zeros(4, 4, 3)}]))
    assert line.endswith("set model.params.first_stage_key=image")
