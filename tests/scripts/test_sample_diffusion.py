"""scripts/sample_diffusion.py as a user runs it: exactly N samples, as images and as one array."""

import re
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.cli import run_command
from ldm.data.image import from_tensor
from ldm.inference import generate_samples, load_model
from ldm.inference.requests import ClassConditionalRequest
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.output.images import read_metadata
from ldm.paths import ROOT, fingerprint
from ldm.util import instantiate_from_config
from scripts.sample_diffusion import main, parser
from tests.reference import seed_weights
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import KINDS, SavedModel, save_model, save_text_model


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> SavedModel:
    """An unconditional model laid out as the released ones: model.ckpt beside config.yaml."""
    folder = tmp_path_factory.mktemp("celeba256")
    saved = save_model(folder, "unconditional", timesteps=20)
    return saved._replace(
        config=saved.config.rename(folder / "config.yaml"), ckpt=saved.ckpt.rename(folder / "model.ckpt")
    )


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> SavedModel:
    """A model of classes laid out as a run of our own: checkpoints/last.ckpt and configs/<time>-project.yaml."""
    run = tmp_path_factory.mktemp("logs") / "2026-01-01T00-00-00_tiny"
    (run / "checkpoints").mkdir(parents=True)
    (run / "configs").mkdir()
    saved = save_model(run, "class", timesteps=20)
    config, ckpt = run / "configs" / "2026-01-01T00-00-00-project.yaml", run / "checkpoints" / "last.ckpt"
    return saved._replace(config=saved.config.rename(config), ckpt=saved.ckpt.rename(ckpt))


def arguments(resume, logdir, *flags: str) -> list[str]:
    common = [
        "--device",
        "cpu",
        "--precision",
        "full",
        "-r",
        str(resume),
        "-l",
        str(logdir),
        "-c",
        "2",
        "--batch_size",
        "2",
        "--seed",
        "1",
    ]
    return [*common, *flags]


def result(logdir) -> tuple[list, dict[str, np.ndarray], str]:
    """(images, arrays, name of their file) of the one run in a folder."""
    (array,) = logdir.rglob("*.npz")
    assert not list(array.parent.glob(".*"))
    return sorted(logdir.rglob("img/*.png")), dict(np.load(array)), array.name


@pytest.mark.parametrize("n_samples", [1, 2, 3, 5])
def test_exactly_so_many_samples_as_asked_for_in_the_published_places(released, tmp_path, n_samples, capsys):
    assert run_command(main, arguments(released.ckpt, tmp_path, "-n", str(n_samples))) == 0
    files, arrays, name = result(tmp_path)
    assert [path.name for path in files] == [f"sample_{k:06}.png" for k in range(n_samples)]
    where = files[0].relative_to(tmp_path).as_posix()
    assert re.fullmatch(
        re.escape(released.ckpt.parent.name) + r"/samples/00000007/\d{4}(-\d\d){5}/img/sample_000000.png", where
    )
    assert (
        name == f"{n_samples}x32x32x3-samples.npz" and list(arrays) == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
    )
    assert all(
        np.array_equal(np.asarray(Image.open(path)), array) for path, array in zip(files, arrays["arr_0"], strict=True)
    )
    assert name in capsys.readouterr().out


def test_samples_are_the_published_samplers(released, tmp_path):
    model, expected = released.model, []
    torch.manual_seed(1)
    with torch.no_grad(), model.ema_scope():
        for _ in range(2):
            z, _ = DDIMSampler(model).sample(S=2, batch_size=2, shape=(4, 8, 8), eta=1.0, verbose=False)
            expected += [np.asarray(from_tensor(x)) for x in model.decode_first_stage(z)]
    run_command(main, arguments(released.ckpt.parent, tmp_path, "-n", "4"))
    assert np.array_equal(result(tmp_path)[1]["arr_0"], np.stack(expected))


