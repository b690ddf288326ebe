"""Requests of every task: defaults, and refusals with the flag, the value and the choices."""

from dataclasses import replace
from pathlib import Path

import pytest

from ldm.config.model_info import model_info, read_model_info
from ldm.inference.requests import (
    Batch,
    ClassConditionalRequest,
    ControlRequest,
    EditRequest,
    ImageToImageRequest,
    InpaintRequest,
    RetrievalRequest,
    TextToImageRequest,
    UpscaleRequest,
    require_edit_model,
    require_inpainting_model,
    require_text_model,
    require_unconditional_or_class,
    require_upscaler,
    script_for,
)
from ldm.models.diffusion.samplers.registry import SAMPLERS
from ldm.paths import ROOT
from tests.shapes import AUTOENCODER, config
from tests.tiny import KINDS, text_model_config


def test_the_published_defaults():
    s = TextToImageRequest().checked(model_info(config()))
    assert (s.steps, s.scale, s.eta, s.height, s.width, s.seed, s.n_samples, s.n_iter) == (
        50,
        7.5,
        0.0,
        512,
        512,
        42,
        3,
        2,
    )
    assert (s.sampler, s.fixed_code, s.negative_prompt, s.latent_shape) == ("ddim", False, "", (4, 64, 64))


@pytest.mark.parametrize("height", range(64, 257, 8))
@pytest.mark.parametrize("width", [64, 72, 200, 256])
def test_a_size_is_accepted_or_refused_with_the_nearest_valid_one(height, width):
    info = model_info(config())
    if height % 64 == 0 and width % 64 == 0:
        assert TextToImageRequest(height=height, width=width).checked(info).latent_shape == (4, height // 8, width // 8)
        return
    with pytest.raises(ValueError, match=f"--H {height} --W {width}: .* multiples of 64 ") as error:
        TextToImageRequest(height=height, width=width).checked(info)
    words = str(error.value).split("nearest are ")[1].split()
    near = TextToImageRequest(height=int(words[1]), width=int(words[3])).checked(info)
    assert abs(near.height - height) <= 32 and abs(near.width - width) <= 32


def test_the_multiple_follows_from_first_stage_and_unet():
    small = config(
        first_stage_config={"target": AUTOENCODER["target"], "params": {"ddconfig": {"ch_mult": [1, 2, 4]}}},
        unet_config={"params": {"channel_mult": [1, 2]}},
    )
    assert TextToImageRequest(height=32, width=40).checked(model_info(small)).latent_shape == (4, 8, 10)
    with pytest.raises(ValueError, match="multiples of 8 pixels"):
        TextToImageRequest(height=32, width=36).checked(model_info(small))


def test_the_default_size_is_that_of_training_but_the_published_one_for_published_models(caplog):
    own = info("text")  # latents of 8x8 cells, 4 pixels each
    with caplog.at_level("INFO"):
        assert TextToImageRequest().checked(own).size == (32, 32)
    assert "32x32 pixels, as in training (--H and --W choose another size)" in caplog.text
    wide = info("text", image_size=[8, 16])
    assert TextToImageRequest().checked(wide).size == (32, 64) == TextToImageRequest(height=32).checked(wide).size
    for name, request, side in (
        ("latent-diffusion/txt2img-1p4B-eval", TextToImageRequest(), 512),  # trained at 256
        ("stable-diffusion/v2-inference-v", TextToImageRequest(), 512),
        ("retrieval-augmented-diffusion/768x768", RetrievalRequest(), 768),
    ):
        assert request.checked(read_model_info(ROOT / "configs" / f"{name}.yaml")).size == (side, side), name


def test_a_size_far_from_that_of_training_is_a_warning_with_both_sizes(caplog):
    own = info("text")
    TextToImageRequest(height=32, width=48).checked(own)
    assert "trained" not in caplog.text
    TextToImageRequest(height=512).checked(own)
    assert "32x512 pixels: the model was trained at 32x32" in caplog.text
    caplog.clear()
    TextToImageRequest(height=512).checked(read_model_info(ROOT / "configs/stable-diffusion/v1-inference.yaml"))
    assert "trained" not in caplog.text


def test_an_image_with_more_pixels_than_in_training_is_scaled_down_to_as_many():
    assert [ImageToImageRequest().fitted(*size, info("text")).size for size in ((64, 64), (40, 90), (300, 75))] == [
        (32, 32),
        (24, 48),
        (64, 16),
    ]


def test_the_published_edit_model_takes_512_pixels_squared_wherever_its_yaml_lies():
    published = read_model_info(ROOT / "configs" / "instruct-pix2pix" / "generate.yaml")
    elsewhere = replace(published, path=Path("generate.yaml"))
    for model in (published, elsewhere):  # both state latents of 16x16 cells
        sizes = [EditRequest().fitted(*size, model).size for size in ((3000, 4000), (512, 512), (256, 320))]
        assert sizes == [(448, 576), (512, 512), (256, 320)]
    assert EditRequest(resolution=768).fitted(3000, 4000, published).size == (640, 896)


def test_f_replaces_the_models_factor_as_published():
    assert TextToImageRequest(height=512, width=256, factor=16).checked(model_info(config())).latent_shape == (
        4,
        32,
        16,
    )


def test_an_unknown_first_stage_needs_f():
    unknown = model_info(config(first_stage_config={"target": "my.Stage", "params": {}}))
    with pytest.raises(ValueError, match="--f"):
        TextToImageRequest().checked(unknown)
    assert TextToImageRequest(factor=8).checked(unknown).latent_shape == (4, 64, 64)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": 0}, "--ddim_steps 0: choose 1 to 1000"),
        ({"steps": 1001}, "--ddim_steps 1001: choose 1 to 1000"),
        ({"n_samples": 0}, "--n_samples 0"),
        ({"n_iter": -1}, "--n_iter -1"),
        ({"height": 0}, "--H 0 --W 512.*--H 64 --W 512"),
        ({"width": -64}, "--W -64"),
        ({"channels": 3}, "--C 3: this model's latents have 4"),
        ({"channels": 0}, "--C 0"),
        ({"factor": 0}, "--f 0"),
        ({"sampler": "eular"}, "--sampler eular: choose one of ddim, plms, "),
        ({"eta": -0.1}, "--ddim_eta -0.1"),
        ({"eta": 0.5, "sampler": "plms"}, "--ddim_eta 0.5: plms is deterministic"),
        ({"eta": 0.5, "sampler": "dpm_solver"}, "dpm_solver is deterministic"),
        ({"eta": 0.5, "sampler": "ancestral"}, "ancestral has a fixed eta of 1; .* adjustable eta: ddim, "),
        ({"scale": float("nan")}, "--scale nan"),
        ({"scale": 1.0, "negative_prompt": "blurry"}, "--negative_prompt with --scale 1"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**32}, "--seed 4294967296"),
        ({"seed_mode": "pixel"}, "--seed_mode pixel: choose one of batch, image"),
        ({"seed_mode": "image", "fixed_code": True}, "--fixed_code with --seed_mode image"),
        ({"spacing": "karras"}, "--spacing karras: ddim supports uniform, quad, trailing"),
        ({"spacing": "quad", "sampler": "heun"}, "--spacing quad: heun supports uniform, logsnr, karras, trailing"),
        ({"guidance_rescale": 1.5}, "--guidance_rescale 1.5: choose 0"),
        ({"guidance_interval": (5.0, 0.3)}, "--guidance_interval 5 0.3: choose LOW < HIGH"),
        ({"guidance_interval": (0.3, 5.0), "scale": 1.0}, "--guidance_interval with --scale 1"),
        ({"guidance_rescale": 0.7, "scale": 1.0}, "--guidance_rescale 0.7 with --scale 1"),
        ({"dynamic_threshold": 0.0}, "--dynamic_threshold 0.0: choose a quantile above 0"),
        ({"deep_cache": 0}, r"--deep_cache 0: choose 1 \(off\) to 1000"),
        ({"token_merging": 0.8}, r"--token_merging 0.8: choose 0 \(off\) to 0.75"),
        ({"tiled": 20}, "--tiled 20: choose a multiple of 8 pixels, at least 32; 512 is usual"),
        ({"emphasis": True, "negative_prompt": "a (b"}, "--emphasis: .* never closed"),
        ({"chunks": 2}, "chunks 2: choose 1 or more, with long_prompts"),
    ],
)
def test_invalid_values_are_refused_with_flag_value_and_choices(change, words):
    with pytest.raises(ValueError, match=words):
        TextToImageRequest(**change).checked(model_info(config()))


