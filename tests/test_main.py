"""main.py from its command line to the files of a run, on a toy model."""

import builtins
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import main
from ldm.checkpoint import read_checkpoint
from tests import toys

ROOT = Path(__file__).parents[1]
GAN = "model.target=tests.toys.ToyGan"
QUIET = ["lightning.callbacks.image_logger=null", "lightning.callbacks.cuda_callback=null"]


def run_main(*words):
    return main.main(["--allow-targets", "tests", *words])


def enter(folder, monkeypatch):
    """Make `folder` the working directory, with the toy's config."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", [])
    OmegaConf.save(OmegaConf.create(toys.CONFIG), "toy.yaml")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs main.py with the words of a command line in an empty folder -> exit code."""
    enter(tmp_path, monkeypatch)
    return run_main


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The training state of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter(tmp_path_factory.mktemp("whole"), monkeypatch)
        assert run_main("-b", "toy.yaml", "-t", "-n", "whole", *QUIET) == 0
        return training_state(last(folder_of("whole")))


@pytest.fixture
def start(run):
    """A function that starts a run called `name` -> (exit code, run directory)."""

    def call(name, *words):
        return run("-b", "toy.yaml", "-t", "-n", name, *words), folder_of(name)

    return call


def folder_of(name):
    folders = sorted(Path("logs").glob(f"*_{name}"))
    return folders[-1] if folders else None


def last(folder):
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


def training_state(checkpoint):
    """Everything that decides how training continues, and nothing else."""
    data = {key: value for key, value in checkpoint["DataModuleFromConfig"].items() if key != "datasets"}
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    return {"data": data, **{key: checkpoint[key] for key in keys}}


