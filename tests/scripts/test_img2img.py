"""scripts/img2img.py as a user runs it, and the laws of drawing from a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import run_command
from ldm.data.image import from_tensor, to_array
from ldm.inference import Pipeline, image_to_image
from ldm.inference.requests import ImageToImageRequest
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.registry import SAMPLERS
from ldm.output.images import read_metadata
from ldm.paths import ROOT
from scripts.img2img import main, parser
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import SavedModel

TINY = {"height": 16, "width": 24, "steps": 5, "n_samples": 2, "scale": 3.0}


def draw(pipeline: Pipeline, image: Image.Image, prompts="a cat", **changes) -> list[np.ndarray]:
    drawn = image_to_image(pipeline, image, ImageToImageRequest(prompt=prompts, **{**TINY, **changes}), progress=False)
    return [np.asarray(p.image) for p in drawn]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("strength", [0.2, 0.75, 1.0])
def test_a_seed_gives_the_published_picture(saved, pipeline, image, strength, eta):
    """The published order: seed, posterior, then for each batch the start's noise and the steps'; t_enc = int(strength * steps)."""
    model, expected = saved.model, []
    torch.manual_seed(5)
    with torch.no_grad(), model.ema_scope():
        x = torch.from_numpy(to_array(image)).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
        z0 = model.get_first_stage_encoding(model.encode_first_stage(x))
        sampler = DDIMSampler(model)
        sampler.make_schedule(5, ddim_eta=eta, verbose=False)
        for _ in range(2):
            uncond, cond = model.get_learned_conditioning([""] * 2), model.get_learned_conditioning(["a cat"] * 2)
            z = sampler.stochastic_encode(z0, torch.tensor([int(strength * 5)] * 2))
            z = sampler.decode(z, cond, int(strength * 5), 3.0, uncond, verbose=False)
            expected += [np.asarray(from_tensor(x)) for x in model.decode_first_stage(z)]
    assert same(draw(pipeline, image, strength=strength, eta=eta, seed=5, n_iter=2), expected)


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
def test_every_strength_works_with_every_number_of_steps(pipeline, image, steps, monkeypatch):
    walked = []
    monkeypatch.setattr(Sampler, "decode", lambda self, z, cond, t_start, *a, **k: walked.append(t_start) or z)
    strengths = [k / 20 for k in range(21)]
    for strength in strengths:
        draw(pipeline, image, strength=strength, steps=steps, n_samples=1)
    assert walked == [int(s * steps) for s in strengths if int(s * steps)]


def test_strength_0_gives_back_the_picture_as_the_first_stage_sees_it(saved, pipeline, image):
    torch.manual_seed(42)
    with torch.no_grad():
        x = torch.from_numpy(to_array(image)).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
        z = saved.model.get_first_stage_encoding(saved.model.encode_first_stage(x))
        expected = [np.asarray(from_tensor(x)) for x in saved.model.decode_first_stage(z)]
    assert same(draw(pipeline, image, strength=0.0), expected)
    assert same(draw(pipeline, image, strength=0.19), expected)  # int(0.19 * 5) is 0
    assert len(list(image_to_image(pipeline, image, ImageToImageRequest(prompt="", **{**TINY, "strength": 0.0})))) == 2


def test_strength_1_draws_from_noise_alone(pipeline, image):
    other = Image.fromarray(255 - np.asarray(image))
    assert same(draw(pipeline, image, strength=1.0), draw(pipeline, other, strength=1.0))
    assert not same(draw(pipeline, image, strength=0.6), draw(pipeline, other, strength=0.6))


def test_more_strength_moves_further_from_the_picture(pipeline, image):
    start = draw(pipeline, image, strength=0.0, n_samples=1)[0].astype(float)
    moved = [np.abs(draw(pipeline, image, strength=s, n_samples=1)[0] - start).mean() for s in (0.2, 0.6, 1.0)]
    assert moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_starts_from_a_picture(pipeline, image, name):
    other = Image.fromarray(255 - np.asarray(image))
    some = {"n_samples": 1, "sampler": name}
    assert same(draw(pipeline, image, strength=0.0, **some), draw(pipeline, image, strength=0.0, n_samples=1))
    assert same(draw(pipeline, image, strength=1.0, **some), draw(pipeline, other, strength=1.0, **some))
    halves = draw(pipeline, image, strength=0.6, **some)
    assert not same(halves, draw(pipeline, other, strength=0.6, **some)) and same(
        halves, draw(pipeline, image, strength=0.6, **some)
    )


def test_fixed_code_starts_every_batch_from_the_same_noise(pipeline, image):
    a, b, c, d = draw(pipeline, image, fixed_code=True, n_iter=2)
    assert np.array_equal(a, c) and np.array_equal(b, d) and not np.array_equal(a, b)


def test_a_smaller_last_batch_of_prompts_is_drawn_too(pipeline, image):
    assert len(draw(pipeline, image, ["a", "b", "c"], n_iter=2)) == 6


def arguments(saved: SavedModel, image_file, outdir, *flags: str) -> list[str]:
    model = [
        "--config",
        str(saved.config),
        "--ckpt",
        str(saved.ckpt),
        "--outdir",
        str(outdir),
        "--device",
        "cpu",
        "--precision",
        "full",
    ]
    return [*model, "--init-img", str(image_file), "--ddim_steps", "3", *flags]


def test_a_picture_of_any_size_is_resized_to_the_nearest_that_the_model_takes_in_one_line(
    saved, tmp_path, caplog, capsys
):
    Image.new("RGB", (37, 20), "red").save(tmp_path / "a.jpg")
    with caplog.at_level("INFO"):
        assert run_command(main, arguments(saved, tmp_path / "a.jpg", tmp_path, "--n_iter", "2")) == 0
    assert sum("resized from 37x20 to 40x16 pixels" in r.message for r in caplog.records) == 1
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert written == ["grid-0000.png", *(f"samples/0000{k}.png" for k in range(4))]
    assert Image.open(tmp_path / "samples" / "00000.png").size == (40, 16)
    info = read_metadata(tmp_path / "samples" / "00003.png")
    expected = {
        "task": "img2img",
        "init_img": str(tmp_path / "a.jpg"),
        "strength": 0.75,
        "scale": 5.0,
        "height": 16,
        "width": 40,
    }
    assert {key: info[key] for key in expected} == expected and "4 images in" in capsys.readouterr().out
    run_command(main, arguments(saved, tmp_path / "a.jpg", tmp_path))
    assert len(list((tmp_path / "samples").iterdir())) == 6


def test_flags_have_the_published_defaults():
    opt = vars(parser().parse_args([]))
    published = {
        "prompt": "a painting of a virus monster playing guitar",
        "ddim_steps": 50,
        "ddim_eta": None,
        "n_iter": 1,
        "n_samples": 2,
    }
    published |= {
        "n_rows": 0,
        "scale": 5.0,
        "strength": 0.75,
        "seed": 42,
        "precision": "auto",
        "outdir": "outputs/img2img-samples",
    }
    published |= {
        "config": "configs/stable-diffusion/v1-inference.yaml",
        "ckpt": "models/ldm/stable-diffusion-v1/model.ckpt",
    }
    flags = ("plms", "fixed_code", "skip_grid", "skip_save")
    assert {name: opt[name] for name in published} == published and not any(opt[name] for name in flags)
    assert not {"H", "W", "dpm_solver", "laion400m"} & opt.keys()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--plms"], "--plms: not supported by img2img"),
        (["--init-img", ""], "--init-img: pass the image"),
        (["--init-img", "nowhere.png"], "nowhere.png: no such file"),
        (["--strength", "1.5"], "--strength 1.5: choose 0"),
        (["--strength", "nan"], "--strength nan"),
        (["--ddim_steps", "101"], "--ddim_steps 101: choose 1 to 100"),
        (["--n_samples", "0"], "--n_samples 0"),
        (["--sampler", "pmls"], "--sampler pmls: choose one of ddim, plms"),
        (["--ckpt", "nowhere.ckpt"], "checkpoint nowhere.ckpt: no such file"),
        (["--init_img", "a.png"], "did you mean --init-img?"),
        (["--H", "512"], "unknown flag --H"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(saved, tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.setattr("ldm.inference.load_model", None)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    assert words in refused(main, arguments(saved, tmp_path / "a.png", tmp_path / "out", *flags), capsys)
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "--strength" in help_without_heavy_imports(ROOT / "scripts" / "img2img.py", tmp_path)
