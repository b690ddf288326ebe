"""The rows: what is timed, with our public entry points on one side and diffusers or a bare loop on the other."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import training
from benchmarks.measure import Row, Work, in_child, in_process
from benchmarks.models import DTYPES, Models
from ldm.inference import TextToImageRequest, text_to_image
from ldm.inference.pipeline import Conditioned
from ldm.models.diffusion.samplers.ddim import ddim_steps
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.modules.diffusionmodules.schedule import Schedule, make_beta_schedule

PROMPT, SCALE, SEED = "a photograph of an astronaut riding a horse", 7.5, 42


# ------------------------------------------------------------------------------------------------------------ sampling


def unet_step(models: Models, precision: str, steps: int = 0) -> Work:
    """Guided steps of DDIM from the same latent under the same embeddings, a call each for the two halves or one."""
    ours, theirs = models.pair(precision)
    steps, side = steps or (20 if models.device.type == "cuda" else 2), models.side
    request = TextToImageRequest(prompt=PROMPT, steps=steps, n_samples=1, height=side, width=side).checked(ours.info)
    x_T = torch.randn(1, *request.latent_shape, generator=torch.Generator().manual_seed(SEED)).to(models.device)
    with ours.sampling():
        cond, uncond = ours.encode_prompts([PROMPT], guided=True)

    def our_latent() -> Tensor:
        with ours.sampling():
            return ours.sample(request, x_T.shape, Conditioned(cond, uncond, SCALE), x_T=x_T)

    def their_latent() -> Tensor:
        embeddings = {"prompt_embeds": cond, "negative_prompt_embeds": uncond, "latents": x_T.to(cond.dtype)}
        return theirs(**embeddings, num_inference_steps=steps, guidance_scale=SCALE, output_type="latent").images

    return Work(
        f"guided UNet step, {precision}, {side}x{side}, of {steps} DDIM steps",
        "step",
        steps,
        in_process(our_latent, models.device, [ours.model.model]),
        in_process(their_latent, models.device, [theirs.unet]),
        exact=precision == "fp32",
        dtype=DTYPES[precision],
    )


def decode(models: Models, precision: str) -> Work:
    ours, theirs = models.pair(precision)
    side = models.side
    z = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(SEED)).to(models.device)

    def our_image() -> Tensor:
        with ours.sampling():
            return ours.decode(z)

    @torch.no_grad()
    def their_image() -> Tensor:
        latent = (z / theirs.vae.config.scaling_factor).to(theirs.vae.dtype)
        return theirs.vae.decode(latent).sample.float().clamp(-1, 1)

    return Work(
        f"VAE decode, {precision}, {side}x{side}",
        "image",
        1,
        in_process(our_image, models.device, [ours.model.first_stage_model]),
        in_process(their_image, models.device, [theirs.vae]),
        exact=precision == "fp32",
        dtype=DTYPES[precision],
    )


def encode(models: Models, precision: str) -> Work:
    ours, theirs = models.pair(precision)
    side = models.side
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(SEED)).to(models.device) * 2 - 1

    def our_latent() -> Tensor:
        with ours.sampling():
            return ours.model.encode_first_stage(x).mode()

    @torch.no_grad()
    def their_latent() -> Tensor:
        return theirs.vae.encode(x.to(theirs.vae.dtype)).latent_dist.mode()

    return Work(
        f"VAE encode, {precision}, {side}x{side}",
        "image",
        1,
        in_process(our_latent, models.device, [ours.model.first_stage_model]),
        in_process(their_latent, models.device, [theirs.vae]),
        exact=precision == "fp32",
        dtype=DTYPES[precision],
    )


def text(models: Models, precision: str) -> Work:
    ours, theirs = models.pair(precision)

    def our_embeddings() -> Tensor:
        with ours.sampling():
            return torch.cat(ours.encode_prompts([PROMPT], guided=True))

    @torch.no_grad()
    def their_embeddings() -> Tensor:
        return torch.cat(theirs.encode_prompt(PROMPT, models.device, 1, True))

    return Work(
        f"text encoder, {precision}, a prompt and the empty one, tokens included",
        "prompt",
        1,
        in_process(our_embeddings, models.device, [ours.model.cond_stage_model]),
        in_process(their_embeddings, models.device, [theirs.text_encoder]),
        exact=precision == "fp32",
        dtype=DTYPES[precision],
    )


def images(models: Models, batch: int, precision: str = "bf16") -> Work:
    """The whole of txt2img after loading: prompt to images."""
    ours, theirs = models.pair(precision)
    steps, side = 50, models.side
    if models.device.type == "cpu":
        steps = {1: 4, 4: 2, 16: 1}[batch]
        side = side if batch == 1 else side // 2
    request = TextToImageRequest(
        prompt=PROMPT, steps=steps, n_samples=batch, n_iter=1, height=side, width=side, seed=SEED
    )
    request = request.checked(ours.info)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        x_T = torch.randn(batch, *request.latent_shape, device=models.device)

    def our_images() -> Tensor:
        return _pixels([each.image for each in text_to_image(ours, request, progress=False)])

    def their_images() -> Tensor:
        latents = x_T.to(theirs.unet.dtype)
        return _pixels(
            theirs([PROMPT] * batch, latents=latents, num_inference_steps=steps, guidance_scale=SCALE).images
        )

    return Work(
        f"txt2img, {precision}, batch {batch}, {steps} DDIM steps, {side}x{side}",
        "image",
        batch,
        in_process(our_images, models.device, [ours.model]),
        in_process(their_images, models.device, [theirs.unet, theirs.vae, theirs.text_encoder]),
        dtype=DTYPES[precision],
    )


def _pixels(images: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images]))


# --------------------------------------------------------------------------------------------- a sampler's own Python


def overhead(models: Models, against: str) -> Work:
    """DDIM with a network that costs nothing, against a bare loop or diffusers' scheduler."""
    steps, shape, betas = 250, (1, 4, 8, 8), make_beta_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012)
    schedule = Schedule.from_betas(betas)
    tables = {n: torch.as_tensor(getattr(schedule, n)) for n in ("betas", "alphas_cumprod", "alphas_cumprod_prev")}
    outputs = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(1)).to(models.device)
    null: Any = SimpleNamespace(
        num_timesteps=1000,
        parameterization="eps",
        device=models.device,
        apply_model=lambda x, t, cond: outputs,
        **tables,
    )
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(models.device)
    cond = torch.zeros(1, 1, 1, device=models.device)
    sampler, table = make_sampler("ddim", null), ddim_steps(null, steps, 0.0, "uniform")
    guidance: dict[str, Any] = {"unconditional_guidance_scale": SCALE, "unconditional_conditioning": cond}

    def ours() -> Tensor:
        return sampler.sample(steps, 1, shape[1:], cond, x_T=x_T, verbose=False, **guidance).samples

    @torch.no_grad()
    def bare() -> Tensor:
        x, both, t = x_T, torch.cat([cond, cond]), torch.zeros(2, dtype=torch.int64, device=models.device)
        for alpha, prev in zip(table.alphas[::-1].tolist(), table.alphas_prev[::-1].tolist()):
            uncond, guided = null.apply_model(torch.cat([x, x]), t, both).chunk(2)
            eps = torch.lerp(uncond, guided, SCALE)
            x0 = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
            x = prev**0.5 * x0 + (1 - prev) ** 0.5 * eps
        return x

    @torch.no_grad()
    def diffusers_loop() -> Tensor:
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler(
            1000, trained_betas=betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
        scheduler.set_timesteps(steps, device=models.device)
        x, both = x_T, torch.cat([cond, cond])
        for t in scheduler.timesteps:
            uncond, guided = null.apply_model(scheduler.scale_model_input(torch.cat([x, x]), t), t, both).chunk(2)
            x = scheduler.step(uncond + SCALE * (guided - uncond), t, x).prev_sample
        return x

    return Work(
        f"DDIM with a null model, {steps} guided steps",
        "step",
        steps,
        in_process(ours, models.device),
        in_process(bare if against == "a bare loop" else diffusers_loop, models.device),
        exact=True,
        against=against,
    )


# ----------------------------------------------------------------------------------------------------- fresh processes


def start(models: Models, precision: str = "bf16", steps: int = 1) -> Work:
    """From the start of a process to the first saved image."""
    folder = models.folder / "start"
    side, device = str(models.side), str(models.device)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ours = [sys.executable, "scripts/txt2img.py", "--config", str(models.config), "--ckpt", str(models.file)]
    ours += ["--prompt", PROMPT, "--ddim_steps", str(steps), "--n_samples", "1", "--n_iter", "1", "--H", side]
    ours += ["--W", side, "--seed", str(SEED), "--precision", precision, "--device", device, "--safety", "off"]
    ours += ["--watermark", "off", "--skip_grid", "--outdir", str(folder / "ours")]
    arguments = {"prompt": PROMPT, "steps": steps, "side": models.side, "seed": SEED, "out": str(folder / "theirs.png")}

    def our_image() -> Tensor:
        [file] = (folder / "ours" / "samples").glob("*.png")
        return _read_once(file)

    return Work(
        f"start of the process to a saved image, {precision}, {steps} step, {side}x{side}",
        "start",
        1,
        in_child(ours, our_image),
        in_child(_child("diffusers_image", models, precision, **arguments), lambda: _read_once(folder / "theirs.png")),
    )


def load(models: Models, precision: str) -> Work:
    return Work(
        f"load a float16 .safetensors as {precision}, after the imports",
        "load",
        1,
        in_child(_child("our_load", models, precision, config=str(models.config))),
        in_child(_child("diffusers_load", models, precision)),
        compared=False,
    )


def imports(models: Models) -> Work:
    ours = "from ldm import cli; cli.only_samples = True; from ldm.inference import load_model, text_to_image"
    return Work(
        "import what txt2img needs",
        "process",
        1,
        in_child([sys.executable, "-c", ours]),
        in_child([sys.executable, "-c", "from diffusers import StableDiffusionPipeline"]),
        compared=False,
    )


def _child(what: str, models: Models, precision: str, **arguments: Any) -> list[str]:
    where = {"file": str(models.file), "device": str(models.device)}
    where |= {"precision": "full" if (what, precision) == ("our_load", "fp32") else precision}
    where |= {"config": str(models.diffusers_config)} | arguments
    return [sys.executable, "-m", "benchmarks.child", what, json.dumps(where)]


def _read_once(file: Path) -> Tensor:
    from PIL import Image

    with Image.open(file) as image:
        pixels = _pixels([image.convert("RGB")])
    file.unlink()
    return pixels


ROWS: dict[str, Callable[[Models], Row]] = {
    "unet-bf16": partial(unet_step, precision="bf16"),
    "decode-bf16": partial(decode, precision="bf16"),
    "start": start,
    "txt2img-1": partial(images, batch=1),
    "txt2img-4": partial(images, batch=4),
    "txt2img-16": partial(images, batch=16),
    "encode-bf16": partial(encode, precision="bf16"),
    "text-bf16": partial(text, precision="bf16"),
    "unet-fp32": partial(unet_step, precision="fp32"),
    "decode-fp32": partial(decode, precision="fp32"),
    "encode-fp32": partial(encode, precision="fp32"),
    "text-fp32": partial(text, precision="fp32"),
    "train-quickstart": training.quickstart,
    "train-256": partial(training.finetune, side=256, cached=False),
    "train-512": partial(training.finetune, side=512, cached=False),
    "train-256-cached": partial(training.finetune, side=256, cached=True),
    "train-512-cached": partial(training.finetune, side=512, cached=True),
    "loader": training.loader,
    "overhead": partial(overhead, against="a bare loop"),
    "overhead-diffusers": partial(overhead, against="diffusers"),
    "load-bf16": partial(load, precision="bf16"),
    "load-fp32": partial(load, precision="fp32"),
    "import": imports,
}
"""By name, in the order of a run: first what a run that is cut short should have."""