def differences(a, b, path=""):
    """Paths at which two nested values differ in a bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        return [
            p for key in sorted(set(a) | set(b), key=str) for p in differences(a.get(key), b.get(key), f"{path}.{key}")
        ]
    if isinstance(a, list | tuple):
        return [p for i, (x, y) in enumerate(zip(a, b, strict=True)) for p in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: {a} != {b}"]


# ---- run directories


def test_a_run_leaves_its_configs_checkpoints_logs_and_images(start, caplog):
    code, folder = start("whole", "--logger", "true", "--max_steps", "8", "data.params.batch_size=4", "-s", "7")
    assert code == 0
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    now = folder.name.split("_")[0]
    assert {
        f"configs/{now}-project.yaml",
        f"configs/{now}-lightning.yaml",
        "checkpoints/last.ckpt",
        "csv/metrics.csv",
    } <= files
    assert {"checkpoints/epoch=000000.ckpt", "checkpoints/epoch=000001.ckpt", "checkpoints/epoch=000002.ckpt"} <= files
    assert any(name.startswith("tensorboard/events") for name in files)
    assert {
        "images/train/inputs_gs-000001_e-000000_b-000001.png",
        "images/val/film_gs-000001_e-000000_b-000000.png",
    } <= files
    project = OmegaConf.load(folder / f"configs/{now}-project.yaml")
    lightning = OmegaConf.load(folder / f"configs/{now}-lightning.yaml").lightning
    assert set(project) == {"model", "data"} and project.data.params.batch_size == 4
    assert lightning.trainer.max_steps == 8 and lightning.seed == 7
    assert "val/loss" in (folder / "csv/metrics.csv").read_text()


def test_the_learning_rate_is_that_of_the_optimizer_and_is_reported(start, caplog):
    caplog.set_level("INFO", logger="ldm")
    _, folder = start("rate", *QUIET, "--accumulate_grad_batches", "2", "--max_steps", "1")
    rate = 2 * 1 * 2 * 1e-3
    assert last(folder)["optimizer_states"][0]["param_groups"][0]["initial_lr"] == pytest.approx(rate)
    assert "effective batch 4 = 2 x 1 device x 2 accumulated; learning rate 4.000e-03 = 4 x 1.000e-03" in caplog.text
    assert "Adam, learning rate 4.000e-03" in caplog.text
    _, folder = start("unscaled", *QUIET, "--scale_lr", "False", "--max_steps", "1")
    assert last(folder)["optimizer_states"][0]["param_groups"][0]["initial_lr"] == pytest.approx(1e-3)


def test_manual_optimization_gets_the_trainers_accumulation_and_clipping(start, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        toys.ToyGan, "on_train_end", lambda self: seen.update(a=self.accumulate_grad_batches, c=self.gradient_clip_val)
    )
    code, folder = start(
        "gan", GAN, *QUIET, "--accumulate_grad_batches", "2", "--gradient_clip_val", "0.5", "--max_epochs", "1"
    )
    assert code == 0 and seen == {"a": 2, "c": 0.5} and last(folder)["global_step"] == 2


def test_the_three_best_checkpoints_of_the_monitor_are_kept_and_last_is_the_newest(start):
    _, folder = start("best", *QUIET, "--max_epochs", "6")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(names) == 4 and "last.ckpt" in names and last(folder)["global_step"] == 24


def test_without_validation_or_monitor_last_is_still_kept(start, caplog):
    for name, words in (("a", ["data.params.validation=null"]), ("b", ["model.params.monitor=nothing"])):
        code, folder = start(name, *QUIET, *words)
        assert code == 0 and last(folder)["global_step"] == 12
    assert caplog.text.count("no validation, so no best of") == 1
    _, folder = start("c", *QUIET, "model.params.monitor=null")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"epoch=000002.ckpt", "last.ckpt"}


def test_yaml_decides_on_callbacks_and_checkpoints(start):
    steps = "lightning.callbacks.metrics_over_trainsteps_checkpoint.params.every_n_train_steps=5"
    code, folder = start("yaml", *QUIET, "lightning.modelcheckpoint.params.every_n_train_steps=4", "+" + steps)
    assert code == 0
    assert {path.name for path in (folder / "checkpoints" / "trainstep_checkpoints").iterdir()} == {
        "epoch=000001-step=000000005.ckpt",
        "epoch=000002-step=000000010.ckpt",
    }
    assert not (folder / "images").exists()


def test_checkpoints_can_be_switched_off(start):
    code, folder = start("none", *QUIET, "--enable_checkpointing", "false", "--max_epochs", "1")
    assert code == 0 and not list(folder.rglob("*.ckpt"))


def test_the_test_set_is_evaluated_unless_no_test(start, run, caplog):
    caplog.set_level("INFO", logger="ldm")
    test_set = ["+data.params.test.target=tests.toys.Images"]
    assert start("t", *QUIET, "--max_epochs", "1", *test_set)[0] == 0 and "test/loss" in caplog.text
    caplog.clear()
    assert start("n", *QUIET, "--max_epochs", "1", *test_set, "--no-test")[0] == 0 and "test/loss" not in caplog.text
    assert run("-b", "toy.yaml", *test_set) == 0 and "test/loss" in caplog.text


def test_a_logger_of_the_yaml_replaces_tensorboard(start):
    logger = "lightning.logger.target=pytorch_lightning.loggers.CSVLogger"
    code, folder = start("log", *QUIET, "--logger", "true", logger, "--max_epochs", "1")
    assert code == 0 and list((folder / "logger").rglob("metrics.csv")) and not (folder / "tensorboard").exists()


def test_precision_16_is_bfloat16_on_the_cpu_and_says_so(start, caplog):
    caplog.set_level("INFO", logger="ldm")
    assert start("half", *QUIET, "--precision", "16", "--max_steps", "1")[0] == 0
    assert "precision bf16-mixed (16-bit on the CPU is bfloat16)" in caplog.text


def test_accumulation_is_refused_for_a_module_without_it(start, capsys, monkeypatch):
    def init(self, width):
        toys.Toy.__init__(self, width)
        self.automatic_optimization = False

    monkeypatch.setattr(toys.ToyGan, "__init__", init)
    assert start("no", GAN, "--accumulate_grad_batches", "2")[0] == 2
    assert "--accumulate_grad_batches 2: ToyGan uses manual optimization" in capsys.readouterr().err


# ---- resume


# Words, batches at which a signal comes, and the optimizer steps at whose ends the run stops.
WAYS = {
    "plain": ([], (0, 2, 3, 6, 9), [1, 3, 4, 7, 10]),
    "accumulated": (["--accumulate_grad_batches", "3"], (0, 3, 5, 7, 9), [1, 2, 3, 4, 5]),
    "gan": ([GAN, "--accumulate_grad_batches", "2"], (0, 2, 5, 6, 9), [1, 2, 3, 4, 5]),
    "max_steps": (["--max_epochs", "none", "--max_steps", "18"], (3, 7, 11, 15), [4, 8, 12, 16]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_stopped_anywhere_resumes_bitwise(start, run, way):
    """Stops within a window of accumulated gradients, within an epoch, and at its first and last batch."""
    words, batches, steps = WAYS[way]
    _, whole = start("whole", *QUIET, *words)
    code, folder = start("stopped", *QUIET, *words, f"+model.params.at.{batches[0]}=SIGTERM")
    stopped_at = [(code, last(folder)["global_step"])]
    for batch in batches[1:]:
        code = run("-r", str(folder), "-t", f"+model.params.at.{batch}=SIGTERM")
        stopped_at.append((code, last(folder)["global_step"]))
    assert stopped_at == [(143, step) for step in steps]
    assert run("-r", str(folder), "-t") == 0
    assert differences(training_state(last(whole)), training_state(last(folder))) == []


def test_a_run_stopped_in_validation_resumes_bitwise(start, run, whole):
    code, folder = start("stopped", *QUIET, "+model.params.at_validation.1=SIGTERM")
    assert code == 143 and last(folder)["global_step"] == 8
    assert run("-r", str(folder), "-t", "model.params.at_validation.1=null") == 0
    assert differences(whole, training_state(last(folder))) == []


@pytest.mark.parametrize("file", ["last.ckpt", "epoch=000000.ckpt"])
def test_a_run_resumes_from_one_of_its_files(start, run, whole, file):
    _, folder = start("short", *QUIET, "--max_epochs", "2")
    assert run("-r", str(folder / "checkpoints" / file), "-t", "--max_epochs", "3") == 0
    assert differences(whole, training_state(last(folder))) == []
    assert len(list((folder / "configs").glob("*-project.yaml"))) >= 1


def test_resuming_a_finished_run_warns(start, run, caplog):
    _, folder = start("done", *QUIET, "--max_epochs", "1")
    assert run("-r", str(folder), "-t") == 0 and "no steps: the run is already at epoch 1, step 4" in caplog.text


def test_training_without_data_or_batches_says_so(start, capsys, caplog):
    code, _ = start("none", *QUIET, "data.params.train=null")
    assert code == 2 and "error: data.params.train: missing; -t needs the training dataset" in capsys.readouterr().err
    code, _ = start("zero", *QUIET, "lightning.trainer.limit_train_batches=0")
    assert code == 0 and "no steps: lightning.trainer.limit_train_batches is 0" in caplog.text


def test_resume_keeps_the_saved_seed_and_scaling(start, run):
    _, whole = start("whole", *QUIET, "-s", "5", "--scale_lr", "false")
    _, folder = start("stopped", *QUIET, "-s", "5", "--scale_lr", "false", "+model.params.at.5=SIGTERM")
    assert run("-r", str(folder), "-t") == 0
    assert differences(training_state(last(whole)), training_state(last(folder))) == []


@pytest.mark.parametrize("named", ["", "checkpoints/last.ckpt"])
def test_a_truncated_last_checkpoint_is_replaced_by_the_newest_complete_one(start, run, whole, caplog, named):
    _, folder = start("short", *QUIET, "--max_epochs", "2")
    damaged = folder / "checkpoints" / "last.ckpt"
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[: len(content) // 2])
    assert run("-r", str(folder / named), "-t", "--max_epochs", "3") == 0
    assert "last.ckpt" in caplog.text and "epoch=00000" in caplog.text
    assert differences(whole, training_state(last(folder))) == []


def test_a_new_run_starts_from_the_full_state_of_another(start, whole):
    _, short = start("short", *QUIET, "--max_epochs", "2")
    code, folder = start("new", *QUIET, "--resume_from_checkpoint", str(short / "checkpoints" / "last.ckpt"))
    assert code == 0 and folder != short
    assert differences(whole, training_state(last(folder))) == []


def test_observers_change_nothing(start):
    _, plain = start("plain", *QUIET, "data.params.validation=null", "--max_epochs", "2")
    images = "lightning.callbacks.image_logger.params.batch_frequency=1"
    for observed in ([], [images, "--val_check_interval", "1", "--num_sanity_val_steps", "0"]):
        _, watched = start("watched", "--max_epochs", "2", *observed)
        assert differences(training_state(last(plain)), training_state(last(watched))) == []


def test_the_seed_decides_the_trained_weights(start):
    weights = [
        last(start(f"r{i}", *QUIET, "-s", seed)[1])["state_dict"]["net.weight"]
        for i, seed in enumerate(("1", "1", "2"))
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def test_a_resume_with_another_model_names_three_keys(start, run, capsys):
    _, folder = start("shape", *QUIET, "--max_epochs", "1")
    assert run("-r", str(folder), "-t", "model.params.width=4") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "net.weight is [3, 12] in the file and [4, 12] in the model" in error and "and 1 more" in error


def test_a_resume_that_fails_leaves_the_run_as_it_was(start, run, whole):
    """It fails while the weights, while the optimizer is restored, or in its first batch."""
    _, folder = start("failed", *QUIET, "--max_epochs", "1")
    before = files_of(folder)
    words = ["-r", str(folder), "-t", "--max_epochs", "3"]
    assert run(*words, "model.params.width=4") == 2 and files_of(folder) == before
    assert run(*words, "model.params.frozen=true") == 2 and files_of(folder) == before
    assert run(*words, "+model.params.at.4=error") == 1
    (folder / "checkpoints" / "crash.ckpt").unlink()
    assert files_of(folder) == before
    assert run(*words) == 0
    assert differences(whole, training_state(last(folder))) == []


def test_changes_at_resume_are_logged_one_line_each(start, run, caplog):
    _, folder = start("changed", *QUIET, "--max_epochs", "1")
    caplog.clear()
    words = ["--max_epochs", "2", "--accumulate_grad_batches", "2", "--precision", "bf16", "-s", "5"]
    words += ["model.params.monitor=null"]
    assert run("-r", str(folder), "-t", *words) == 0
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("changed")]
    for line in (
        "lightning.trainer.accumulate_grad_batches: default -> 2",
        "lightning.trainer.max_epochs: 1 -> 2",
        "lightning.trainer.precision: default -> bf16",
        "model.params.monitor: default -> None",
        "lightning.seed: 23 -> 5",
    ):
        assert any(line in text for text in lines), (line, lines)
    caplog.clear()
    assert run("-r", str(folder), "-t") == 0
    assert not any(record.getMessage().startswith("changed") for record in caplog.records)


def test_a_run_without_checkpoints_starts_again_from_its_configs(start, run, whole, caplog):
    """As one that was killed before the first save: the seed makes it exact."""
    _, folder = start("early", *QUIET, "--max_epochs", "3", "--enable_checkpointing", "false", "-s", "23")
    assert not list(folder.rglob("*.ckpt"))
    assert run("-r", str(folder), "-t", "--enable_checkpointing", "true") == 0
    assert "no checkpoint yet: the run starts again at step 0" in caplog.text
    assert differences(whole, training_state(last(folder))) == []


def test_a_restart_before_the_first_checkpoint_repeats_the_start_from_a_full_state(start, run, whole):
    _, short = start("short", *QUIET, "--max_epochs", "2")
    words = ["--resume_from_checkpoint", str(short / "checkpoints" / "last.ckpt"), "--enable_checkpointing", "false"]
    _, folder = start("new", *QUIET, *words)
    assert run("-r", str(folder), "-t", "--enable_checkpointing", "true") == 0
    assert differences(whole, training_state(last(folder))) == []


def test_a_restarted_job_resumes_its_run_without_a_flag(start, run, whole, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    words = ["-b", "toy.yaml", "-t", "-n", "job", *QUIET]
    with monkeypatch.context() as patch:
        patch.setattr(toys.Toy, "event", lambda self: self.happen("error" if self.trainer.global_step == 6 else None))
        assert run(*words) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(*words) == 0
    (folder,) = Path("logs").glob("*_job*")
    assert differences(whole, training_state(last(folder))) == []


def test_a_resumed_run_without_training_is_evaluated_with_its_checkpoint(start, run, caplog):
    caplog.set_level("INFO", logger="ldm")
    test_set = ["+data.params.test.target=tests.toys.Images"]
    _, folder = start("t", *QUIET, *test_set)
    assert run("-r", str(folder)) == 0
    values = re.findall(r"test/loss (\S+)", caplog.text)
    assert len(values) == 2 and values[0] == values[1]


def test_a_signal_before_training_ends_with_its_exit_code_and_one_line(tmp_path):
    """From main.py's first line on: here while torch is imported, and while the data is built."""
    OmegaConf.save(OmegaConf.create(toys.CONFIG), tmp_path / "toy.yaml")
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), int(os.environ['NUMBER']))")
    words = [sys.executable, str(ROOT / "main.py"), "--allow-targets", "tests", "-b", "toy.yaml", "-t"]
    for name, code in (("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)):
        number = str(int(getattr(signal, name)))
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "NUMBER": number}
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
        lines = [line for line in result.stderr.splitlines() if "config" not in line]
        assert (result.returncode, lines) == (code, [f"stopped by {name} before training began"])


# ---- signals


def test_sigusr1_saves_and_training_continues(start):
    code, folder = start("usr1", *QUIET, "+model.params.at.2=SIGUSR1", "+model.params.at.3=error")
    assert code == 1 and last(folder)["global_step"] == 3


def test_sigusr2_opens_a_debugger(start, monkeypatch):
    opened = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: opened.append(True))
    assert start("usr2", *QUIET, "+model.params.at.2=SIGUSR2", "--max_epochs", "1")[0] == 0 and opened == [True]


