"""One pipeline for all sampling scripts: checks before anything heavy is loaded, the model, conditions, latents, pictures.

A script reads `model_facts` off the YAML, checks its settings against them (ldm.inference.settings, ldm.inference.task_settings), gets a `Pipeline` from
`load_model`, and writes the pictures that a task yields (`text_to_image`, `image_to_image`, `fill`, `enlarge`, `draw_samples`) through
ldm.output.images. Importing this package imports neither torch nor Lightning.
"""

from ldm.inference.class_conditional import draw_samples
from ldm.inference.concat import depth_parts, enlarge, fill
from ldm.inference.pipeline import Pipeline, fingerprint, for_inference, identify, load_model, weights_on_meta
from ldm.inference.precision import Numbers, choose_device, choose_numbers
from ldm.inference.randomness import Randomness
from ldm.inference.settings import PRECISIONS
from ldm.inference.text_to_image import finished, image_to_image, text_to_image

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