def test_deep_cache_is_refused_where_the_network_is_no_plain_unet_or_sees_tiles():
    assert TextToImageRequest(deep_cache=2).checked(info("text")).deep_cache == 2
    assert UpscaleRequest(deep_cache=2, tile=0).checked(info("upscale")).deep_cache == 2
    with pytest.raises(
        ValueError, match=r"--deep_cache 2: requires a UNetModel; this model's .* is ControlledUnetModel"
    ):
        TextToImageRequest(deep_cache=2).checked(info("control"))
    with pytest.raises(ValueError, match="--deep_cache 2: not supported under a ControlNet"):
        ControlRequest(deep_cache=2).checked(info("text"))
    with pytest.raises(ValueError, match="--deep_cache 2: not supported with tiles; pass --tile 0"):
        UpscaleRequest(deep_cache=2).checked(info("upscale"))


def test_token_merging_is_refused_where_the_network_has_no_transformers():
    for kind in ("text", "control"):
        assert TextToImageRequest(token_merging=0.5).checked(info(kind)).token_merging == 0.5
    with pytest.raises(ValueError, match=r"--token_merging 0.5: this model's network has no spatial transformers"):
        InpaintRequest(token_merging=0.5).checked(info("inpaint"))


CLASSES = {"target": "ldm.modules.encoders.modules.ClassEmbedder"}


