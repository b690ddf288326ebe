"""diffusers itself, given a converted folder or the original file, draws this framework's picture and gives its networks' outputs."""

import pytest
import torch

from ldm.checkpoint.diffusers.scheduler import scheduler_config
from ldm.convert.convert import to_folder, tokenizer_files
from ldm.inference import Pipeline, load_model
from ldm.inference.settings import read_config
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.diffusionmodules.schedule import Schedule, make_beta_schedule
from tests.convert.models import save

pytest.importorskip("diffusers", reason="pip install -e '.[test]' brings it")

PROMPTS, STEPS, SCALE = ["a cat", "a dog on the moon"], 5, 3.0
TOLERANCE = 1e-3  # of pixel values in [0, 1]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def z_of(channels: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_picture(pipeline: Pipeline, sampler: type = DDIMSampler) -> torch.Tensor:
    """(2, 3, 32, 32) in [0, 1]."""
    cond, uncond = pipeline.encode_prompts(PROMPTS, "", SCALE)
    guidance = {"unconditional_guidance_scale": SCALE, "unconditional_conditioning": uncond}
    z, _ = sampler(pipeline.model).sample(STEPS, 2, (4, 8, 8), cond, x_T=z_of(), verbose=False, **guidance)
    return (pipeline.decode(z) + 1) / 2


