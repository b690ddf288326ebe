"""One pipeline for all sampling scripts: checks before anything heavy is loaded, the model, conditions, latents, pictures.

A script reads `model_info` off the YAML, checks its settings against them (ldm.inference.settings, ldm.inference.task_settings), gets a `Pipeline` from
`load_model`, and writes the pictures that a task yields (`text_to_image`, `image_to_image`, `inpaint`, `upscale`, `generate_samples`) through
ldm.output.images. Importing this package imports neither torch nor Lightning.
"""

from ldm.inference.class_conditional import generate_samples
from ldm.inference.concat import depth_parts, inpaint, upscale
from ldm.inference.pipeline import Pipeline, for_inference, identify, load_model
from ldm.inference.precision import Precision, choose_device, resolve_precision
from ldm.inference.randomness import Randomness
from ldm.inference.settings import PRECISIONS
from ldm.inference.text_to_image import finished, image_to_image, text_to_image
from ldm.paths import fingerprint

__all__ = [
    "PRECISIONS",
    "Pipeline",
    "Precision",
    "Randomness",
    "choose_device",
    "depth_parts",
    "fingerprint",
    "finished",
    "for_inference",
    "generate_samples",
    "identify",
    "image_to_image",
    "inpaint",
    "load_model",
    "resolve_precision",
    "text_to_image",
    "upscale",
]
