"""diffusers, given a converted folder or the original file, generates our image and gives our networks' outputs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from benchmarks.__main__ import main as benchmark
from ldm.checkpoint.diffusers import text
from ldm.checkpoint.diffusers.scheduler import scheduler_config
from ldm.config.model_info import read_config
from ldm.convert.convert import tokenizer_files
from ldm.inference import EditRequest, Pipeline, edit, load_model
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.encoders.tokenizers import clip_tokenizer

diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[test]' installs it")

PROMPTS, STEPS, SCALE = ["a cat", "a dog on the moon"], 5, 3.0
TOLERANCE = 1e-3  # of pixel values in [0, 1]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def z_of(channels: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_image(pipeline: Pipeline, sampler: type = DDIMSampler) -> torch.Tensor:
    """(2, 3, 32, 32) in [0, 1]."""
    cond, uncond = pipeline.encode_prompts(PROMPTS, "", guided=True)
    guidance = {"unconditional_guidance_scale": SCALE, "unconditional_conditioning": uncond}
    z, _ = sampler(pipeline.model).sample(STEPS, 2, (4, 8, 8), cond, x_T=z_of(), verbose=False, **guidance)
    return (pipeline.decode(z) + 1) / 2


def their_image(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": SCALE, "num_inference_steps": STEPS, "height": 32, "width": 32, "output_type": "pt"}
    return pipe(PROMPTS, latents=z_of(), **options).images


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool(ours.isfinite().all()) and float((ours - theirs).abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", ["sd1", "sd2"])  # noise and v-prediction
def test_a_converted_folder_and_the_original_file_generate_our_image(converted, kind):
    saved, folder = converted(kind)
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full")
    ours = our_image(pipeline)
    assert ours.std() > 0.05, "an image, not a gray area"

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert close(ours, their_image(pipe))
    if kind == "sd1":  # PNDM is PLMS
        ddim = pipe.scheduler
        pipe.scheduler = diffusers.PNDMScheduler.from_config(
            scheduler_config(read_config(saved.config).model.params, "pndm")
        )
        assert close(our_image(pipeline, PLMSSampler), their_image(pipe))
        pipe.scheduler = ddim

    parts = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    parts |= {"safety_checker": None, "feature_extractor": None}
    if kind != "sd1":  # diffusers guesses the prediction type from the sizes of released files
        parts["scheduler"] = pipe.scheduler
    single = diffusers.StableDiffusionPipeline.from_single_file(
        str(saved.ckpt), original_config=str(saved.config), local_files_only=True, **parts
    )
    assert close(ours, their_image(single))


@torch.no_grad()
def test_a_nine_channel_unet_loads_as_diffusers_inpainting(converted):
    saved, folder = converted("inpainting")
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder, local_files_only=True)
    x, t, context = torch.randn(2, 9, 8, 8), torch.tensor([7, 501]), torch.randn(2, 5, 32)
    ours = saved.model.model.diffusion_model(x, t, context)
    assert torch.allclose(ours, pipe.unet(x, t, context).sample, atol=1e-4)


def test_an_edit_model_gives_the_image_of_diffusers(converted):
    saved, folder = converted("edit")
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    scales = {"scale": 5.0, "image_scale": 1.5}
    request = EditRequest(prompt=PROMPTS, steps=STEPS, height=32, width=32, n_samples=2, **scales)
    ours = np.stack([np.asarray(generated.image) for generated in edit(pipeline, image, request, progress=False)])
    torch.manual_seed(request.seed)
    start = torch.randn(2, 4, 8, 8)
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 5.0, "image_guidance_scale": 1.5, "num_inference_steps": STEPS, "output_type": "np"}
    theirs = pipe(PROMPTS, image=[image, image], latents=start, **options).images
    assert ours.std() > 10 and np.abs(ours - 255 * theirs).max() < 0.5 + 255 * TOLERANCE  # ours are rounded


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unconditional", "class"])
def test_unets_and_vq_models_give_our_outputs(converted, kind):
    saved, folder = converted(kind)
    classes = {"unconditional": diffusers.UNet2DModel, "class": diffusers.UNet2DConditionModel}
    network = classes[kind].from_pretrained(folder / "unet")
    stage = diffusers.VQModel.from_pretrained(folder / "vqvae")
    t, z = torch.tensor([3, 77]), z_of(3)
    context = [torch.randn(2, 4, 16)] if kind == "class" else []
    assert torch.allclose(saved.model.model.diffusion_model(z, t, *context), network(z, t, *context).sample, atol=1e-4)
    assert torch.allclose(saved.model.first_stage_model.decode(z), stage.decode(z).sample, atol=1e-4)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(saved.model.first_stage_model.encode(x), stage.encode(x).latents, atol=1e-4)
    tables = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod
    assert torch.allclose(saved.model.alphas_cumprod, tables, atol=1e-6)


@torch.no_grad()
def test_a_first_stage_alone_gives_our_outputs(converted):
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    saved, folder = converted("kl")
    kl, posterior = diffusers.AutoencoderKL.from_pretrained(folder), saved.model.encode(x)
    assert torch.allclose(posterior.mean, kl.encode(x).latent_dist.mean, atol=1e-4)
    assert torch.allclose(posterior.logvar, kl.encode(x).latent_dist.logvar, atol=1e-4)
    assert torch.allclose(saved.model.decode(posterior.mean), kl.decode(posterior.mean).sample, atol=1e-4)
    saved, folder = converted("vq")
    assert torch.allclose(saved.model(x)[0], diffusers.VQModel.from_pretrained(folder)(x).sample, atol=1e-4)


def test_an_unconditional_pipeline_generates_our_images(converted):
    saved, folder = converted("unconditional")
    pipe = diffusers.LDMPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(1)
    theirs = pipe(batch_size=2, num_inference_steps=STEPS, generator=noise, output_type="np").images
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full", use_ema=False)
    with torch.no_grad():
        z, _ = DDIMSampler(pipeline.model).sample(STEPS, 2, (3, 8, 8), None, x_T=z_of(3), verbose=False)
        ours = (pipeline.decode(z) + 1) / 2
    assert close(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2))


def test_the_tokenizer_of_the_folder_gives_our_ids(tmp_path):
    prompts = ["a photograph of an astronaut riding a horse", "It's 3 o'clock, naïve café?", ""]
    for kind, pad in ((text.CLIP, None), (text.OPEN_CLIP, 0)):  # OpenCLIP pads with "!", in released folders too
        folder = tmp_path / kind
        folder.mkdir()
        for name, content in tokenizer_files(kind).items():
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        theirs = CLIPTokenizer.from_pretrained(folder)(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        assert torch.equal(theirs.input_ids, clip_tokenizer()(prompts, 77, pad_id=pad))


def test_benchmarks_compare_the_same_work(tmp_path, capsys):
    rows = ["unet-fp32", "decode-fp32", "text-fp32"]
    only = [word for row in rows for word in ("--only", row)]
    assert benchmark(["cpu", "--dry-run", "--work", str(tmp_path), *only]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == rows and all("ratio" in line for line in lines[:-1])