BOXES = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {"use_tokenizer": False}}


@pytest.mark.parametrize(
    "condition", ["__is_unconditional__", "__is_first_stage__", CLASSES, BOXES, {"target": "torch.nn.Identity"}]
)
def test_a_model_that_is_not_text_conditional_is_refused(condition):
    with pytest.raises(ValueError, match="not text-conditional"):
        require_text_model(model_info(config(cond_stage_config=condition)))


@pytest.mark.parametrize("n_prompts", range(1, 8))
def test_every_prompt_is_in_one_batch_and_the_last_one_may_be_smaller(n_prompts):
    prompts = [f"p{k}" for k in range(n_prompts)]
    batches = [b.prompts for b in TextToImageRequest(prompt=prompts, n_samples=3, n_iter=1).batches]
    assert [p for batch in batches for p in batch] == prompts
    assert all(len(batch) == 3 for batch in batches[:-1]) and 1 <= len(batches[-1]) <= 3


def test_a_single_prompt_is_repeated_n_samples_times():
    assert TextToImageRequest(prompt="a cat", n_samples=3, n_iter=1).batches == [Batch(0, range(3), ["a cat"] * 3)]


def info(kind: str, **params):
    return model_info(text_model_config(**{**KINDS[kind], **params}))


def test_the_published_defaults_of_the_other_tasks():
    image = ImageToImageRequest()
    assert (image.strength, image.scale, image.n_iter, image.n_samples, image.steps, image.encode_steps) == (
        0.75,
        5.0,
        1,
        2,
        50,
        37,
    )
    for kind, scale in (("inpaint", 1.0), ("sd-inpaint", 7.5)):
        hole = InpaintRequest().checked(info(kind))
        assert (hole.steps, hole.eta, hole.scale, hole.feather, hole.prompt) == (50, 0.0, scale, 0, "")
    for kind, published in (("upscale", (100, 1.0, 1.0, None)), ("x4", (50, 0.0, 9.0, 20))):
        larger = UpscaleRequest().checked(info(kind, timesteps=1000))
        assert (larger.steps, larger.eta, larger.scale, larger.noise_level) == published
    sample = ClassConditionalRequest().checked(info("unconditional"))
    assert (sample.n_samples, sample.batch_size, sample.steps, sample.eta, sample.vanilla, sample.scale) == (
        50000,
        10,
        50,
        1.0,
        False,
        1.0,
    )


@pytest.mark.parametrize(
    "kind, cls, flag", [("unconditional", ClassConditionalRequest, "--eta"), ("upscale", UpscaleRequest, "--ddim_eta")]
)
def test_samples_and_upscaling_accept_every_sampler_with_a_supported_eta(kind, cls, flag):
    for name, entry in SAMPLERS.items():
        assert cls(sampler=name).checked(info(kind)).eta == (1.0 if name == "ddim" else entry.default_eta)
    with pytest.raises(ValueError, match=f"{flag} 1: plms is deterministic"):
        cls(sampler="plms", eta=1.0).checked(info(kind))
    with pytest.raises(ValueError, match="--spacing karras: ddim supports"):
        cls(spacing="karras").checked(info(kind))
    with pytest.raises(ValueError, match=r"--guidance_rescale 0\.5 with --scale 1"):
        cls(guidance_rescale=0.5).checked(info(kind))


