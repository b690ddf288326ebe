"""One image of a run can be repeated: by its own seed, by its index in the run, and from its PNG alone."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint.source import DiffusersFolder
from ldm.cli import run_command
from ldm.config.model_info import model_info
from ldm.inference import Pipeline, generate_samples, image_to_image, load_model, text_to_image
from ldm.inference import from_metadata as redraw
from ldm.inference.requests import ClassConditionalRequest, ImageToImageRequest, TextToImageRequest
from ldm.inference.settings import MAX_SEED
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from ldm.output.images import read_metadata
from scripts import img2img, txt2img
from tests.scripts.refusals import refused
from tests.tiny import SavedModel, model_flags, save_model, text_model_config

TINY = {"height": 16, "width": 24, "steps": 3, "n_iter": 1, "scale": 3.0, "seed": 5}
PROMPTS = ["a cat", "a dog", "", "a red bird", "a cat"]
NOISY = [
    ("ddim", 0.0),
    ("ddim", 1.0),
    ("plms", None),
    ("dpm_solver", None),
    ("euler_ancestral", None),
    ("dpmpp_2m_sde", None),
]


def text(pipeline: Pipeline, prompts=PROMPTS, only: int | None = None, **changes) -> list[np.ndarray]:
    results = text_to_image(
        pipeline, TextToImageRequest(prompt=prompts, **{**TINY, **changes}), progress=False, only=only
    )
    return [np.asarray(p.image) for p in results]


def from_image(pipeline: Pipeline, image: Image.Image, only: int | None = None, **changes) -> list[np.ndarray]:
    results = image_to_image(
        pipeline, image, ImageToImageRequest(prompt=PROMPTS, **{**TINY, **changes}), progress=False, only=only
    )
    return [np.asarray(p.image) for p in results]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def within_a_step(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and np.abs(np.stack(a).astype(int) - np.stack(b)).max() <= 1


# --- a seed of its own


@pytest.mark.parametrize("sampler, eta", NOISY)
def test_images_with_their_own_seeds_are_the_same_in_batches_of_any_size(pipeline, sampler, eta):
    options = {"sampler": sampler, "eta": eta, "seed_mode": "image"}
    one, two, three = (text(pipeline, n_samples=n, **options) for n in (1, 2, 3))
    assert within_a_step(one, two) and within_a_step(one, three)
    assert not np.array_equal(one[0], one[4])  # the same prompt at another place
    for k in (0, 3):
        alone = text(pipeline, PROMPTS[k], n_samples=1, **{**options, "seed": TINY["seed"] + k})
        assert same(alone, [one[k]]) and same(text(pipeline, only=k, n_samples=3, **options), [one[k]])


@pytest.mark.parametrize("sampler, eta", NOISY)
def test_images_from_an_image_with_their_own_seeds_are_the_same_in_batches_of_any_size(pipeline, image, sampler, eta):
    options = {"sampler": sampler, "eta": eta, "strength": 0.0 if sampler == "plms" else 0.7, "seed_mode": "image"}
    one, two, three = (from_image(pipeline, image, n_samples=n, **options) for n in (1, 2, 3))
    assert within_a_step(one, two) and within_a_step(one, three) and not np.array_equal(one[0], one[4])
    assert same(from_image(pipeline, image, only=3, n_samples=2, **options), [one[3]])


def test_class_samples_with_their_own_seeds_are_the_same_in_batches_of_any_size(tmp_path):
    saved = save_model(tmp_path, "class", timesteps=10)
    classes = load_model(saved.config, saved.ckpt, "cpu", "full")

    def generate(batch_size: int, **changes) -> list[np.ndarray]:
        settings = ClassConditionalRequest(
            n_samples=4, batch_size=batch_size, steps=3, seed_mode="image", scale=2.0, **changes
        )
        return [np.asarray(p.image) for p in generate_samples(classes, settings, progress=False)]

    for changes in ({}, {"sampler": "euler_ancestral"}, {"vanilla": True}):
        assert within_a_step(generate(1, **changes), generate(3, **changes)) and not np.array_equal(
            *generate(2, **changes)[:2]
        )


def test_the_last_seed_is_followed_by_the_first(pipeline):
    _, second = text(pipeline, "a cat", n_samples=2, seed_mode="image", seed=MAX_SEED)
    assert within_a_step([second], text(pipeline, "a cat", n_samples=1, seed_mode="image", seed=0))


# --- its place in the run


@pytest.mark.parametrize("sampler, eta", NOISY)
@pytest.mark.parametrize("prompts, place", [("a cat", 3), (PROMPTS, 4), (PROMPTS, 7)])
def test_an_image_alone_equals_that_of_the_whole_run(pipeline, sampler, eta, prompts, place):
    options = {"sampler": sampler, "eta": eta, "n_samples": 2, "n_iter": 2}
    assert same(text(pipeline, prompts, only=place, **options), [text(pipeline, prompts, **options)[place]])


@pytest.mark.parametrize("changes", [{}, {"fixed_code": True}, {"strength": 0.0}, {"sampler": "euler_ancestral"}])
def test_an_image_from_an_image_alone_equals_that_of_the_whole_run(pipeline, image, changes):
    options = {"n_samples": 2, "eta": None, **changes}
    assert same(from_image(pipeline, image, only=4, **options), [from_image(pipeline, image, **options)[4]])


def test_the_network_does_not_run_for_skipped_images(pipeline, monkeypatch):
    calls, inner = [], pipeline.model.apply_model
    monkeypatch.setattr(pipeline.model, "apply_model", lambda *args: calls.append(1) or inner(*args))
    text(pipeline, "a cat", only=8, n_samples=2, n_iter=5, eta=1.0)
    assert len(calls) == TINY["steps"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_silent_model_uses_the_same_random_numbers(pipeline, name):
    from ldm.inference.randomness import SilentModel

    states = []
    for model, cond in ((pipeline.model, pipeline.encode_prompts(["a"])[0]), (SilentModel(pipeline.model), None)):
        torch.manual_seed(0)
        make_sampler(name, model).sample(S=4, batch_size=1, shape=(4, 4, 4), conditioning=cond, verbose=False)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_an_index_outside_the_run_is_refused(pipeline):
    with pytest.raises(ValueError, match="image 5: this run has images 0 to 4"):
        text(pipeline, only=5)


# --- its file alone


def arguments(saved: SavedModel, outdir, *flags: str) -> list[str]:
    return [*model_flags(saved, outdir), "--ddim_steps", "3", *flags]


def saved_images(outdir) -> list[tuple[np.ndarray, dict]]:
    return [(np.asarray(Image.open(path)), read_metadata(path)) for path in sorted((outdir / "samples").glob("*.png"))]


EVERYTHING = [
    "--sampler",
    "dpmpp_2m_sde",
    "--ddim_eta",
    "0.5",
    "--spacing",
    "karras",
    "--guidance_rescale",
    "0.7",
    "--guidance_interval",
    "0.1",
    "5.4",
    "--deep_cache",
    "2",
    "--token_merging",
    "0.5",
    "--emphasis",
]
EVERYTHING += [
    "--dynamic_threshold",
    "0.99",
    "--negative_prompt",
    "blurry",
    "--scale",
    "4",
    "--seed",
    "9",
    "--long_prompts",
]
EVERYTHING += ["--tiled", "16", "--no-use_ema"]


@pytest.mark.parametrize(
    "mode, flags", [("batch", ["--plms", "--fixed_code"]), ("batch", EVERYTHING), ("image", EVERYTHING)]
)
def test_txt2img_repeats_an_image_from_its_metadata(saved, tmp_path, mode, flags):
    (tmp_path / "prompts.txt").write_text("a (cat:1.4)\n" + "many words " * 20 + "\nbirds\n", encoding="utf-8")
    many = ["--from-file", str(tmp_path / "prompts.txt"), "--n_samples", "2", "--n_iter", "2", "--H", "24", "--W", "16"]
    assert run_command(txt2img.main, arguments(saved, tmp_path / "a", "--seed_mode", mode, *many, *flags)) == 0
    before = saved_images(tmp_path / "a")
    assert len(before) == 6
    for k in (2, 4):
        file = tmp_path / "a" / "samples" / f"{k:05}.png"
        assert run_command(txt2img.main, ["--from-metadata", str(file), "--outdir", str(tmp_path / f"b{k}")]) == 0
        ((pixels, info),) = saved_images(tmp_path / f"b{k}")
        assert info == before[k][1]
        assert np.array_equal(pixels, before[k][0]) or (mode == "image" and within_a_step([pixels], [before[k][0]]))
        assert not list((tmp_path / f"b{k}").glob("grid*"))


@pytest.mark.parametrize("mode", ["batch", "image"])
def test_img2img_repeats_an_image_from_its_metadata(saved, tmp_path, image, mode):
    image.save(tmp_path / "a.png")
    flags = [
        "--init-img",
        str(tmp_path / "a.png"),
        "--strength",
        "0.7",
        "--ddim_eta",
        "1",
        "--n_samples",
        "3",
        "--seed_mode",
        mode,
    ]
    assert run_command(img2img.main, arguments(saved, tmp_path / "a", *flags, "--tiled", "16", "--n_iter", "2")) == 0
    before = saved_images(tmp_path / "a")
    again = ["--from-metadata", str(tmp_path / "a" / "samples" / "00004.png"), "--outdir", str(tmp_path / "b")]
    assert run_command(img2img.main, again) == 0
    ((pixels, info),) = saved_images(tmp_path / "b")
    assert info == before[4][1] and within_a_step([pixels], [before[4][0]])
    assert mode == "image" or np.array_equal(pixels, before[4][0])


def test_an_image_that_was_repeated_can_be_repeated(saved, tmp_path):
    run_command(
        txt2img.main,
        arguments(saved, tmp_path / "a", "--H", "16", "--W", "16", "--seed_mode", "image", "--n_samples", "2"),
    )
    for before, after in ("ab", "bc"):
        file = sorted((tmp_path / before / "samples").iterdir())[-1]
        assert run_command(txt2img.main, ["--from-metadata", str(file), "--outdir", str(tmp_path / after)]) == 0
    (_, _, _, a), (b,), (c,) = (saved_images(tmp_path / name) for name in "abc")
    assert np.array_equal(b[0], c[0]) and within_a_step([a[0]], [b[0]]) and a[1] == b[1] == c[1]


@pytest.mark.parametrize("mark", ["dwtDctSvd", "off"])
def test_the_watermark_is_repeated_but_the_safety_check_is_the_users_choice(saved, tmp_path, mark):
    pytest.importorskip("imwatermark")
    flags = [
        "--H",
        "256",
        "--W",
        "256",
        "--n_samples",
        "1",
        "--n_iter",
        "1",
        "--watermark",
        mark,
        "--safety",
        "off",
        "--skip_grid",
    ]
    assert run_command(txt2img.main, arguments(saved, tmp_path / "a", *flags, "--ddim_steps", "1")) == 0
    command = ["--from-metadata", str(tmp_path / "a" / "samples" / "00000.png"), "--outdir", str(tmp_path / "b")]
    assert run_command(txt2img.main, command) == 0
    ((a, before),), ((b, after),) = saved_images(tmp_path / "a"), saved_images(tmp_path / "b")
    assert (
        np.array_equal(a, b)
        and before["watermark"] == after["watermark"]
        and (mark == "off") == (after["watermark"] is None)
    )
    opt = redraw.parse(txt2img.parser, command, "txt2img")
    assert opt.watermark == mark and opt.safety is None


def test_a_grid_is_repeated_whole(saved, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nbirds\n", encoding="utf-8")
    small = ["--H", "16", "--W", "16", "--n_samples", "2"]
    for name, flags in (("list", ["--from-file", str(tmp_path / "prompts.txt")]), ("one", ["--prompt", "a cat"])):
        run_command(txt2img.main, arguments(saved, tmp_path / name, *small, *flags))
        assert (
            run_command(
                txt2img.main,
                ["--from-metadata", str(tmp_path / name / "grid-0000.png"), "--outdir", str(tmp_path / f"{name}2")],
            )
            == 0
        )
        before, after = (np.asarray(Image.open(tmp_path / folder / "grid-0000.png")) for folder in (name, f"{name}2"))
        assert np.array_equal(before, after)


def test_flags_replace_metadata(saved, tmp_path):
    run_command(
        txt2img.main,
        arguments(
            saved, tmp_path / "a", "--H", "16", "--W", "16", "--ddim_eta", "1", "--n_samples", "2", "--n_iter", "1"
        ),
    )
    command = ["--from-metadata", str(tmp_path / "a" / "samples" / "00001.png"), "--outdir"]
    assert (
        run_command(
            txt2img.main, [*command, str(tmp_path / "b"), "--seed", "7", "--prompt", "a dog", "--plms", "--W", "24"]
        )
        == 0
    )
    ((pixels, info),) = saved_images(tmp_path / "b")
    said = {"seed": 7, "prompt": "a dog", "sampler": "plms", "eta": 0.0, "steps": 3, "image_index": 1, "width": 24}
    assert {key: info[key] for key in said} == said and pixels.shape == (16, 24, 3)
    assert run_command(txt2img.main, [*command, str(tmp_path / "c"), "--n_samples", "3"]) == 0
    assert [info["prompt"] for _, info in saved_images(tmp_path / "c")] == [txt2img.parser().parse_args([]).prompt] * 3


def test_changed_files_are_refused_unless_a_flag_names_them(saved, tmp_path, image, capsys, caplog):
    image.save(tmp_path / "a.png")
    ckpt, config = tmp_path / "m.ckpt", tmp_path / "m.yaml"
    ckpt.write_bytes(saved.ckpt.read_bytes()), config.write_bytes(saved.config.read_bytes())
    copy = saved._replace(ckpt=ckpt, config=config)
    run_command(
        img2img.main, arguments(copy, tmp_path / "out", "--init-img", str(tmp_path / "a.png"), "--n_samples", "1")
    )
    capsys.readouterr()
    command = ["--from-metadata", str(tmp_path / "out" / "samples" / "00000.png"), "--outdir", str(tmp_path / "again")]
    config.write_text(config.read_text() + "\n")
    assert f"--config {config}: not the file that" in refused(img2img.main, command, capsys)
    config.write_bytes(saved.config.read_bytes())
    image.rotate(180).save(tmp_path / "a.png")
    assert "--init-img" in refused(img2img.main, command, capsys) and not (tmp_path / "again").exists()
    with caplog.at_level("WARNING"):
        assert run_command(img2img.main, [*command, "--init-img", str(tmp_path / "a.png")]) == 0
    capsys.readouterr()
    assert sum("the image will differ" in record.message for record in caplog.records) == 1
    ckpt.unlink()
    assert "m.ckpt: no such file" in refused(img2img.main, [*command, "--init-img", str(tmp_path / "a.png")], capsys)


def test_folders_are_compared_by_fingerprint_too(tmp_path):
    recorded = redraw.Recorded("x.png", {"depth_fingerprint": "then"}, frozenset())
    opt = Namespace(recorded=recorded, device="cpu", seed_mode="batch", depth=str(tmp_path))
    info = model_info(text_model_config(), tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=f"--depth {tmp_path}: not the file that x.png was generated with"):
        redraw.check_unchanged(opt, info, DiffusersFolder(tmp_path / "none"))
    opt.recorded = redraw.Recorded("x.png", {"ckpt_fingerprint": "then"}, frozenset())
    source = DiffusersFolder(tmp_path)
    said = f"--ckpt {tmp_path}: not the file that x.png was generated with .fingerprint {source.fingerprint}, then then"
    with pytest.raises(ValueError, match=said):
        redraw.check_unchanged(opt, info, source)


def test_images_that_cannot_be_repeated_are_refused_in_one_line(saved, tmp_path, capsys):
    run_command(txt2img.main, arguments(saved, tmp_path, "--H", "16", "--W", "16", "--n_samples", "1", "--n_iter", "1"))
    capsys.readouterr()
    file = str(tmp_path / "samples" / "00000.png")
    assert "this image was generated by txt2img, not by img2img" in refused(
        img2img.main, ["--from-metadata", file], capsys
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert "no settings in the metadata" in refused(
        txt2img.main, ["--from-metadata", str(tmp_path / "plain.png")], capsys
    )
    assert "nowhere.png" in refused(txt2img.main, ["--from-metadata", str(tmp_path / "nowhere.png")], capsys)
    assert "--fixed_code with --seed_mode image" in refused(
        txt2img.main, ["--fixed_code", "--seed_mode", "image"], capsys
    )


def test_an_unavailable_device_is_replaced_with_a_warning(saved, tmp_path, caplog, monkeypatch):
    run_command(txt2img.main, arguments(saved, tmp_path, "--H", "16", "--W", "16", "--n_samples", "1", "--n_iter", "1"))
    monkeypatch.setattr(
        "ldm.inference.from_metadata.read_metadata", lambda path: {**read_metadata(path), "device": "cuda"}
    )
    if not torch.cuda.is_available():
        with caplog.at_level("WARNING"):
            assert (
                run_command(
                    txt2img.main,
                    ["--from-metadata", str(tmp_path / "samples" / "00000.png"), "--outdir", str(tmp_path / "b")],
                )
                == 0
            )
        assert "was generated on cuda, which is not available" in caplog.text
