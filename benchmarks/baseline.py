"""diffusers at its best setting, and the work of fresh processes: python -m benchmarks.baseline WHAT JSON-ARGUMENTS"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

# Imported inside functions: a process that is timed imports only its own side.


def diffusers_pipeline(file: str, config: str, device: str, precision: str) -> Any:
    """Stable Diffusion from one file, with SDPA, in channels_last. config: a folder of diffusers' configs."""
    import torch
    from diffusers import StableDiffusionPipeline

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    options = {"local_files_only": True, "safety_checker": None, "feature_extractor": None}
    pipe: Any = StableDiffusionPipeline.from_single_file(file, config=config, torch_dtype=dtype, **options)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def diffusers_image(out: str, prompt: str, steps: int, side: int, seed: int, **where: str) -> None:
    """Load, generate one image and save it, as scripts/txt2img.py does."""
    import torch

    pipe = diffusers_pipeline(**where)
    generator = torch.Generator(where["device"]).manual_seed(seed)
    options = {"num_inference_steps": steps, "height": side, "width": side, "generator": generator}
    pipe(prompt, **options).images[0].save(out)


def diffusers_load(**where: str) -> None:
    import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401 (not timed)

    print_time(lambda: diffusers_pipeline(**where))


def our_load(file: str, config: str, device: str, precision: str) -> None:
    from ldm import cli

    cli.only_samples = True
    import ldm.models.diffusion.ddpm
    import ldm.modules.encoders.modules  # noqa: F401 (not timed)
    from ldm.inference import load_model

    print_time(lambda: load_model(config, file, device, "full" if precision == "fp32" else precision))


def print_time(call: Callable[[], Any]) -> None:
    start, worked = time.perf_counter(), time.process_time()
    call()
    print(json.dumps({"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}))


if __name__ == "__main__":
    what: dict[str, Callable[..., None]] = {each.__name__: each for each in (diffusers_image, diffusers_load, our_load)}
    what[sys.argv[1]](**json.loads(sys.argv[2]))
