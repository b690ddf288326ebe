"""Names that are imported on first use: those of published modules that live elsewhere here, and those of packages.

Research code imports the former from there. `__getattr__ = published_names(__name__)` at a module's end makes them its
own. The latter keep `--help` and flag checks from waiting for torch.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from ldm.config.instantiate import ALIASES

_HELPERS = "count_params default exists instantiate_from_config"
_SCHEDULE = "extract_into_tensor make_ddim_sampling_parameters make_ddim_timesteps noise_like"

NAMES: Mapping[str, Mapping[str, str]] = {  # published module -> the module that has them now -> names
    "main": {"ldm.util": "instantiate_from_config"},
    "scripts.txt2img": {"ldm.inference.published": "chunk load_model_from_config numpy_to_pil put_watermark"},
    "ldm.models.autoencoder": {
        "ldm.util": "instantiate_from_config",
        "ldm.modules.ema": "LitEma",
        "ldm.modules.diffusionmodules.model": "Decoder Encoder",
    },
    "ldm.models.diffusion.ddim": {"ldm.modules.diffusionmodules.util": _SCHEDULE},
    "ldm.models.diffusion.plms": {"ldm.modules.diffusionmodules.util": _SCHEDULE},
    "ldm.models.diffusion.ddpm": {
        "ldm.util": f"{_HELPERS} isimage ismap log_txt_as_img mean_flat",
        "ldm.models.autoencoder": "AutoencoderKL IdentityFirstStage VQModelInterface",
        "ldm.models.diffusion.published": "uniform_on_device",
        "ldm.modules.diffusionmodules.util": "extract_into_tensor make_beta_schedule noise_like",
        "ldm.modules.distributions.distributions": "normal_kl",
        "ldm.modules.ema": "LitEma",
    },
    "ldm.modules.attention": {
        "ldm.util": "exists",
        "ldm.modules.published": "MemoryEfficientCrossAttention XFORMERS_IS_AVAILBLE max_neg_value uniq",
    },
    "ldm.modules.diffusionmodules.model": {
        "ldm.util": "instantiate_from_config",
        "ldm.modules.published": "MemoryEfficientAttnBlock nonlinearity",
    },
    "ldm.modules.diffusionmodules.openaimodel": {
        "ldm.util": "exists",
        "ldm.modules.published": "QKVAttention QKVAttentionLegacy",
    },
    "ldm.modules.diffusionmodules.util": {
        "ldm.util": "instantiate_from_config",
        "ldm.modules.published": "HybridConditioner SiLU betas_for_alpha_bar",
    },
    "ldm.modules.distributions.distributions": {"ldm.modules.published": "AbstractDistribution DiracDistribution"},
    "ldm.modules.encoders.modules": {
        "ldm.util": f"{_HELPERS}",
        "ldm.modules.published": "AbstractEncModel IdentityEncoder",
    },
    "ldm.modules.image_degradation.bsrgan_light": {"ldm.modules.image_degradation.utils_image": "bicubic_degradation"},
}


def published_names(module: str, package: str | None = None) -> Callable[[str], Any]:
    """Return the `__getattr__` of a published module: its row of NAMES, and its classes in ALIASES.

    package: the module's key in `sys.modules` if that is another name.
    """
    homes: dict[str, list[str]] = defaultdict(list)
    for home, names in NAMES.get(module, {}).items():
        homes[home] += names.split()
    for alias, target in ALIASES.items():
        if alias.rpartition(".")[0] == module:
            homes[target.rpartition(".")[0]].append(alias.rpartition(".")[2])
    return lazy_attributes(package or module, {home: " ".join(names) for home, names in homes.items()})


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package (PEP 562). modules: module -> the names that it provides, space-separated."""
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return getattribute