def test_vanilla_samples_every_timestep_and_logs_the_unused_flags(released, tmp_path, caplog):
    torch.manual_seed(1)
    with torch.no_grad(), released.model.ema_scope():
        z = released.model.sample(batch_size=2, shape=(2, 4, 8, 8))
        expected = np.stack([np.asarray(from_tensor(x)) for x in released.model.decode_first_stage(z)])
    with caplog.at_level("INFO"):
        run_command(main, arguments(released.ckpt, tmp_path, "-n", "2", "-v"))
    assert np.abs(result(tmp_path)[1]["arr_0"].astype(int) - expected).max() <= 1 and "have no effect" in caplog.text


def test_any_sampler_generates_with_a_stream_of_noise_for_each_sample(released, tmp_path):
    flags = ["-n", "3", "--sampler", "euler_ancestral", "--spacing", "karras", "--seed_mode", "image"]
    for size in ("1", "3"):
        assert run_command(main, arguments(released.ckpt, tmp_path / size, *flags, "--batch_size", size)) == 0
    one, three = (result(tmp_path / size) for size in ("1", "3"))
    assert np.abs(one[1]["arr_0"].astype(int) - three[1]["arr_0"]).max() <= 1
    said = {"sampler": "euler_ancestral", "spacing": "karras", "eta": 1.0, "seed_mode": "image", "image_index": 2}
    info = read_metadata(three[0][2])
    assert {key: info[key] for key in said} == said


def test_without_a_logdir_samples_go_into_the_runs_folder_and_two_runs_of_a_second_stay_apart(
    released, tmp_path, monkeypatch
):
    monkeypatch.setattr("time.strftime", lambda form: "2026-01-01-00-00-00")
    shutil.copytree(released.ckpt.parent, tmp_path / "run")
    for _ in range(2):
        assert run_command(main, arguments(tmp_path / "run", "none", "-n", "1")) == 0
    above = tmp_path / "run" / "samples" / "00000007"
    assert sorted(path.name for path in above.iterdir()) == ["2026-01-01-00-00-00", "2026-01-01-00-00-00-1"]
    assert OmegaConf.load(above / "2026-01-01-00-00-00" / "sampling_config.yaml").n_samples == 1


def test_a_run_of_our_own_is_found_by_its_folder_and_by_its_checkpoint(classes, tmp_path):
    run_folder = classes.ckpt.parents[1]
    for k, resume in enumerate((run_folder, classes.ckpt)):
        assert run_command(main, arguments(resume, tmp_path / str(k), "-n", "2")) == 0
        assert (tmp_path / str(k) / run_folder.name / "samples" / "00000007").is_dir()
    one, two = (result(tmp_path / str(k))[1]["arr_0"] for k in range(2))
    assert np.array_equal(one, two)


def test_classes_are_generated_in_turn_and_recorded_in_array_and_metadata(classes, tmp_path):
    assert run_command(main, arguments(classes.ckpt, tmp_path, "-n", "5", "--classes", "3", "0-1")) == 0
    files, arrays, _ = result(tmp_path)
    assert arrays["arr_1"].tolist() == [3, 0, 1, 3, 0] == [read_metadata(path)["class"] for path in files]
    info = read_metadata(files[0])
    expected = {
        "task": "sample_diffusion",
        "steps": 2,
        "eta": 1.0,
        "seed": 1,
        "n_samples": 5,
        "batch_size": 2,
        "scale": 1.0,
    }
    assert {key: info[key] for key in expected} == expected and info["config"] == str(classes.config)
    assert info["config_fingerprint"] == fingerprint(classes.config)


def test_classes_of_a_run_have_names_on_the_command_line_in_the_log_the_metadata_and_the_grid(
    classes, tmp_path, caplog, capsys
):
    listed = classes.ckpt.parents[1] / "configs" / "classes.txt"
    listed.write_text("ape\nred, round\nzebra\n", encoding="utf-8")
    try:
        with caplog.at_level("INFO"):
            flags = ["-n", "4", "--classes", "zebra", "red, round", "0"]
            assert run_command(main, arguments(classes.ckpt, tmp_path, *flags)) == 0
        capsys.readouterr()
        words = "--classes 'zebr': neither a number nor the name of a class; did you mean 'zebra'?"
        assert words in refused(main, arguments(classes.ckpt, tmp_path / "b", "--classes", "ape,zebr"), capsys)
    finally:
        listed.unlink()
    assert "classes: 2 zebra, 1 red, round, 0 ape" in caplog.text
    files, arrays, _ = result(tmp_path)
    assert arrays["arr_1"].tolist() == [2, 1, 0, 2]
    assert [read_metadata(path)["class_name"] for path in files] == ["zebra", "red, round", "ape", "zebra"]
    (grid,) = tmp_path.rglob("grid-*.png")
    assert read_metadata(grid)["classes"] == [2, 1, 0, 2]
    assert Image.open(grid).width == 3 * (32 + 12) + 12 and Image.open(grid).height > 2 * (32 + 12) + 12 + 2 * 10


