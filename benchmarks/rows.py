"""The rows: what is timed, with our public entry points on one side and diffusers or a bare loop on the other."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import training
from benchmarks.measure import Row, Work, in_child, in_process
from benchmarks.models import DTYPES, Models
from ldm.inference import TextToImageRequest, text_to_image
from ldm.inference.pipeline import Conditioned
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.modules.diffusionmodules.schedule import Schedule, make_beta_schedule

PROMPT, SCALE, SEED = "a photograph of an astronaut riding a horse", 7.5, 42


# ------------------------------------------------------------------------------------------------------------ sampling


def unet_step(models: Models, precision: str, compiled: bool = False) -> Work:
    """Guided steps of DDIM from the same latent under the same embeddings, as a whole run makes them."""
    steps, side = 20 if models.device.type == "cuda" else 2, models.side
    request = TextToImageRequest(prompt=PROMPT, steps=steps, n_samples=1, height=side, width=side).checked(models.info)
    x_T = _noise(models, *request.latent_shape)

    @cache
    def our_conditions() -> Conditioned:
        ours = models.ours(precision, compiled)
        with ours.sampling():
            cond, uncond = ours.encode_prompts([PROMPT], guided=True)
        return Conditioned(cond, uncond, SCALE)

    def our_latent() -> Tensor:
        ours = models.ours(precision, compiled)
        with ours.sampling():
            return ours.sample(request, x_T.shape, our_conditions(), x_T=x_T)

    @cache
    def their_embeddings() -> dict[str, Tensor]:
        encoded = models.theirs(precision, compiled).encode_prompt(PROMPT, models.device, 1, True)
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), encoded))

    @torch.no_grad()
    def their_latent() -> Tensor:
        theirs, given = models.theirs(precision, compiled), their_embeddings()
        given = {**given, "latents": x_T.to(DTYPES[precision])}
        return theirs(**given, num_inference_steps=steps, guidance_scale=SCALE, output_type="latent").images

    return Work(
        f"guided UNet step, {precision}{', compiled' if compiled else ''}, {side}x{side}, of {steps} DDIM steps",
        "step",
        steps,
        in_process(our_latent, models.device, lambda: [models.ours(precision, compiled).model.model]),
        in_process(their_latent, models.device, lambda: [models.theirs(precision, compiled).unet]),
        exact=precision == "fp32",
        dtype=DTYPES[precision],
        own_processes=_as_a_user_runs_it(models),
    )


def stage(models: Models, name: str, precision: str) -> Work:
    """One call of the VAE's decoder or encoder, or of the text encoder with its tokenizer."""
    side, device = models.side, models.device
    z, x = _noise(models, 4, side // 8, side // 8), _noise(models, 3, side, side).clamp(-1, 1)
    prompts = "tokens and text encoder, a prompt and the empty one"
    ours: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
        "decode": ("VAE decode", lambda pipeline: pipeline.decode(z)),
        "encode": ("VAE encode", lambda pipeline: pipeline.model.encode_first_stage(x).mode()),
        "text": (prompts, lambda pipeline: torch.cat(pipeline.encode_prompts([PROMPT], guided=True))),
    }
    theirs: dict[str, Callable[[Any], Tensor]] = {
        "decode": lambda pipe: _decoded(pipe.vae, z),
        "encode": lambda pipe: pipe.vae.encode(x.to(pipe.vae.dtype)).latent_dist.mode(),
        "text": lambda pipe: torch.cat(pipe.encode_prompt(PROMPT, device, 1, True)),
    }
    what, call = ours[name]
    stages = ("cond_stage_model", "text_encoder") if name == "text" else ("first_stage_model", "vae")

    def our_output() -> Tensor:
        pipeline = models.ours(precision)
        with pipeline.sampling():
            return call(pipeline)

    return Work(
        f"{what}, {precision}" + ("" if name == "text" else f", {side}x{side}"),
        "call",
        1,
        in_process(our_output, device, lambda: [getattr(models.ours(precision).model, stages[0])]),
        in_process(
            torch.no_grad()(lambda: theirs[name](models.theirs(precision))),
            device,
            lambda: [getattr(models.theirs(precision), stages[1])],
        ),
        exact=precision == "fp32",
        dtype=DTYPES[precision],
        own_processes=_as_a_user_runs_it(models),
    )


def _decoded(vae: Any, z: Tensor) -> Tensor:
    return vae.decode((z / vae.config.scaling_factor).to(vae.dtype)).sample.float().clamp(-1, 1)


def _as_a_user_runs_it(models: Models) -> bool:
    """True on the CPU, where sides in one process would share an allocator; not for a tiny model, for speed."""
    return models.device.type == "cpu" and models.size != "tiny"


def _noise(models: Models, *shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(SEED)).to(models.device)


def images(models: Models, batch: int, precision: str = "bf16") -> Work:
    """The whole of txt2img after loading: prompt to images."""
    steps, side = 50, models.side
    if models.device.type == "cpu":
        steps = {1: 4, 4: 2, 16: 1}[batch]
        side = side if batch == 1 else side // 2
    shape: dict[str, Any] = {"n_samples": batch, "n_iter": 1, "height": side, "width": side}
    request = TextToImageRequest(prompt=PROMPT, steps=steps, seed=SEED, **shape).checked(models.info)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        x_T = torch.randn(batch, *request.latent_shape, device=models.device)

    def our_images() -> Tensor:
        generated = text_to_image(models.ours(precision), request, progress=False)
        return _pixels([each.image for each in generated])

    def their_images() -> Tensor:
        theirs = models.theirs(precision)
        options = {"num_inference_steps": steps, "guidance_scale": SCALE, "latents": x_T.to(theirs.unet.dtype)}
        return _pixels(theirs([PROMPT] * batch, **options).images)

    def their_parts() -> list[nn.Module]:
        theirs = models.theirs(precision)
        return [theirs.unet, theirs.vae, theirs.text_encoder]

    return Work(
        f"txt2img, {precision}, batch {batch}, {steps} DDIM steps, {side}x{side}",
        "image",
        batch,
        in_process(our_images, models.device, lambda: [models.ours(precision).model]),
        in_process(their_images, models.device, their_parts),
        dtype=DTYPES[precision],
        own_processes=_as_a_user_runs_it(models),
    )