def their_picture(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": SCALE, "num_inference_steps": STEPS, "height": 32, "width": 32, "output_type": "pt"}
    return pipe(PROMPTS, latents=z_of(), **options).images


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool(ours.isfinite().all()) and float((ours - theirs).abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", ["sd1", "sd2"])  # noise and v-prediction
def test_a_converted_folder_and_the_original_file_draw_our_picture(tmp_path, kind):
    from diffusers import StableDiffusionPipeline

    saved = save(tmp_path, kind)
    to_folder(read_config(saved.config), saved.ckpt, tmp_path / "folder")
    ours = our_picture(load_model(saved.config, saved.ckpt, "cpu", "full"))
    assert ours.std() > 0.05, "a picture, not a gray area"

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert close(ours, their_picture(pipe))

    parts = {
        "text_encoder": pipe.text_encoder,
        "tokenizer": pipe.tokenizer,
        "safety_checker": None,
        "feature_extractor": None,
    }
    if kind != "sd1":  # it guesses the prediction from released files' sizes
        parts["scheduler"] = pipe.scheduler
    single = StableDiffusionPipeline.from_single_file(
        str(saved.ckpt), original_config=str(saved.config), local_files_only=True, **parts
    )
    assert close(ours, their_picture(single))


def test_pndm_is_plms(tmp_path):
    from diffusers import StableDiffusionPipeline

    saved = save(tmp_path, "sd1")
    to_folder(read_config(saved.config), saved.ckpt, tmp_path / "folder", scheduler="pndm")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert close(our_picture(load_model(saved.config, saved.ckpt, "cpu", "full"), PLMSSampler), their_picture(pipe))


@torch.no_grad()
def test_a_nine_channel_unet_loads_as_diffusers_inpainting(tmp_path):
    from diffusers import StableDiffusionInpaintPipeline

    saved = save(tmp_path, "inpainting")
    to_folder(read_config(saved.config), saved.ckpt, tmp_path / "folder")
    pipe = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    x, t, context = torch.randn(2, 9, 8, 8), torch.tensor([7, 501]), torch.randn(2, 5, 32)
    ours = saved.model.model.diffusion_model(x, t, context)
    assert torch.allclose(ours, pipe.unet(x, t, context).sample, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unconditional", "class"])
def test_unets_and_vq_models_give_our_outputs(tmp_path, kind):
    from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel

    saved = save(tmp_path, kind)
    to_folder(read_config(saved.config), saved.ckpt, tmp_path / "folder")
    network = {"unconditional": UNet2DModel, "class": UNet2DConditionModel}[kind].from_pretrained(
        tmp_path / "folder" / "unet"
    )
    stage = VQModel.from_pretrained(tmp_path / "folder" / "vqvae")
    t, z = torch.tensor([3, 77]), z_of(3)
    context = [torch.randn(2, 4, 16)] if kind == "class" else []
    assert torch.allclose(saved.model.model.diffusion_model(z, t, *context), network(z, t, *context).sample, atol=1e-4)
    assert torch.allclose(saved.model.first_stage_model.decode(z), stage.decode(z).sample, atol=1e-4)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(saved.model.first_stage_model.encode(x), stage.encode(x).latents, atol=1e-4)
    tables = DDIMScheduler.from_pretrained(tmp_path / "folder" / "scheduler").alphas_cumprod
    assert torch.allclose(saved.model.alphas_cumprod, tables, atol=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        *({"beta_schedule": schedule, "timesteps": 50} for schedule in ("linear", "sqrt_linear", "sqrt", "cosine")),
        {"beta_schedule": "cosine", "cosine_s": 0.1, "timesteps": 50},
        {"given_betas": [0.1, 0.2, 0.3]},
        {"zero_terminal_snr": True, "parameterization": "v"},
    ],
)
def test_every_noise_schedule_is_ours_there(params):
    from diffusers import DDIMScheduler

    zero_snr = bool(params.get("zero_terminal_snr"))
    names = ("linear_start", "linear_end", "cosine_s")
    betas = params.get("given_betas") or make_beta_schedule(
        params.get("beta_schedule", "linear"),
        params.get("timesteps", 1000),
        **{name: params[name] for name in names if name in params},
    )
    ours = Schedule.from_betas(betas, zero_terminal_snr=zero_snr).alphas_cumprod
    theirs = DDIMScheduler.from_config(scheduler_config(params)).alphas_cumprod
    assert torch.allclose(theirs.double(), torch.from_numpy(ours), atol=1e-6)


@torch.no_grad()
def test_a_first_stage_alone_gives_our_outputs(tmp_path):
    from diffusers import AutoencoderKL, VQModel

    x = torch.rand(1, 3, 32, 32) * 2 - 1
    saved = save(tmp_path / "kl", "kl")
    to_folder(read_config(saved.config), saved.ckpt, tmp_path / "kl" / "folder")
    stage = AutoencoderKL.from_pretrained(tmp_path / "kl" / "folder")
    posterior = saved.model.encode(x)
    assert torch.allclose(posterior.mean, stage.encode(x).latent_dist.mean, atol=1e-4)
    assert torch.allclose(posterior.logvar, stage.encode(x).latent_dist.logvar, atol=1e-4)
    assert torch.allclose(saved.model.decode(posterior.mean), stage.decode(posterior.mean).sample, atol=1e-4)
    saved = save(tmp_path / "vq", "vq")
    to_folder(read_config(saved.config), saved.ckpt, tmp_path / "vq" / "folder")
    stage = VQModel.from_pretrained(tmp_path / "vq" / "folder")
    assert torch.allclose(saved.model(x)[0], stage(x).sample, atol=1e-4)


def test_an_unconditional_pipeline_draws_our_pictures(tmp_path):
    from diffusers import LDMPipeline

    saved = save(tmp_path, "unconditional")
    to_folder(read_config(saved.config), saved.ckpt, tmp_path / "folder", use_ema=True)
    pipe = LDMPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        batch_size=2, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1), output_type="np"
    ).images
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full")
    with torch.no_grad():
        z, _ = DDIMSampler(pipeline.model).sample(STEPS, 2, (3, 8, 8), None, x_T=z_of(3), verbose=False)
        ours = (pipeline.decode(z) + 1) / 2
    assert close(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2))


def test_the_tokenizer_of_the_folder_gives_our_ids(tmp_path):
    from transformers import CLIPTokenizer

    from ldm.checkpoint.diffusers import text
    from ldm.modules.encoders.tokenizers import clip_tokenizer

    prompts = ["a photograph of an astronaut riding a horse", "It's 3 o'clock, naïve café?", ""]
    for kind, pad in ((text.CLIP, None), (text.OPEN_CLIP, 0)):  # there "!" is the padding, also in released folders
        folder = tmp_path / kind
        folder.mkdir()
        for name, content in tokenizer_files(kind).items():
            (folder / name).write_text(content if isinstance(content, str) else text_as_json(content), encoding="utf-8")
        theirs = CLIPTokenizer.from_pretrained(folder)(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        assert torch.equal(theirs.input_ids, clip_tokenizer()(prompts, 77, pad_id=pad))


def text_as_json(content: object) -> str:
    import json

    return json.dumps(content)
