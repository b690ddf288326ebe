"""Zero terminal SNR in a model."""

import pytest
import torch

from ldm.models.diffusion.ddpm import DDPM
from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from tests.models.diffusion.tiny import unet
from tests.reference import randn

SETTINGS = {"timesteps": 20, "image_size": 8, "channels": 4, "use_ema": False, "linear_start": 1e-3, "linear_end": 0.2}


def small_ddpm(**changes):
    return DDPM(unet(model_channels=32, attention_resolutions=[]), **{**SETTINGS, **changes})


def test_a_model_with_zero_terminal_snr_trains_samples_and_keeps_its_schedule_when_weights_are_loaded():
    torch.manual_seed(0)
    model = small_ddpm(zero_terminal_snr=True, parameterization="v")
    assert float(model.alphas_cumprod[-1]) == 0.0 and float(model.betas[0]) == pytest.approx(1e-3)
    loss, _ = model.p_losses(randn(1, 2, 4, 8, 8), torch.tensor([19, 19]))
    assert torch.isfinite(loss)
    assert torch.isfinite(model.sample(batch_size=2)).all()
    tables = model.alphas_cumprod.clone()
    model.load_state_dict(small_ddpm(parameterization="v").state_dict())
    assert torch.equal(model.alphas_cumprod, tables)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_to_16_bits_keeps_the_tables_of_the_schedule_and_of_the_loss(dtype):
    weighting = {"target": "ldm.models.diffusion.loss_weighting.LearnedLogVariance"}
    model = small_ddpm(loss_weighting_config=weighting, logvar_init=0.1)
    for module in (model, ImageConcatWithNoiseAugmentation()):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        assert all(torch.equal(buffer, before[name]) for name, buffer in module.to(dtype).named_buffers())
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    loss, _ = model.p_losses(randn(1, 2, 4, 8, 8), torch.tensor([0, 19]))
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


def test_a_checkpoint_with_tables_in_16_bits_keeps_those_of_the_config():
    model, tables = small_ddpm(), small_ddpm().alphas_cumprod
    state = {name: value.bfloat16() if value.shape == (20,) else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(model.alphas_cumprod, tables) and model.alphas_cumprod.dtype == torch.float32


def test_training_starts_from_a_file_without_the_parameters_of_the_loss_weighting(tmp_path):
    torch.save({"state_dict": small_ddpm().state_dict()}, tmp_path / "a.ckpt")
    weighting = {"target": "ldm.models.diffusion.loss_weighting.LearnedLogVariance"}
    model = small_ddpm(loss_weighting_config=weighting, ckpt_path=str(tmp_path / "a.ckpt"))
    assert not model.loss_weighting.linear.weight.any()


def test_zero_terminal_snr_with_eps_is_refused_when_the_model_is_built():
    with pytest.raises(ValueError, match="set parameterization v or x0"):
        small_ddpm(zero_terminal_snr=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"linear_start": 0.5, "linear_end": 0.1}, "linear_start 0.5: expected at most linear_end, which is 0.1"),
        ({"given_betas": []}, r"given_betas \[\]: expected at least one beta"),
    ],
)
def test_a_schedule_that_falls_or_has_no_steps_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_ddpm(**settings)
    small_ddpm(linear_start=0.5, linear_end=0.1, beta_schedule="cosine")