def _pixels(images: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images]))


# --------------------------------------------------------------------------------------------- a sampler's own Python


def overhead(models: Models) -> Work:
    """DDIM with a network that costs nothing, against diffusers' scheduler; sampler_overhead.py has a bare loop."""
    steps, shape, betas = 250, (1, 4, 8, 8), make_beta_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012)
    schedule = Schedule.from_betas(betas)
    tables = {n: torch.as_tensor(getattr(schedule, n)) for n in ("betas", "alphas_cumprod", "alphas_cumprod_prev")}
    outputs = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(1)).to(models.device)
    null: Any = SimpleNamespace(num_timesteps=1000, parameterization="eps", device=models.device, **tables)
    null.apply_model = lambda x, t, cond: outputs
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(models.device)
    cond = torch.zeros(1, 1, 1, device=models.device)
    sampler = make_sampler("ddim", null)
    guidance: dict[str, Any] = {"unconditional_guidance_scale": SCALE, "unconditional_conditioning": cond}

    def ours() -> Tensor:
        return sampler.sample(steps, 1, shape[1:], cond, x_T=x_T, verbose=False, **guidance).samples

    @torch.no_grad()
    def diffusers_loop() -> Tensor:
        from diffusers import DDIMScheduler

        options: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        scheduler: Any = DDIMScheduler(1000, trained_betas=betas, **options)
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
        in_process(diffusers_loop, models.device),
        exact=True,
    )


# ----------------------------------------------------------------------------------------------------- fresh processes


def start(models: Models, precision: str = "bf16", steps: int = 1) -> Work:
    """From the start of a process to the first saved image, so small that the start is what is timed."""
    folder, pixels = models.folder / "start", 64
    side, device = str(pixels), str(models.device)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ours = [sys.executable, "scripts/txt2img.py", "--config", str(models.config), "--ckpt", str(models.file)]
    ours += ["--prompt", PROMPT, "--ddim_steps", str(steps), "--n_samples", "1", "--n_iter", "1", "--H", side]
    ours += ["--W", side, "--seed", str(SEED), "--precision", precision, "--device", device, "--safety", "off"]
    ours += ["--watermark", "off", "--skip_grid", "--outdir", str(folder / "ours")]
    arguments = {"prompt": PROMPT, "steps": steps, "side": pixels, "seed": SEED, "out": str(folder / "theirs.png")}

    def our_image() -> Tensor:
        [file] = (folder / "ours" / "samples").glob("*.png")
        return _read_once(file)

    return Work(
        f"start of the process to a saved image, {precision}, {steps} step, {pixels}x{pixels}",
        "start",
        1,
        in_child(ours, our_image),
        in_child(_child("diffusers_image", models, precision, **arguments), lambda: _read_once(folder / "theirs.png")),
    )


def load(models: Models, precision: str, suffix: str = ".safetensors") -> Work:
    file = {"file": str(models.weights(suffix))}
    return Work(
        f"load a {'float16' if suffix == '.safetensors' else 'float32'} {suffix} as {precision}, after the imports",
        "load",
        1,
        in_child(_child("our_load", models, precision, config=str(models.config), **file)),
        in_child(_child("diffusers_load", models, precision, **file)),
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
    where = {"file": str(models.file), "config": str(models.diffusers_config), "device": str(models.device)}
    where |= {"precision": precision, **arguments}
    return [sys.executable, "-m", "benchmarks.baseline", what, json.dumps(where)]


def _read_once(file: Path) -> Tensor:
    from PIL import Image

    with Image.open(file) as image:
        pixels = _pixels([image.convert("RGB")])
    file.unlink()
    return pixels


ROWS: dict[str, Callable[[Models], Row]] = {
    "unet-bf16": partial(unet_step, precision="bf16"),
    "decode-bf16": partial(stage, name="decode", precision="bf16"),
    "txt2img-1": partial(images, batch=1),
    "txt2img-4": partial(images, batch=4),
    "txt2img-16": partial(images, batch=16),
    "unet-bf16-compiled": partial(unet_step, precision="bf16", compiled=True),
    "train-512-cached": partial(training.finetune, side=512, cached=True),
    "train-256-cached": partial(training.finetune, side=256, cached=True),
    "train-512": partial(training.finetune, side=512, cached=False),
    "train-256": partial(training.finetune, side=256, cached=False),
    "start": start,
    "overhead": overhead,
    "train-quickstart": training.quickstart,
    **{f"{name}-bf16": partial(stage, name=name, precision="bf16") for name in ("encode", "text")},
    "unet-fp32": partial(unet_step, precision="fp32"),
    **{f"{name}-fp32": partial(stage, name=name, precision="fp32") for name in ("decode", "encode", "text")},
    "unet-fp32-compiled": partial(unet_step, precision="fp32", compiled=True),
    "load-bf16": partial(load, precision="bf16"),
    "load-fp32": partial(load, precision="fp32"),
    "load-ckpt": partial(load, precision="bf16", suffix=".ckpt"),
    "import": imports,
    "loader": training.loader,
}
"""By name, in the order of a run: first what a run that is cut short should have."""
