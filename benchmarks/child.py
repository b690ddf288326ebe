"""The work of rows that need a fresh process: python -m benchmarks.child WHAT JSON-ARGUMENTS"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def diffusers_pipeline(file: str, config: str, device: str, precision: str) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    options = {"local_files_only": True, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline.from_single_file(file, config=config, torch_dtype=dtype, **options)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe.to(device)


def diffusers_image(out: str, prompt: str, steps: int, side: int, seed: int, **where: str) -> None:
    """Load, generate one image and save it, as scripts/txt2img.py does."""
    import torch

    pipe = diffusers_pipeline(**where)
    generator = torch.Generator(where["device"]).manual_seed(seed)
    options = {"num_inference_steps": steps, "height": side, "width": side, "generator": generator}
    pipe(prompt, **options).images[0].save(out)


def diffusers_load(**where: str) -> None:
    import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401 (the import is not timed)

    timed(lambda: diffusers_pipeline(**where))


def our_load(file: str, config: str, device: str, precision: str) -> None:
    from ldm import cli

    cli.only_samples = True
    import ldm.models.diffusion.ddpm
    import ldm.modules.encoders.modules  # noqa: F401 (the import is not timed)
    from ldm.inference import load_model

    timed(lambda: load_model(config, file, device, precision))


def timed(call: Any) -> None:
    start, worked = time.perf_counter(), time.process_time()
    call()
    print(json.dumps({"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}))


if __name__ == "__main__":
    what = {each.__name__: each for each in (diffusers_image, diffusers_load, our_load)}
    what[sys.argv[1]](**json.loads(sys.argv[2]))
