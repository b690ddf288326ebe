"""DDIM: the published numbers, its noise, its published step, and its order on exact data."""

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from tests.models.diffusion.samplers.published import COND, UNCOND, X0, assert_published
from tests.models.diffusion.samplers.toy import SHAPE, X_T, GaussianModel, ToyModel, assert_order, sample
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error

IMG2IMG = np.load(GOLDEN / "numerics" / "img2img.npz")


@pytest.mark.parametrize("name", ["ddim_20", "ddim_20_cfg", "ddim_20_eta1", "ddim_20_eta05_temp08", "ddim_20_mask"])
def test_samples_are_the_published_ones(name):
    assert_published(name, DDIMSampler(ToyModel()))


def test_image_to_image_is_the_published_one():
    sampler, t_enc = DDIMSampler(ToyModel()), int(IMG2IMG["t_enc"])
    sampler.make_schedule(int(IMG2IMG["steps"]), ddim_eta=0.0, verbose=False)
    z = sampler.stochastic_encode(X0, torch.tensor([t_enc] * 2), noise=randn(int(IMG2IMG["noise_seed"]), 2, *SHAPE))
    y = sampler.decode(z, COND, t_enc, 5.0, UNCOND, verbose=False)
    assert rel_error(z, IMG2IMG["encoded"]) < TOLERANCE and rel_error(y, IMG2IMG["decoded"]) < TOLERANCE


def test_it_converges_at_first_order():
    assert_order("ddim", 1, "uniform", (500, 1000))  # timesteps uniform in time are coarse near the end


def test_noisy_samples_have_the_datas_mean_and_deviation():
    torch.manual_seed(0)
    x = DDIMSampler(GaussianModel()).sample(500, 16, (4, 16, 16), eta=1.0, verbose=False).samples
    assert abs(float(x.mean()) - 0.7) < 0.01 and abs(float(x.std()) - 0.3) < 0.01


def test_eta_zero_is_deterministic_and_eta_one_is_not():
    for eta, equal in ((0.0, True), (1.0, False)):
        assert torch.equal(*(sample("ddim", ToyModel(), 10, seed, eta=eta).samples for seed in (1, 2))) == equal


@pytest.mark.parametrize("options", [{}, {"quantize_denoised": True, "temperature": 0.5, "repeat_noise": True}])
def test_one_published_step_is_the_loops_step(options):
    model = ToyModel()
    model.first_stage_model = torch.nn.Module()
    model.first_stage_model.quantize = lambda x0: (x0.round(),)
    sampler = DDIMSampler(model)
    sampler.make_schedule(20, ddim_eta=1.0, verbose=False)
    t = torch.full((2,), int(sampler.ddim_timesteps[19]))
    torch.manual_seed(0)
    x_prev, x0 = sampler.p_sample_ddim(X_T, COND, t, 19, **options)
    renamed = {"quantize_x0" if key == "quantize_denoised" else key: value for key, value in options.items()}
    _, inter = sample("ddim", model, 20, eta=1.0, conditioning=COND, log_every_t=1, **renamed)
    assert torch.equal(x_prev, inter["x_inter"][1]) and torch.equal(x0, inter["pred_x0"][1])


def test_a_published_step_takes_each_samples_own_timestep_and_guidance():
    sampler = DDIMSampler(model := ToyModel())
    sampler.make_schedule(20, verbose=False)
    sampler.p_sample_ddim(X_T, COND, torch.tensor([951, 3]), 19)
    assert model.calls[-1][1].tolist() == [951, 3]
    plain, guided = (
        sampler.p_sample_ddim(
            X_T, COND, torch.tensor([951, 951]), 19, unconditional_guidance_scale=s, unconditional_conditioning=UNCOND
        )[0]
        for s in (1.0, 5.0)
    )
    assert not torch.allclose(plain, guided)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_original_steps_are_all_timesteps_at_the_scheduled_eta(eta):
    model = ToyModel(timesteps=20)
    sampler = DDIMSampler(model)
    sampler.make_schedule(5, ddim_eta=eta, verbose=False)
    t = torch.tensor([7, 7])
    z = sampler.stochastic_encode(X0, t, use_original_steps=True, noise=torch.zeros_like(X0))
    assert torch.allclose(z, model.sqrt_alphas_cumprod[7] * X0)
    model.calls.clear()
    torch.manual_seed(0)
    x = sampler.decode(z, COND, 7, use_original_steps=True, verbose=False)
    assert [int(t[0]) for _, t in model.calls] == [6, 5, 4, 3, 2, 1, 0]
    torch.manual_seed(0)
    for k in range(6, -1, -1):  # eq. 12 and 16
        alpha, prev = model.alphas_cumprod[k].double(), model.alphas_cumprod_prev[k].double()
        sigma = eta * ((1 - prev) / (1 - alpha) * (1 - alpha / prev)).sqrt()
        eps = model.apply_model(z, torch.tensor([k, k]), COND)
        x0 = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        z = (prev.sqrt() * x0 + (1 - prev - sigma**2).clamp(min=0).sqrt() * eps + sigma * torch.randn_like(X0)).float()
    assert rel_error(x, z) < 1e-5


def test_encoding_is_one_level_noisier_than_the_first_step_of_decoding():
    sampler = DDIMSampler(ToyModel())
    sampler.make_schedule(12, verbose=False)
    z = sampler.stochastic_encode(torch.ones(2, *SHAPE), torch.tensor([5, 9]), noise=torch.zeros(2, *SHAPE))
    assert torch.allclose(z[:, 0, 0, 0], sampler.ddim_alphas[[5, 9]].sqrt())