def test_vanilla_excludes_other_samplers_and_spacings():
    assert ClassConditionalRequest(vanilla=True).checked(info("unconditional")).vanilla
    for given in ({"sampler": "heun"}, {"spacing": "trailing"}):
        with pytest.raises(ValueError, match="-v with --s"):
            ClassConditionalRequest(vanilla=True, **given).checked(info("unconditional"))


@pytest.mark.parametrize(
    "strength, steps, steps_run", [(0.0, 50, 0), (1.0, 50, 50), (0.29, 100, 28), (0.999, 10, 9), (0.3, 10, 3)]
)
def test_encode_steps_are_rounded_as_published(strength, steps, steps_run):
    assert ImageToImageRequest(strength=strength, steps=steps).encode_steps == steps_run  # 0.29 * 100 is 28.999...


@pytest.mark.parametrize(
    "height, width, fits", [(16, 24, (16, 24)), (19, 21, (16, 24)), (1, 1000, (8, 1000)), (37, 4, (40, 8))]
)
def test_an_image_of_any_size_is_fitted_to_the_nearest_valid_size(height, width, fits):
    settings = ImageToImageRequest().fitted(height, width, info("text")).checked(info("text"))
    assert (settings.height, settings.width) == fits
    published = replace(info("text"), path=ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml")
    assert ImageToImageRequest().fitted(40, 4000, published).width == 4000
    assert ImageToImageRequest(factor=8).fitted(16, 40, info("text")).width % 16 == 0


@pytest.mark.parametrize("request_class, extra", [(ControlRequest, {}), (ControlRequest, {"resolution": 64})])
def test_an_image_of_extreme_proportions_is_refused_without_flags_that_the_script_lacks(request_class, extra):
    info = model_info(text_model_config())
    with pytest.raises(
        ValueError, match=r"an image of 9000x1 pixels would give one of .*, more than 65536: crop it"
    ) as error:
        request_class(**extra).fitted(1, 9000, info)
    assert "--H" not in str(error.value) and ("--resolution" in str(error.value)) == bool(extra)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_accepted_by_its_own_task_only(kind):
    takers = {
        "unconditional": require_unconditional_or_class,
        "class": require_unconditional_or_class,
        "inpaint": require_inpainting_model,
        "upscale": require_upscaler,
    }
    takers |= {"sd-inpaint": require_inpainting_model, "x4": require_upscaler, "edit": require_edit_model}
    takers |= dict.fromkeys(("text", "control", "v2", "v2-v"), require_inpainting_model)  # by blending
    for check in {require_unconditional_or_class, require_inpainting_model, require_upscaler, require_edit_model}:
        if takers.get(kind) is check:
            check(info(kind))
        else:
            with pytest.raises(ValueError, match=r"scripts/|see models/ldm"):
                check(info(kind))


@pytest.mark.parametrize(
    "name, script",
    [
        ("recipes/text-to-image-folder", "txt2img"),
        ("recipes/class-conditional-folder", "sample_diffusion"),
        ("recipes/inpainting-folder", "inpaint"),
        ("recipes/super-resolution-folder", "upscale"),
        ("stable-diffusion/x4-upscaling", "upscale"),
        ("stable-diffusion/v2-midas-inference", "img2img"),
        ("instruct-pix2pix/generate", "edit"),
        ("controlnet/cldm_v15", "control2img"),
        ("retrieval-augmented-diffusion/768x768", "knn2img"),
    ],
)
def test_every_model_has_its_script(name, script):
    assert script_for(read_model_info(ROOT / "configs" / f"{name}.yaml")).split()[0] == f"scripts/{script}.py"


def test_other_conditions_are_sent_to_the_script_that_takes_any():
    unet = {"in_channels": 7, "channel_mult": [1, 1]}
    hybrid = info("text", conditioning_key="hybrid", concat_keys=["LR_image"], unet_config={"params": unet})
    for require_kind in (require_text_model, require_upscaler, require_inpainting_model):
        with pytest.raises(ValueError, match=r"use scripts/sample_conditional\.py$"):
            require_kind(hybrid)


def test_a_network_without_input_channels_for_the_condition_is_refused():
    unet = {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {"in_channels": 4, "channel_mult": [1, 1]},
    }
    for kind, check in (("inpaint", require_inpainting_model), ("upscale", require_upscaler)):
        with pytest.raises(ValueError, match=r"got .* and 4"):
            check(info(kind, unet_config=unet))
