"""Checks that all requests share, without torch."""

import subprocess
import sys

import pytest

from ldm.config.model_info import model_info
from ldm.inference.requests import TextToImageRequest
from ldm.paths import ROOT

AUTOENCODER = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"ddconfig": {"ch_mult": [1, 2, 4, 4]}}}
CLIP = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}


def config(**params) -> dict:
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {"channel_mult": [1, 2, 4, 4]}}
    defaults = {"channels": 4, "first_stage_config": AUTOENCODER, "cond_stage_config": CLIP, "unet_config": unet}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**defaults, **params}}}


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
def test_every_step_count_of_the_schedule_is_accepted(steps):
    assert TextToImageRequest(steps=steps).checked(model_info(config())).steps == steps


@pytest.mark.parametrize(
    "sampler, eta", [("ddim", 0.0), ("plms", 0.0), ("ancestral", 1.0), ("euler_ancestral", 1.0), ("heun", 0.0)]
)
def test_eta_defaults_to_the_samplers_own(sampler, eta):
    assert TextToImageRequest(sampler=sampler).checked(model_info(config())).eta == eta
    assert TextToImageRequest(sampler=sampler, eta=eta).checked(model_info(config())).eta == eta


def test_at_zero_terminal_snr_continuous_time_solvers_require_trailing_spacing():
    info = model_info(config(parameterization="v", zero_terminal_snr=True))
    with pytest.raises(
        ValueError, match=r"--spacing uniform: heun cannot start at zero terminal SNR, .* choose trailing"
    ):
        TextToImageRequest(sampler="heun").checked(info)
    assert (
        TextToImageRequest(sampler="heun", spacing="trailing").checked(info).spacing
        == TextToImageRequest(spacing="trailing").checked(info).spacing
    )


def test_checks_need_neither_torch_nor_lightning():
    code = (
        "import sys; from ldm import inference; from ldm.inference import cli; from ldm.paths import ROOT;"
        "info = inference.read_model_info(ROOT / 'configs/stable-diffusion/v1-inference.yaml');"
        "inference.TextToImageRequest(prompt='a cat', emphasis=True).checked(info);"
        "print([m for m in ('torch', 'pytorch_lightning', 'numpy', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
