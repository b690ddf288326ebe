"""Sampling from trained models: the public names, each imported on first use.

Requests and the model's info need no torch, so scripts check their flags before `load_model` imports it:

    info = inference.read_model_info("configs/stable-diffusion/v1-inference.yaml")
    request = inference.TextToImageRequest(prompt="a red kite", seed=1).checked(info)
    pipeline = inference.load_model(info, "sd-v1-4.ckpt")
    for generated in inference.text_to_image(pipeline, request):
        generated.image.save("kite.png")
"""

# ruff: noqa: F401
from typing import TYPE_CHECKING, Any

from ldm import cli as command_line
from ldm.published import lazy_attributes

if TYPE_CHECKING:
    from ldm.checkpoint import MissingWeightsError, WeightsSource, open_weights
    from ldm.config.instantiate import allow_targets
    from ldm.config.model_info import ModelInfo, model_info, read_model_info
    from ldm.inference.embeddings import warn_unused
    from ldm.inference.inputs import (
        check_image,
        check_pairs,
        find_depth,
        find_pairs,
        load_image,
        load_mask,
        make_hints,
        one_pair,
        parse_batch,
        parse_classes,
        parse_conditions,
        read_prompts,
    )
    from ldm.inference.memory import batch_by_memory, known_free_memory
    from ldm.inference.pipeline import Pipeline, load_model
    from ldm.inference.precision import choose_device
    from ldm.inference.quantize import check_quantization
    from ldm.inference.requests import (
        ClassConditionalRequest,
        ConditionalRequest,
        ControlRequest,
        EditRequest,
        ImageToImageRequest,
        InpaintRequest,
        RetrievalRequest,
        TextToImageRequest,
        UpscaleRequest,
    )
    from ldm.inference.runs import SavedRun, find_run, run_of
    from ldm.inference.tasks.class_conditional import generate_samples
    from ldm.inference.tasks.conditional import ConditionalSample, read_samples, sample_conditional
    from ldm.inference.tasks.control import control_to_image, load_controlnet
    from ldm.inference.tasks.edit import edit
    from ldm.inference.tasks.image_to_image import image_to_image
    from ldm.inference.tasks.inpaint import inpaint
    from ldm.inference.tasks.text_to_image import text_to_image
    from ldm.inference.tasks.upscale import upscale
    from ldm.inference.writing import write_conditional, write_images, write_named, write_samples

_LIGHT = {
    "ldm.config.instantiate": "allow_targets",
    "ldm.config.model_info": "ModelInfo model_info read_model_info",
    "ldm.inference.inputs": (
        "check_image check_pairs find_depth find_pairs load_image load_mask make_hints one_pair parse_batch "
        "parse_classes parse_conditions read_prompts"
    ),
    "ldm.inference.requests": (
        "ClassConditionalRequest ConditionalRequest ControlRequest EditRequest ImageToImageRequest InpaintRequest "
        "RetrievalRequest TextToImageRequest UpscaleRequest"
    ),
    "ldm.inference.runs": "SavedRun find_run run_of",
    "ldm.inference.writing": "write_conditional write_images write_named write_samples",
}
_HEAVY = {  # these import torch, and Lightning unless this program only samples
    "ldm.checkpoint": "MissingWeightsError WeightsSource open_weights",
    "ldm.inference.embeddings": "warn_unused",
    "ldm.inference.memory": "batch_by_memory known_free_memory",
    "ldm.inference.pipeline": "Pipeline load_model",
    "ldm.inference.precision": "choose_device",
    "ldm.inference.quantize": "check_quantization",
    "ldm.inference.tasks.class_conditional": "generate_samples",
    "ldm.inference.tasks.conditional": "ConditionalSample read_samples sample_conditional",
    "ldm.inference.tasks.control": "control_to_image load_controlnet",
    "ldm.inference.tasks.edit": "edit",
    "ldm.inference.tasks.image_to_image": "image_to_image",
    "ldm.inference.tasks.inpaint": "inpaint",
    "ldm.inference.tasks.text_to_image": "text_to_image",
    "ldm.inference.tasks.upscale": "upscale",
}
_lazy = lazy_attributes(__name__, _LIGHT | _HEAVY)


def __getattr__(name: str) -> Any:
    if not command_line.only_samples and any(name in names.split() for names in _HEAVY.values()):
        command_line.import_lightning()  # reports a torchvision that does not fit torch
    with command_line.collector_off():
        return _lazy(name)