def test_a_grid_without_classes_is_the_published_one_and_can_be_skipped(released, tmp_path):
    assert run_command(main, arguments(released.ckpt, tmp_path / "a", "-n", "4")) == 0
    assert run_command(main, arguments(released.ckpt, tmp_path / "b", "-n", "4", "--skip_grid")) == 0
    (grid,) = tmp_path.rglob("grid-*.png")
    assert Image.open(grid).size == (2 * 34 + 2, 2 * 34 + 2) and (tmp_path / "a") in grid.parents


def test_without_classes_all_but_the_null_class_are_sampled_equally_often(classes, tmp_path):
    run_command(main, arguments(classes.ckpt, tmp_path, "-n", "10"))
    labels = result(tmp_path)[1]["arr_1"].tolist()
    assert sorted(labels) == sorted([*range(5)] * 2) and labels[:5] == labels[5:] != [*range(5)]


def test_the_class_and_guidance_matter(classes, tmp_path):
    def generate(**changes) -> np.ndarray:
        settings = ClassConditionalRequest(**{"n_samples": 2, "batch_size": 2, "steps": 2, "classes": (1,), **changes})
        return np.stack([np.asarray(p.image) for p in generate_samples(pipeline, settings, progress=False)])

    pipeline = load_model(classes.config, classes.ckpt, "cpu", "full")
    base = generate()
    assert not np.array_equal(base, generate(classes=(2,))) and not np.array_equal(base, generate(scale=4.0))
    guided = generate(scale=4.0)
    assert np.array_equal(guided, generate(scale=4.0, null_class=5)) and not np.array_equal(
        guided, generate(scale=4.0, null_class=0)
    )
    assert not np.array_equal(generate(vanilla=True), generate(vanilla=True, scale=4.0))


@pytest.mark.parametrize("flags", [["-c", "3"], ["-v"]])
def test_a_model_of_pixels_generates_too(tmp_path, flags):
    params = {"unet_config": KINDS["unconditional"]["unet_config"], "channels": 3, "image_size": 8, "timesteps": 10}
    params["unet_config"] = {
        **params["unet_config"],
        "params": {**params["unet_config"]["params"], "in_channels": 3, "out_channels": 3},
    }
    config = OmegaConf.create({"model": {"target": "ldm.models.diffusion.ddpm.DDPM", "params": params}})
    OmegaConf.save(config, tmp_path / "config.yaml")
    torch.save(
        {"state_dict": seed_weights(instantiate_from_config(config["model"])).state_dict()}, tmp_path / "model.ckpt"
    )
    assert run_command(main, arguments(tmp_path, tmp_path / "out", "-n", "3", *flags)) == 0
    assert result(tmp_path / "out")[2] == "3x8x8x3-samples.npz"


def test_overrides_change_the_config_wherever_they_stand(released, tmp_path):
    flags = ["-n", "2", "model.params.image_size=16", "-e", "0"]
    assert run_command(main, [*arguments(released.ckpt, tmp_path), *flags]) == 0
    assert result(tmp_path)[2] == "2x64x64x3-samples.npz"


def test_a_new_seed_each_time_unless_one_is_given(released, tmp_path, capsys):
    seeds = []
    for k in range(2):
        command = arguments(released.ckpt, tmp_path / str(k), "-n", "1")
        del command[command.index("--seed") : command.index("--seed") + 2]
        assert run_command(main, command) == 0
        seeds.append(int(capsys.readouterr().out.split("seed ")[1]))
        assert read_metadata(result(tmp_path / str(k))[0][0])["seed"] == seeds[-1]
    assert seeds[0] != seeds[1]


