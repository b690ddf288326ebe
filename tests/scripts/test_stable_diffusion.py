"""Stable Diffusion v2 and its fine-tunes through the scripts: prompts, inpainting, depth, upscaling."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import inference
from ldm.cli import run_command
from ldm.data.image import from_tensor, load_levels, to_array
from ldm.inference import image_to_image, load_model, text_to_image
from ldm.inference.prompt_weights import PromptEncoder
from ldm.inference.requests import ImageToImageRequest, InpaintRequest, TextToImageRequest, UpscaleRequest
from ldm.inference.tasks.inpaint import feathered
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.output.images import read_metadata
from scripts import img2img, inpaint, txt2img, upscale
from tests.scripts.refusals import refused
from tests.tiny import SavedModel, save_model

KINDS = ("v2", "v2-v", "sd-inpaint", "depth", "x4")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, SavedModel]:
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind, use_ema=False, timesteps=100) for kind in KINDS}


@pytest.fixture(scope="module")
def pipelines(saved):
    return {kind: load_model(saved[kind].config, saved[kind].ckpt, device="cpu", precision="full") for kind in KINDS}


def make_image(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def hole(width: int = 24, height: int = 16) -> Image.Image:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[3:13, 4:17] = 255
    return Image.fromarray(mask)


def as_batch(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(to_array(image)).permute(2, 0, 1)[None]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def command(model: SavedModel, *flags: str) -> list[str]:
    return ["--config", str(model.config), "--ckpt", str(model.ckpt), "--device", "cpu", "--safety", "off", *flags]


# --- prompts


@pytest.mark.parametrize("kind", ["v2", "v2-v"])
def test_a_prompt_generates_what_the_model_itself_generates_and_the_negative_one_counts(saved, pipelines, kind):
    model, settings = (
        saved[kind].model,
        {"steps": 3, "height": 16, "width": 24, "n_samples": 1, "n_iter": 1, "scale": 5.0, "seed": 7},
    )
    torch.manual_seed(7)
    with torch.no_grad():
        cond, uncond = model.get_learned_conditioning(["a horse"]), model.get_learned_conditioning(["rain"])
        guided = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": uncond, "verbose": False}
        expected = from_tensor(
            model.decode_first_stage(DDIMSampler(model).sample(3, 1, (4, 4, 6), cond, **guided).samples)[0]
        )

    def generate(**changes) -> np.ndarray:
        return pixels(
            next(
                text_to_image(
                    pipelines[kind], TextToImageRequest(prompt="a horse", **{**settings, **changes}), progress=False
                )
            ).image
        )

    assert np.abs(generate(negative_prompt="rain") - pixels(expected)).max() <= 1
    assert np.abs(generate() - pixels(expected)).max() > 1


def test_a_prompt_is_generated_by_the_script(saved, tmp_path):
    flags = [
        "--prompt",
        "a horse",
        "--negative_prompt",
        "rain",
        "--ddim_steps",
        "2",
        "--H",
        "16",
        "--W",
        "16",
        "--n_samples",
        "1",
    ]
    assert run_command(txt2img.main, command(saved["v2-v"], *flags, "--n_iter", "1", "--outdir", str(tmp_path))) == 0
    assert read_metadata(next((tmp_path / "samples").iterdir()))["prompt"] == "a horse"


def test_emphasis_and_long_prompts_are_read_as_this_encoder_reads_prompts(pipelines):
    encoder = pipelines["v2"].model.cond_stage_model
    with torch.no_grad():
        plain, long = encoder.encode(["a horse"]), PromptEncoder(encoder, emphasis=True, long_prompts=True)
        assert torch.allclose(long(["a horse"], 1), plain, atol=1e-6) and not torch.allclose(
            long(["a (horse:1.5)"], 1), plain, atol=1e-3
        )
        assert torch.allclose(long(["a horse"], 2), torch.cat([plain, encoder.encode([""])], dim=1), atol=1e-6)


@pytest.mark.parametrize(
    "kind, script", [("sd-inpaint", "inpaint.py"), ("depth", r"img2img.py with --depth"), ("x4", "upscale.py")]
)
def test_a_model_that_sees_more_than_a_prompt_is_sent_to_its_script(saved, tmp_path, capsys, kind, script):
    assert script in refused(txt2img.main, command(saved[kind], "--outdir", str(tmp_path)), capsys)


# --- inpainting


def test_a_mask_is_inpainted_after_a_prompt_as_the_network_was_trained(saved, pipelines):
    """Mask 0 and 1, image grey in the hole, in the order of concat_keys, on both sides of guidance."""
    model, image, mask = saved["sd-inpaint"].model, make_image(), hole()
    torch.manual_seed(7)
    with torch.no_grad():
        white = (as_batch(mask)[:, :1] > 0).float()
        latent = model.get_first_stage_encoding(model.encode_first_stage(as_batch(image) * (white < 0.5)))
        beside = [torch.cat([torch.nn.functional.interpolate(white, size=(4, 6)), latent], dim=1)]
        cond, uncond = (
            {"c_concat": beside, "c_crossattn": [model.get_learned_conditioning([text])]}
            for text in ("a bench", "rain")
        )
        guided = {"unconditional_guidance_scale": 4.0, "unconditional_conditioning": uncond, "verbose": False}
        x = model.decode_first_stage(DDIMSampler(model).sample(3, 1, (4, 4, 6), cond, **guided).samples)
    expected = np.where(pixels(mask)[..., None] > 0, pixels(from_tensor(x[0])), pixels(image))
    settings = InpaintRequest(steps=3, seed=7, prompt="a bench", negative_prompt="rain", scale=4.0)
    result = inference.inpaint(pipelines["sd-inpaint"], image, mask, settings, progress=False)
    assert np.abs(pixels(result.image) - expected).max() <= 1 and result.info["prompt"] == "a bench"


def test_feathering_fades_in_from_the_edge_and_leaves_every_other_pixel_alone(pipelines):
    image, mask = make_image(29, 21), hole(29, 21)
    hard, soft = (
        inference.inpaint(
            pipelines["sd-inpaint"], image, mask, InpaintRequest(steps=1, feather=f), progress=False
        ).image
        for f in (0, 3)
    )
    alpha = pixels(feathered(mask, 3))
    assert np.array_equal(pixels(soft)[alpha == 0], pixels(image)[alpha == 0]) and np.array_equal(
        alpha == 0, pixels(mask) == 0
    )
    assert np.array_equal(pixels(soft)[alpha == 255], pixels(hard)[alpha == 255]) and (alpha == 255).any()
    blend = (pixels(image) * (255 - alpha[..., None]) + pixels(hard) * alpha[..., None]) / 255
    assert np.abs(pixels(soft) - blend).max() <= 1


def test_a_feathered_mask_rises_by_equal_steps_and_not_at_the_images_own_edge():
    mask = np.zeros((9, 12), dtype=np.uint8)
    mask[:, 4:] = 255
    rows = pixels(feathered(Image.fromarray(mask), 3))
    assert (rows == [0, 0, 0, 0, 64, 128, 191, 255, 255, 255, 255, 255]).all()
    thin = np.zeros((9, 9), dtype=np.uint8)
    thin[4] = 255
    assert pixels(feathered(Image.fromarray(thin), 8)).max() == 255, "a hole thinner than the feather is still filled"
    assert not pixels(feathered(Image.new("L", (4, 4)), 2)).any()


def test_one_pair_is_inpainted_by_the_script(saved, tmp_path, capsys):
    make_image().save(tmp_path / "a.png")
    hole().save(tmp_path / "m.png")
    pair = ["--init-img", str(tmp_path / "a.png"), "--mask", str(tmp_path / "m.png"), "--outdir", str(tmp_path / "out")]
    flags = ["--prompt", "a bench", "--steps", "2", "--sampler", "euler", "--feather", "2"]
    assert run_command(inpaint.main, command(saved["sd-inpaint"], *pair, *flags)) == 0
    info = read_metadata(tmp_path / "out" / "a.png")
    expected = {"prompt": "a bench", "sampler": "euler", "feather": 2, "scale": 7.5, "mask": str(tmp_path / "m.png")}
    assert {key: info[key] for key in expected} == expected
    capsys.readouterr()
    assert "--indir with --init-img" in refused(
        inpaint.main, command(saved["sd-inpaint"], *pair, "--indir", str(tmp_path)), capsys
    )
    assert "--mask: pass both" in refused(inpaint.main, command(saved["sd-inpaint"], *pair[:2], *pair[4:]), capsys)
    assert "--feather -1" in refused(inpaint.main, command(saved["sd-inpaint"], *pair, "--feather", "-1"), capsys)


def test_text_flags_require_a_text_conditional_model(tmp_path, capsys):
    without = save_model(tmp_path, "inpaint")
    make_image().save(tmp_path / "a.png")
    hole().save(tmp_path / "m.png")
    pair = ["--init-img", str(tmp_path / "a.png"), "--mask", str(tmp_path / "m.png"), "--outdir", str(tmp_path / "out")]
    for flag, value in (("--prompt", "a bench"), ("--negative_prompt", "rain"), ("--scale", "3")):
        assert f"{flag}: this model is not text-conditional" in refused(
            inpaint.main, command(without, *pair, flag, value), capsys
        )


# --- depth


def test_a_depth_map_conditions_the_image(saved, pipelines, tmp_path):
    ramp = np.linspace(0, 65535, 24, dtype=np.uint16)[None].repeat(16, axis=0)
    Image.fromarray(ramp).save(tmp_path / "d.png")
    depth = load_levels(tmp_path / "d.png")
    assert depth.dtype == np.float32 and np.array_equal(depth, ramp)
    pipeline, settings = (
        pipelines["depth"],
        ImageToImageRequest(
            prompt="a horse", steps=4, height=16, width=24, n_samples=2, strength=1.0, scale=3.0, depth=True
        ),
    )

    def generate(of: np.ndarray) -> list[np.ndarray]:
        images = image_to_image(pipeline, make_image(), settings, depth=of, progress=False)
        return [pixels(generated.image) for generated in images]

    (first, second), (turned, _) = generate(depth), generate(depth[:, ::-1].copy())
    assert first.shape == (16, 24, 3) and np.abs(first - second).max() > 1 and np.abs(first - turned).max() > 1
    assert np.array_equal(generate(2 * depth)[0], first) or np.abs(generate(2 * depth)[0] - first).max() <= 1


def test_depth_is_a_flag_of_img2img(saved, tmp_path, capsys):
    make_image().save(tmp_path / "a.png")
    make_image(seed=1).convert("L").save(tmp_path / "d.png")
    flags = [
        "--init-img",
        str(tmp_path / "a.png"),
        "--ddim_steps",
        "2",
        "--n_samples",
        "1",
        "--outdir",
        str(tmp_path / "out"),
    ]
    assert run_command(img2img.main, command(saved["depth"], *flags, "--depth", str(tmp_path / "d.png"))) == 0
    first = tmp_path / "out" / "samples" / "00000.png"
    assert read_metadata(first)["depth"] == str(tmp_path / "d.png")
    again = ["--from-metadata", str(first), "--outdir", str(tmp_path / "again"), "--safety", "off"]
    assert run_command(img2img.main, again) == 0
    assert np.array_equal(pixels(Image.open(tmp_path / "again" / "samples" / "00000.png")), pixels(Image.open(first)))
    capsys.readouterr()
    assert "--depth" in refused(img2img.main, command(saved["depth"], *flags), capsys)
    assert "not conditioned on depth" in refused(
        img2img.main, command(saved["v2"], *flags, "--depth", str(tmp_path / "d.png")), capsys
    )
    assert "nowhere.png: no such file" in refused(
        img2img.main, command(saved["depth"], *flags, "--depth", "nowhere.png"), capsys
    )
    (tmp_path / "empty").mkdir()
    empty = command(saved["depth"], *flags, "--depth", str(tmp_path / "empty"))
    assert "empty: no config.json in it; pass a depth map" in refused(img2img.main, empty, capsys)


# --- upscaling


def test_a_small_image_is_upscaled_after_a_prompt_with_the_noise_that_is_logged(saved, pipelines):
    model = saved["x4"].model
    torch.manual_seed(7)
    with torch.no_grad():
        noised, level = model.low_scale_model(as_batch(make_image(6, 4)), torch.tensor([30]))
        texts = (model.get_learned_conditioning([text]) for text in ("a cat", "rain"))
        cond, uncond = ({"c_concat": [noised], "c_crossattn": [text], "c_adm": level} for text in texts)
        guided = {"unconditional_guidance_scale": 4.0, "unconditional_conditioning": uncond, "verbose": False}
        expected = from_tensor(
            model.decode_first_stage(DDIMSampler(model).sample(3, 1, (4, 4, 6), cond, **guided).samples)[0]
        )
    settings = UpscaleRequest(steps=3, seed=7, prompt="a cat", negative_prompt="rain", scale=4.0, noise_level=30)
    result = inference.upscale(pipelines["x4"], make_image(6, 4), settings, progress=False)
    assert result.image.size == (24, 16) and np.abs(pixels(result.image) - pixels(expected)).max() <= 1
    tiled = inference.upscale(
        pipelines["x4"], make_image(13, 9), UpscaleRequest(steps=2, tile=8, prompt="a cat"), progress=False
    )
    assert tiled.image.size == (52, 36) and tiled.info["noise_level"] == 20


def test_a_small_image_is_upscaled_by_the_script(saved, tmp_path, capsys):
    make_image(6, 4).save(tmp_path / "a.png")
    flags = ["--init-img", str(tmp_path / "a.png"), "--outdir", str(tmp_path / "out"), "--steps", "2"]
    assert run_command(upscale.main, command(saved["x4"], *flags, "--prompt", "a cat", "--noise_level", "5")) == 0
    info = read_metadata(tmp_path / "out" / "a.png")
    assert (info["noise_level"], info["scale"], info["eta"], info["prompt"], info["width"]) == (
        5,
        9.0,
        0.0,
        "a cat",
        24,
    )
    capsys.readouterr()
    too_much = command(saved["x4"], *flags, "--noise_level", "351")
    assert "--noise_level 351: choose 0 (none) to 350" in refused(upscale.main, too_much, capsys)
    plain = save_model(tmp_path, "upscale")
    assert "--noise_level: this model has no noise-level conditioning" in refused(
        upscale.main, command(plain, *flags, "--noise_level", "5"), capsys
    )
