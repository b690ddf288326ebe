"""One pipeline for all sampling scripts: checks before anything heavy is loaded, the model, conditions, latents, pictures.

A script reads `model_facts` off the YAML, checks its settings against them (ldm.settings, ldm.task_settings), gets a `Pipeline` from
`load_model`, and writes the pictures that a task yields (`text_to_image`, `image_to_image`, `fill`, `enlarge`, `draw_samples`) through
ldm.pictures. Importing this package imports neither torch nor Lightning.
"""

from ldm.inference.beside import depth_parts, enlarge, fill
from ldm.inference.pipeline import Pipeline, fingerprint, for_inference, identify, load_model, weights_on_meta
from ldm.inference.precision import Numbers, choose_device, choose_numbers
from ldm.inference.prompts import finished, image_to_image, text_to_image
from ldm.inference.randomness import Randomness
from ldm.inference.samples import draw_samples
from ldm.settings import PRECISIONS

__all__ = [
    "PRECISIONS",
    "Numbers",
    "Pipeline",
    "Randomness",
    "choose_device",
    "choose_numbers",
    "depth_parts",
    "draw_samples",
    "enlarge",
    "fill",
    "fingerprint",
    "finished",
    "for_inference",
    "identify",
    "image_to_image",
    "load_model",
    "text_to_image",
    "weights_on_meta",
]
