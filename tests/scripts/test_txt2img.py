"""scripts/txt2img.py as a user runs it, on a model of 0.1 M parameters."""

import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm.cli import run_command
from ldm.config.model_info import model_info, read_config
from ldm.inference import memory
from ldm.output.images import read_metadata
from ldm.paths import ROOT
from scripts.txt2img import main, parser, request_of
from tests.tiny import SavedModel, model_flags

SCRIPT = ROOT / "scripts" / "txt2img.py"
INFO = model_info(read_config(ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"))


def arguments(saved: SavedModel, outdir, *flags: str) -> list[str]:
    """A quick command line; later flags win."""
    size = ["--H", "16", "--W", "16", "--ddim_steps", "2", "--n_samples", "2", "--n_iter", "1"]
    return [*model_flags(saved, outdir), *size, *flags]


def pixels(outdir) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((outdir / "samples").glob("*.png"))]


def refused(argv: list[str], capsys) -> str:
    """The one line that the script ends with, exit code 2."""
    try:
        code = run_command(main, argv)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_full_disk_leaves_whole_images_and_one_line_with_path_and_bytes(saved, tmp_path, capfd):
    flags = ["--n_iter", "3", "--n_samples", "1", "--H", "80", "--W", "80", "--ddim_steps", "1"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # an image takes about 20 kB
    try:
        assert run_command(main, arguments(saved, tmp_path / "out", *flags)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capfd.readouterr().err.splitlines()[-1]
    image = tmp_path / "out" / "samples" / "00000.png"
    assert line.startswith(f"error: {image}: could not be written: File too large") and "bytes are needed" in line
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_flags_have_the_published_defaults():
    """Defaults of the published command lines; C and f come from the model."""
    opt = vars(parser().parse_args([]))
    assert request_of(parser().parse_args([])).checked(INFO).eta == 0.0
    published = {"prompt": "a painting of a virus monster playing guitar", "ddim_steps": 50, "n_iter": 2}
    published |= {
        "H": 512,
        "W": 512,
        "n_samples": 3,
        "n_rows": 0,
        "scale": 7.5,
        "seed": 42,
        "precision": "auto",
        "from_file": None,
    }
    flags = ("plms", "dpm_solver", "laion400m", "fixed_code", "skip_grid", "skip_save")
    assert {name: opt[name] for name in published} == published and not any(opt[name] for name in flags)


@pytest.mark.parametrize("solver", [[], ["--plms"], ["--dpm_solver"], ["--sampler", "dpmpp_2m_sde"]])
@pytest.mark.parametrize("scale", ["1", "7.5"])
def test_samples_and_grid_are_written_as_published(saved, tmp_path, solver, scale, capsys):
    assert run_command(main, arguments(saved, tmp_path, *solver, "--scale", scale, "--n_iter", "2")) == 0
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert written == ["grid-0000.png", *(f"samples/0000{k}.png" for k in range(4))]
    assert np.asarray(Image.open(tmp_path / "grid-0000.png")).shape == (2 * 18 + 2, 2 * 18 + 2, 3)
    info = read_metadata(tmp_path / "samples" / "00003.png")
    assert info["sampler"] == (solver[-1].strip("-") if solver else "ddim") and info["scale"] == float(scale)
    out = capsys.readouterr().out
    assert "4 images in" in out and str(tmp_path / "samples" / "00000.png") in out


def test_the_same_command_generates_the_same_images_under_new_numbers(saved, tmp_path):
    for _ in range(2):
        run_command(main, arguments(saved, tmp_path, "--seed", "3"))
    a, b, c, d = pixels(tmp_path)
    assert np.array_equal(a, c) and np.array_equal(b, d) and (tmp_path / "grid-0001.png").exists()
    (tmp_path / "samples" / "00001.png").unlink()
    run_command(main, arguments(saved, tmp_path, "--seed", "4", "--n_samples", "1"))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "00000.png",
        "00002.png",
        "00003.png",
        "00004.png",
    ]


@pytest.mark.parametrize("n_prompts", [1, 2, 3, 4, 7])
def test_a_file_of_prompts_gives_an_image_of_each_whatever_their_number(saved, tmp_path, n_prompts):
    prompts = [f"generated number {k}" for k in range(n_prompts)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    flags = ["--from-file", str(tmp_path / "prompts.txt"), "--n_samples", "3", "--n_iter", "2", "--ddim_steps", "1"]
    assert run_command(main, arguments(saved, tmp_path / "out", *flags)) == 0
    infos = [read_metadata(path) for path in sorted((tmp_path / "out" / "samples").iterdir())]
    assert [info["prompt"] for info in infos] == prompts * 2
    assert read_metadata(tmp_path / "out" / "grid-0000.png")["prompts"] == prompts * 2


@pytest.mark.parametrize("free, count", [(0, 1), (10**9, 3)])
def test_an_automatic_batch_is_recorded_as_its_number_and_repeats(saved, tmp_path, monkeypatch, free, count):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    for name, flags in (("one", []), ("list", ["--from-file", str(tmp_path / "prompts.txt"), "--n_iter", "2"])):
        auto, given = ([*arguments(saved, tmp_path / k, *flags), "--n_samples"] for k in (f"{name}-auto", name))
        assert run_command(main, [*auto, "auto"]) == run_command(main, [*given, str(count)]) == 0
        found = sorted((tmp_path / f"{name}-auto" / "samples").iterdir())
        assert len(found) == (6 if flags else count)
        assert all(map(np.array_equal, pixels(tmp_path / f"{name}-auto"), pixels(tmp_path / name)))
        assert {read_metadata(path)["n_samples"] for path in found} == {count}
    again = ["--from-metadata", str(found[-1]), "--outdir", str(tmp_path / "again")]
    assert run_command(main, again) == 0
    assert np.array_equal(np.asarray(Image.open(found[-1])), pixels(tmp_path / "again")[0])


def test_an_automatic_batch_is_refused_where_the_free_memory_is_unknown(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    flags = arguments(saved, tmp_path / "out", "--n_samples", "auto", "--device", "cpu")
    assert "--n_samples auto: the free memory of cpu is unknown; pass a number" in refused(flags, capsys)


def test_a_grid_with_captions_and_the_number_of_columns_asked_for(saved, tmp_path):
    run_command(
        main, arguments(saved, tmp_path, "--n_samples", "3", "--n_rows", "1", "--H", "64", "--W", "64", "--captions")
    )
    image = Image.open(tmp_path / "grid-0000.png")
    assert image.width == 64 + 2 * 12 and image.height > 3 * (64 + 12) + 12 + 3 * 10


def test_skipping_samples_or_grid(saved, tmp_path):
    run_command(main, arguments(saved, tmp_path / "a", "--skip_save"))
    run_command(main, arguments(saved, tmp_path / "b", "--skip_grid"))
    assert [p.name for p in (tmp_path / "a").rglob("*.png")] == ["grid-0000.png"]
    assert sorted(p.name for p in (tmp_path / "b").rglob("*.png")) == ["00000.png", "00001.png"]


def test_everything_that_was_asked_for_is_in_the_metadata(saved, tmp_path):
    flags = [
        "--prompt",
        "a «cat»",
        "--negative_prompt",
        "blurry",
        "--seed",
        "9",
        "--ddim_eta",
        "0.5",
        "--scale",
        "3",
        "--fixed_code",
    ]
    run_command(main, arguments(saved, tmp_path, *flags))
    expected = {
        "prompt": "a «cat»",
        "negative_prompt": "blurry",
        "seed": 9,
        "eta": 0.5,
        "scale": 3.0,
        "steps": 2,
        "sampler": "ddim",
    }
    expected |= {"height": 16, "width": 16, "channels": 4, "factor": 4, "n_samples": 2, "n_iter": 1, "fixed_code": True}
    expected |= {
        "config": str(saved.config),
        "ckpt": str(saved.ckpt),
        "ckpt_bytes": saved.ckpt.stat().st_size,
        "use_ema": True,
    }
    expected |= {"device": "cpu", "precision": "full"}
    for k in range(2):
        info = read_metadata(tmp_path / "samples" / f"0000{k}.png")
        assert {key: info[key] for key in expected} == expected
        assert (info["task"], info["image_index"], info["index_in_batch"], info["watermark"]) == ("txt2img", k, k, None)
        assert info["version"] and len(info["ckpt_fingerprint"]) == len(info["config_fingerprint"]) == 16


def test_laion400m_changes_what_is_not_given(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "txt2img-1p4B-eval.yaml" in refused(
        ["--laion400m", "--config", "configs/latent-diffusion/txt2img-1p4B-eval.yaml.no"], capsys
    )
    config = ["--config", str(saved.config), "--H", "16", "--W", "16"]
    assert "models/ldm/text2img-large/model.ckpt" in refused(["--laion400m", *config], capsys)
    run_command(main, [*arguments(saved, tmp_path / "own", "--laion400m")])
    assert (tmp_path / "own" / "grid-0000.png").exists() and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--H", "20"], "--H 20 --W 16: this model needs multiples of 8 pixels; nearest are --H 16 --W 16"),
        (["--ddim_steps", "101"], "--ddim_steps 101: choose 1 to 100"),
        (["--n_samples", "0"], "--n_samples 0"),
        (["--n_samples", "automatic"], "argument --n_samples: 'automatic': pass a number or auto"),
        (["--n_iter", "0"], "--n_iter 0"),
        (["--n_rows", "-1"], "--n_rows -1"),
        (["--C", "3"], "--C 3: this model's latents have 4 channels"),
        (["--plms", "--ddim_eta", "1"], "--ddim_eta 1"),
        (["--plms", "--dpm_solver"], "not allowed with"),
        (["--plms", "--sampler", "heun"], "not allowed with"),
        (["--sampler", "huen"], "--sampler huen: choose one of ddim, plms"),
        (["--from-file", "nowhere.txt"], "--from-file nowhere.txt: No such file"),
        (["--ckpt", "nowhere.ckpt"], "checkpoint nowhere.ckpt: no such file"),
        (["--config", "nowhere.yaml"], "config nowhere.yaml: no such file"),
        (["--device", "cuda:77"], "--device cuda:77: not available on this machine; choose auto"),
        (["--precision", "half"], "invalid choice: 'half'"),
        (["--n_sample", "3"], "unknown flag --n_sample; did you mean --n_samples?"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(saved, tmp_path, flags, words, capsys, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ldm.inference.load_model", loaded)
    assert words in refused(arguments(saved, tmp_path / "out", *flags), capsys)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def run(saved, tmp_path):
    """A run directory of main.py, as training leaves it."""
    folder = tmp_path / "logs" / "2026-01-01T00-00-00_tiny"
    for part, file in (
        ("checkpoints/last.ckpt", saved.ckpt),
        ("configs/2026-01-01T00-00-00-project.yaml", saved.config),
    ):
        (folder / part).parent.mkdir(parents=True)
        shutil.copy(file, folder / part)
    return folder


@pytest.mark.parametrize("place", ["", "checkpoints/last.ckpt"])
def test_a_run_directory_is_enough_its_config_size_and_last_checkpoint_are_found(run, tmp_path, place, caplog):
    quick = ["--outdir", str(tmp_path / "out"), "--ddim_steps", "1", "--n_samples", "1", "--n_iter", "1"]
    with caplog.at_level("INFO"):
        assert run_command(main, ["--ckpt", str(run / place), "--device", "cpu", *quick]) == 0
    info = read_metadata(tmp_path / "out" / "samples" / "00000.png")
    assert info["config"] == str(run / "configs" / "2026-01-01T00-00-00-project.yaml") and info["safety"] == "off"
    assert info["ckpt"] == str(run / "checkpoints" / "last.ckpt") and info["use_ema"]
    assert (info["width"], info["height"]) == (32, 32) and "32x32 pixels, as in training" in caplog.text


def test_a_config_on_the_command_line_is_used_for_a_run_too(run, tmp_path, capsys):
    (tmp_path / "other.yaml").write_text("model: {}")
    assert "other.yaml" in refused(["--ckpt", str(run), "--config", str(tmp_path / "other.yaml")], capsys)


def test_an_image_is_repeated_with_the_weights_and_the_config_of_another_run(run, saved, tmp_path, caplog):
    assert run_command(main, arguments(saved, tmp_path / "a", "--n_samples", "1")) == 0
    image = tmp_path / "a" / "samples" / "00000.png"
    config = next((run / "configs").iterdir())
    config.write_text(config.read_text() + "\n# another\n")
    again = ["--from-metadata", str(image), "--ckpt", str(run), "--outdir", str(tmp_path / "b")]
    assert run_command(main, again) == 0 and "the image will differ" in caplog.text
    assert read_metadata(tmp_path / "b" / "samples" / "00000.png")["config"] == str(config)


def test_weights_of_another_model_are_refused_in_one_line(saved, tmp_path, capsys):
    (tmp_path / "broken.ckpt").write_bytes(b"no weights")
    assert "broken.ckpt" in refused(arguments(saved, tmp_path / "out", "--ckpt", str(tmp_path / "broken.ckpt")), capsys)


def test_without_stable_diffusions_weights_the_defaults_say_where_to_get_them(tmp_path, capsys, monkeypatch):
    """In a checkout without weights, whatever this one holds."""
    config = tmp_path / "checkout" / "configs" / "stable-diffusion" / "v1-inference.yaml"
    config.parent.mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml", config)
    monkeypatch.setattr("ldm.paths.ROOT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path)
    missing = (
        "models/ldm/stable-diffusion-v1/model.ckpt: no such file; put sd-v1-4.ckpt of https://huggingface.co/CompVis"
    )
    assert missing in refused([], capsys)


MISSPELT = (
    "promt prompts outdirs skipgrid skip-save ddim_step ddimsteps pmls dpm-solver laion400 "
    "fixedcode ddim_ete niter h w n-samples nrows scales form-file sed"
)


@pytest.mark.parametrize("flag", MISSPELT.split())
def test_a_misspelt_flag_is_refused_with_a_suggestion(flag, capsys):
    assert "did you mean --" in refused([f"--{flag}", "1"], capsys)


def test_it_runs_from_any_folder_without_being_installed_and_its_help_is_quick(tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['txt2img.py', sys.argv[2]]\n"
        "try: runpy.run_path(sys.orig_argv[-2], run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print('code', stop.code, [m for m in ('torch', 'omegaconf', 'numpy') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-I", "-c", code, str(SCRIPT), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "--from-file" in shown.stdout and shown.stdout.strip().endswith("code 0 []"), shown.stderr
    wrong = subprocess.run(
        [sys.executable, "-I", "-c", code, str(SCRIPT), "--H=100"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "multiples of 64" in wrong.stderr and "code 2 ['omegaconf']" in wrong.stdout
    missing = subprocess.run(
        [sys.executable, "-I", "-c", code, str(SCRIPT), "--ckpt=~/no.ckpt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    home = os.path.expanduser("~/no.ckpt")
    assert f"checkpoint {home}: no such file" in missing.stderr and "code 2 ['omegaconf']" in missing.stdout


def test_a_program_that_samples_imports_neither_lightning_nor_transformers_nor_the_compiler(saved, tmp_path):
    """They take seconds; a process of its own, because this one has imported them."""
    watch = (
        "import atexit, runpy, sys; atexit.register(lambda: print(*sys.modules)); sys.argv = sys.argv[1:]; "
        "import ldm.modules.encoders.clip; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", watch, str(SCRIPT), *arguments(saved, tmp_path, "--n_samples", "1")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and len(pixels(tmp_path)) == 1, done.stderr
    heavy = {"pytorch_lightning", "torchmetrics", "torchvision", "transformers", "torch._dynamo", "scipy", "sympy"}
    assert heavy.isdisjoint(done.stdout.split()) and "ldm.models.diffusion.ddpm" in done.stdout.split()