@pytest.mark.parametrize("event, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_stop_the_run_with_its_state_saved(start, event, code, caplog):
    caplog.set_level("INFO", logger="ldm")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    stopped, folder = start("signal", *QUIET, f"+model.params.at.5={event}")
    assert stopped == code and last(folder)["global_step"] == 6
    assert f"continue with --resume {folder}" in caplog.text
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def test_a_second_ctrl_c_ends_the_process_at_once(run):
    """main.py as a program of its own, started in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["--allow-targets", "tests", "-b", "toy.yaml", "-t", "-n", "twice", *QUIET]
    words = [sys.executable, str(ROOT / "main.py"), *words, "+model.params.at.2=SIGINT twice"]
    result = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert result.returncode == 130 and "Traceback" not in result.stderr, result.stderr
    assert (
        "press again to stop immediately" in result.stderr
        and not (folder_of("twice") / "checkpoints" / "last.ckpt").exists()
    )


# ---- errors


def test_an_exception_is_shown_and_saves_crash_but_not_last(start, capsys):
    code, folder = start("crash", *QUIET, "+model.params.at.6=error")
    assert code == 1
    errors = capsys.readouterr().err
    assert (
        "Traceback" in errors and "RuntimeError: a bug in the model" in errors and "error: a bug in the model" in errors
    )
    assert last(folder)["global_step"] == 4
    assert read_checkpoint(folder / "checkpoints" / "crash.ckpt")["global_step"] == 6


@pytest.mark.parametrize("words", [[], [GAN], ["--accumulate_grad_batches", "2"]], ids=["plain", "gan", "acc2"])
def test_a_loss_that_is_not_finite_stops_before_the_update(start, words, capsys):
    _, before = start("before", *QUIET, *words, "--max_epochs", "1")
    code, folder = start("nan", *QUIET, *words, "+model.params.at.4=nan")
    errors = capsys.readouterr().err
    assert code == 1 and "Traceback" not in errors and re.search("rank 0: the loss is nan", errors)
    for file in ("last.ckpt", "crash.ckpt"):
        state = read_checkpoint(folder / "checkpoints" / file)["state_dict"]
        assert differences(last(before)["state_dict"], state) == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["-b", "toy.yaml", "-t", "model.params.widht=3"], "did you mean model.params.width"),
        (["-b", "toy.yaml", "-t", "--max_epoch", "3"], "did you mean --max_epochs"),
        (["-b", "missing.yaml", "-t"], "missing.yaml"),
        (["-b", "toy.yaml"], "nothing to do"),
        (["-b", "toy.yaml", "-t", "--gpus", "0,9"], "--gpus 0,9: no GPU"),
        (["-b", "toy.yaml", "-t", "--accelerator", "dp"], "use --strategy ddp"),
        (["-b", "toy.yaml", "-t", "model.base_learning_rate=null"], "model.base_learning_rate"),
        (["-b", "toy.yaml", "-t", "model.target=os.system"], "'os.system' is not allowed"),
        (
            [
                "-b",
                "toy.yaml",
                "-t",
                "data.params.train.target=ldm.data.folder.ImageFolder",
                "+data.params.train.params.root=gone",
            ],
            "gone",
        ),
        (["-b", "toy.yaml", "-t", "--val_check_interval", "100"], "val_check_interval"),
        (["-b", "toy.yaml", "-t", "--resume_from_checkpoint", "gone.ckpt"], "gone.ckpt"),
        (["-r", "logs/gone", "-t"], "logs/gone"),
        (["-b", "toy.yaml", "-t", "--max_epochs", "-3"], "max_epochs"),
        (["-b", "toy.yaml", "-t", "-n", "../up"], "--name"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, capsys, words, message):
    assert run(*words) == 2
    out = capsys.readouterr()
    errors = [line for line in out.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in out.err
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize(
    "word, message, data",
    [
        ("lightning.trainer.logger=potato", "trainer.logger 'potato': expected true or false or null", False),
        ("lightning.trainer.deterministic=potato", "expected true or false or 'warn' or null", False),
        ("lightning.trainer.checkpoint_callback=potato", "expected true or false or null", False),
        ("lightning.trainer.max_time=00:00:99:99", "expected a duration 'DD:HH:MM:SS'", False),
        ("lightning.trainer.max_time={hour: 2}", "expected a duration 'DD:HH:MM:SS'", False),
        ("--strategy=ddp_find_unused_parameter", "expected one of auto, ddp, ", False),
        ("lightning.trainer.strategy=fspd", "did you mean 'fsdp'", False),
        ("lightning.trainer.profiler=potato", "expected one of simple, advanced, pytorch, xla", False),
        ("lightning.trainer.profiler=xla", "choose simple, advanced or pytorch", False),
        ("lightning.trainer.barebones=true", "barebones", False),
        ("lightning.trainer.accelerator=potato", "invalid accelerator name", False),
        ("lightning.logger.params={flush_logs_every_n_steps: 0}", "expected an integer >= 1", False),
        ("lightning.trainer.val_check_interval=2.5", "expected an integer >= 1 or a number in (0, 1]", False),
        ("lightning.trainer.val_check_interval=7", "expected 1 to 4, the training batches of an epoch", True),
        ("lightning.trainer.limit_val_batches=0.1", "no batch of 2 in data.params.validation; set at least 0.5", True),
    ],
)
def test_trainer_settings_are_refused_before_the_model_is_built(run, capsys, monkeypatch, word, message, data):
    monkeypatch.setattr(toys.Toy, "__init__", None)
    monkeypatch.setattr(toys.Images, "__init__", toys.Images.__init__ if data else None)
    assert run("-b", "toy.yaml", "-t", "lightning.trainer.logger=true", word) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert line.startswith("error: ") and message in line


def test_an_incompatible_torchvision_is_named_with_the_fix(run, capsys, monkeypatch):
    original = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "pytorch_lightning" and args and (args[0] or {}).get("__name__") == "ldm.cli":
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert run("-b", "toy.yaml", "-t") == 2
    assert "pip uninstall torchvision" in capsys.readouterr().err


def test_debug_shows_the_traceback(run, capsys):
    assert run("-b", "toy.yaml", "-t", "--debug", "model.params.widht=3") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_file_of_weights_alone_cannot_be_resumed(start, run, capsys):
    _, folder = start("w", *QUIET, "+lightning.modelcheckpoint.params.save_weights_only=true", "--max_epochs", "1")
    assert run("-r", str(folder), "-t", "--max_epochs", "2") == 2
    assert "holds only weights" in capsys.readouterr().err


def test_hostile_configs_in_a_resumed_folder_are_refused(start, run, capsys):
    _, folder = start("h", *QUIET, "--max_epochs", "1")
    (folder / "configs" / "zzz.yaml").write_text(
        "lightning:\n  callbacks:\n    x: {target: os.system, params: {command: 'touch owned'}}\n"
    )
    assert run("-r", str(folder), "-t", "--max_epochs", "2") == 2
    assert "os.system" in capsys.readouterr().err and not Path("owned").exists()


# ---- module


def test_main_has_the_published_names():
    from ldm.callbacks import CUDACallback, ImageLogger, SetupCallback
    from ldm.data.datamodule import DataModuleFromConfig

    assert (main.DataModuleFromConfig, main.ImageLogger, main.SetupCallback) == (
        DataModuleFromConfig,
        ImageLogger,
        SetupCallback,
    )
    assert main.CUDACallback is CUDACallback
    with pytest.raises(AttributeError):
        main.nothing  # noqa: B018


def test_images_are_written_as_grids(start):
    _, folder = start("images", "--max_epochs", "1", "lightning.callbacks.image_logger.params.log_first_step=true")
    image = Image.open(folder / "images/train/inputs_gs-000000_e-000000_b-000000.png")
    assert image.mode == "RGB" and image.size == (2 + 2 * (2 + 2), 2 + (2 + 2))