def test_flags_have_the_published_defaults():
    opt = vars(parser().parse_args([]))
    published = {"resume": None, "n_samples": 50000, "eta": None, "vanilla_sample": False, "logdir": "none"}
    published |= {"custom_steps": 50, "batch_size": 10}
    assert {name: opt[name] for name in published} == published


@pytest.mark.parametrize(
    "flags, words",
    [
        (["-r", "nowhere"], "--resume nowhere: no such file or folder"),
        (["-n", "0"], "--n_samples 0: choose 1 to 1,000,000"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["-c", "21"], "--custom_steps 21: choose 1 to 20"),
        (["-e", "-1"], "--eta -1.0"),
        (["--classes", "1"], "--classes: this model is not class-conditional"),
        (["--classes", "cat"], "--classes 'cat': expected class numbers"),
        (["--scale", "2"], "--scale 2: this model is unconditional"),
        (["model.params.imagesize=3"], "model.params has no imagesize; did you mean model.params.image_size"),
        (["data.params.batch_size=3"], "data.params.batch_size=3: only model. paths can be overridden"),
        (["--custom_step", "3"], "did you mean --custom_steps?"),
        (["-v", "--sampler", "heun"], "not allowed with"),
        (["--sampler", "huen"], "--sampler huen: choose one of ddim, plms"),
        (["--sampler", "plms", "-e", "1"], "--eta 1: plms is deterministic"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(released, tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.setattr("ldm.inference.load_model", None)
    assert words in refused(main, arguments(released.ckpt, tmp_path / "out", *flags), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--classes", "6"], "class 6: this model's classes are 0 to 5"),
        (["--null_class", "9"], "class 9"),
        (["--scale", "nan"], "--scale nan"),
    ],
)
def test_classes_that_the_model_does_not_know_are_refused(classes, tmp_path, flags, words, capsys):
    assert words in refused(main, arguments(classes.ckpt, tmp_path / "out", *flags), capsys)


def test_guidance_without_a_null_class_asks_for_it(tmp_path, capsys):
    saved = save_model(tmp_path, "class", cond_dropout=0.0)
    saved.config.rename(tmp_path / "config.yaml")
    command = arguments(saved.ckpt, tmp_path / "out", "-n", "2", "--scale", "2")
    assert "pass --null_class" in refused(main, command, capsys)
    assert run_command(main, [*command, "--null_class", "5"]) == 0


def test_models_that_need_more_than_a_class_are_sent_to_their_script(tmp_path, capsys):
    saved = save_text_model(tmp_path)
    assert "config is missing (config.yaml or" in refused(main, arguments(saved.ckpt, tmp_path / "out"), capsys)
    saved.config.rename(tmp_path / "config.yaml")
    assert "use scripts/txt2img.py" in refused(main, arguments(saved.ckpt, tmp_path / "out"), capsys)
    (tmp_path / "empty").mkdir()
    assert "no model.ckpt or" in refused(main, arguments(tmp_path / "empty", tmp_path / "out"), capsys)


def test_a_released_models_folder_without_its_weights_names_the_download(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("{}")
    assert "bash scripts/download_models.sh" in refused(main, arguments(tmp_path, tmp_path / "out"), capsys)


def test_an_interrupted_run_leaves_its_images_and_no_half_array(released, tmp_path, monkeypatch):
    def stopped(pipeline, settings):
        yield from list(generate_samples(pipeline, settings, progress=False))[:1]
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.inference.generate_samples", stopped)
    assert run_command(main, arguments(released.ckpt, tmp_path, "-n", "2")) == 130
    (folder,) = tmp_path.rglob("numpy")
    assert list(folder.iterdir()) == [] and len(list(tmp_path.rglob("*.png"))) == 1


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "--custom_steps" in help_without_heavy_imports(ROOT / "scripts" / "sample_diffusion.py", tmp_path)
