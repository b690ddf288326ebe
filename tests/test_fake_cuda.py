"""Samplers, conditioning, tasks and losses on fake CUDA tensors: nothing stays on the CPU, no loop uses the host."""

import itertools
from contextlib import nullcontext
from copy import deepcopy
from functools import lru_cache

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ldm import rng
from ldm.checkpoint import weights_on_meta
from ldm.config.model_info import model_info
from ldm.inference import (
    ControlRequest,
    EditRequest,
    Pipeline,
    TextToImageRequest,
    control_to_image,
    edit,
    generate_samples,
    image_to_image,
    inpaint,
    text_to_image,
    upscale,
)
from ldm.inference.randomness import Randomness
from ldm.inference.requests import ClassConditionalRequest, ImageToImageRequest, InpaintRequest, UpscaleRequest
from ldm.models.diffusion import loss_weighting as weightings
from ldm.models.diffusion.ddpm import LOSSES
from ldm.models.diffusion.samplers import ddim
from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.guidance import GuidedNetwork
from ldm.models.diffusion.samplers.noise import NoisePerSample
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from ldm.models.diffusion.samplers.spacing import model_alphas_cumprod
from ldm.models.diffusion.timesteps import LogitNormalTimesteps, UniformTimesteps
from ldm.models.diffusion.training_noise import TrainingNoise
from ldm.rng import BatchSamples
from ldm.util import instantiate_from_config
from tests.fake_cuda import CUDA, FAKE, Gain, no_transfers, require_cuda
from tests.images import hole, make_image
from tests.models.diffusion import modes
from tests.models.diffusion.samplers.toy import COND, SHAPE, UNCOND, X0, X_T, ToyModel
from tests.models.diffusion.tiny import batch
from tests.models.first_stages import batches, make_autoencoder, make_vq
from tests.tiny import KINDS, text_model_config


class Corrector:
    def modify_score(self, model, eps, x, t, c, gain=1.0):
        return eps * gain


GUIDED = {"conditioning": COND, "unconditional_guidance_scale": 5.0, "unconditional_conditioning": UNCOND}
PREDICTION = {
    "guidance_rescale": 0.7,
    "guidance_interval": (0.3, 5.0),
    "dynamic_threshold": 0.995,
    "clip_denoised": True,
    "quantize_x0": True,
    "score_corrector": Corrector(),
    "corrector_kwargs": {"gain": 0.9},
}
MASK = (X0[:, :1] > 0).float()
CASES = {
    "plain": {"conditioning": COND, "log_every_t": 1},
    "guided": {**GUIDED, **PREDICTION},
    "masked": {**GUIDED, "mask": MASK, "x0": X0},
    "zero terminal SNR": {**GUIDED, "ddim_discretize": "trailing"},
}


def steps_of(name, model, steps, spacing="uniform"):
    """A sampler whose steps are made now, from tables that have values, and whose loop may not use the host.

    A sampler reads the model's tables once, before its run.
    """
    sampler = make_sampler(name, model)
    made, loop = sampler.checked_steps(steps, None, spacing), sampler.loop

    def guarded(*args, **kwargs):
        with no_transfers():
            return loop(*args, **kwargs)

    sampler.make_steps, sampler.loop = lambda *_: made, guarded
    return sampler


def fake_run(name, steps, spacing="uniform", zero_terminal_snr=False):
    """`steps_of` a toy model on the fake GPU."""
    with unset_fake_temporarily():
        model = ToyModel("v" if zero_terminal_snr else "eps", 20, zero_terminal_snr)
        sampler = steps_of(name, model, steps, spacing)
    FAKE.move(model)
    model.device, model.first_stage_model = CUDA, torch.nn.Module()
    model.first_stage_model.quantize = lambda x0: (x0.round(), None)
    return sampler


def noise_options(name):
    if not SAMPLERS[name].adds_noise:
        return {}
    return {"temperature": 0.5, "noise_dropout": 0.1, "repeat_noise": True}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_neither_waits_nor_uploads_in_its_loop(name, case):
    with FAKE:
        options = FAKE.moved(CASES[case])
        options |= noise_options(name) if case == "guided" else {"x_T": FAKE.moved(X_T)}
        sampler = fake_run(name, 5, options.get("ddim_discretize", "uniform"), case == "zero terminal SNR")
        samples = sampler.sample(5, 2, SHAPE, verbose=False, **options)
    require_cuda(samples)
    assert samples.samples.shape == X_T.shape


@pytest.mark.parametrize("name", SAMPLERS)
def test_image_to_image_neither_waits_nor_uploads_in_its_loop(name):
    with FAKE:
        sampler = fake_run(name, 5)
        sampler.make_schedule(5, verbose=False)
        cond, uncond, x0, mask = FAKE.moved((COND, UNCOND, X0, MASK))
        x = sampler.stochastic_encode(x0, [3, 3])
        out = sampler.decode(x, cond, 3, 5.0, uncond, mask=mask, x0=x0, verbose=False)
    require_cuda(out)


def test_inversion_and_guidance_by_an_image_do_not_wait_either():
    with FAKE:
        sampler = fake_run("ddim", 5)
        sampler.make_schedule(5, verbose=False)
        cond, uncond, x0 = FAKE.moved((COND, UNCOND, X0))
        require_cuda(sampler.encode(x0, cond, 4, unconditional_guidance_scale=3.0, unconditional_conditioning=uncond))
        apply_model = sampler.model.apply_model
        sampler.model.apply_model = lambda x, t, c: apply_model(x, t, c["c_crossattn"][0]) + c["c_concat"][0]
        both = [{"c_crossattn": [part], "c_concat": [x0]} for part in (cond, uncond)]
        options = {"unconditional_guidance_scale": 5.0, "image_guidance_scale": 1.5}
        require_cuda(sampler.sample(5, 2, SHAPE, both[0], unconditional_conditioning=both[1], verbose=False, **options))


def test_noise_of_single_images_comes_from_the_host():
    """Its values are the same on every device, so they are generated on the CPU and uploaded."""
    with FAKE:
        source, x = NoisePerSample([1, 2]), FAKE.moved(X_T)
        require_cuda([source.normal_like(x), source.dropout(x, 0.1)])


@pytest.mark.parametrize(
    "broken",
    [
        lambda x, t, c: x * float(x.mean()),
        lambda x, t, c: x if bool((x > 0).any()) else -x,
        lambda x, t, c: x + torch.ones(SHAPE),
        lambda x, t, c: x * t.cpu()[0],
        lambda x, t, c: x + torch.ones(SHAPE).to(x.device),
        lambda x, t, c: x + torch.tensor([0.5], device=x.device),
    ],
    ids=["item", "bool", "on the CPU", "download", "upload", "constant"],
)
def test_a_network_that_waits_or_uploads_is_found(broken):
    with FAKE:
        sampler = fake_run("ddim", 5)
        sampler.model.apply_model = broken
        with pytest.raises(RuntimeError, match=r"_local_scalar_dense|same device|between host and device"):
            sampler.sample(5, 2, SHAPE, FAKE.moved(COND), verbose=False)


# ---------------------------------------------------------------------------------------------- conditioning, training


def built(config):
    """A model without values, whose parameters `FakeCuda.move` replaces."""
    with weights_on_meta():
        return instantiate_from_config(OmegaConf.create(config))


@lru_cache
def model_of(kind):
    """(config, schedule of the model, model on the fake GPU) of a kind in tests/tiny.py, in eval mode."""
    config = OmegaConf.create(text_model_config(**{"cond_stage_trainable": False, **KINDS[kind]}))
    model = built(config["model"]).eval()
    tables = model_alphas_cumprod(model)
    with FAKE:
        return config, tables, FAKE.move(model)


@pytest.mark.parametrize("name", modes.MODES)
def test_conditioning_and_loss_stay_on_the_device(name):
    params = modes.MODES[name][3]
    # Which texts of a batch are dropped is decided by random numbers on the host, which fake tensors do not have.
    changes = {"cond_dropout": 0.0} if params["cond_stage_key"] == "caption" else {}
    with weights_on_meta():
        model = modes.build(name, unet_config={"target": "torch.nn.Identity"}, seeded=False, **changes).train()
    model.model.diffusion_model = Gain()
    sampler, data = steps_of("ddim", model, 3), batch()
    with FAKE:
        FAKE.move(model)
        data = FAKE.moved(data)
        require_cuda(model.shared_step(data))
        z, cond, raw = model.get_input(data, "image", force_c_encode=True, return_original_cond=True)
        uncond = model.unconditional_like(cond, raw, 2)
        require_cuda([cond, uncond])
        guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uncond}
        samples, _ = sampler.sample(3, 2, z.shape[1:], cond, verbose=False, **guidance)
        require_cuda(model.decode_first_stage(samples))


@pytest.mark.parametrize("kind", ["control", "x4"])
def test_a_network_under_guidance_neither_waits_nor_uploads(kind):
    *_, model = model_of(kind)
    with FAKE:
        shape = (2, 4, 8, 8)
        cond = {"c_crossattn": [torch.zeros(2, 12, 16, device=CUDA)]}
        if kind == "control":
            cond["c_concat"] = [torch.zeros(2, 3, 32, 32, device=CUDA)]
        if kind == "x4":
            cond |= {"c_concat": [torch.zeros(2, 3, 8, 8, device=CUDA)], "c_adm": torch.zeros(2, device=CUDA).long()}
        with no_transfers(), torch.no_grad():
            network = GuidedNetwork(model.apply_model, cond, cond, 5.0)
            require_cuda(network(torch.zeros(shape, device=CUDA), torch.zeros(2, device=CUDA).long()))


def test_a_training_step_and_its_averages_stay_on_the_device():
    averages = [{"decay": 0.999}, {"decay": 0.9, "warm_up": False}, {"sigma_rel": 0.1}]
    model = built(text_model_config(ema_config={"averages": averages})["model"]).train()
    with FAKE:
        FAKE.move(model)
        data = FAKE.moved({"image": torch.zeros(2, 32, 32, 3), "caption": ["a", "b"]})
        require_cuda(model.training_step(data, 0))
        with no_transfers():
            model.update_ema()
            with model.ema_scope(), torch.no_grad():
                pass
        require_cuda(list(model.model_ema.buffers()))


WEIGHTINGS = [
    weightings.SimpleLossWeighting(1.0, 0.1, learn_logvar=True),
    weightings.SimpleLossWeighting(),
    weightings.LearnedLogVariance(),
    *(cls() for cls in weightings.SNRWeighting.__subclasses__() if cls.__module__ == weightings.__name__),
]
NOISES = [
    TrainingNoise(),
    TrainingNoise(offset_strength=0.1, multires_iterations=4, input_perturbation=0.1),
]
TIMES = [UniformTimesteps(), UniformTimesteps(low_discrepancy=True), LogitNormalTimesteps()]
SAMPLES = [None, BatchSamples(seed=1, epoch=0, indices=[3, 4], total=2)]


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_every_loss_stays_on_the_device(parameterization):
    config = {"image_size": 8, "channels": 4, "timesteps": 20, "unet_config": {"target": "torch.nn.Identity"}}
    config |= {"parameterization": parameterization, "loss_mask_key": "mask", "zero_terminal_snr": False}
    model = built({"target": "ldm.models.diffusion.ddpm.DDPM", "params": config}).train()
    model.model.diffusion_model = Gain()
    losses = deepcopy(WEIGHTINGS)
    images = {"image": torch.zeros(2, 8, 8, 4), "mask": torch.ones(2, 8, 8), "loss_weight": torch.ones(2)}
    with FAKE:
        FAKE.move(model)
        data = FAKE.moved(images)
        for weighting in losses:
            model.loss_weighting = FAKE.move(weighting)
            require_cuda(model.shared_step(data))
        for model.loss_type in LOSSES:
            require_cuda(model.shared_step(data))
        for (model.training_noise, samples), model.timestep_sampler in itertools.product(zip(NOISES, SAMPLES), TIMES):
            with rng.samples_set(samples):
                require_cuda(model.shared_step(data))
        model.eval()
        require_cuda(model.shared_step(data))


@pytest.mark.parametrize("disc_loss", ["hinge", "vanilla"])
@pytest.mark.parametrize("make", [make_autoencoder, make_vq])
def test_the_losses_of_first_stages_stay_on_the_device(make, disc_loss, monkeypatch):
    # Autograd opens a CUDA context even for fake tensors, so the adaptive weight gets gradients of the right shape.
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, x, **_: (torch.zeros_like(x) + loss,))
    loss = {"perceptual_weight": 1.0, "perceptual_init": "random", "disc_loss": disc_loss, "use_actnorm": False}
    with weights_on_meta():
        model = make(loss=loss).train()
    with FAKE:
        FAKE.move(model)
        x = model.get_input(FAKE.moved(batches(1)[0]), "image")
        reconstructions, latent = model.reconstruct(x)
        for turn in (0, 1):
            require_cuda(model.loss_of(x, reconstructions, latent, turn, "train")[0])


# --------------------------------------------------------------------------------------------------------------- tasks


class Decoded(Exception):
    """Images are decoded; the rest of a task reads them on the host."""


SMALL = {"prompt": "a cat", "height": 16, "width": 24, "steps": 2, "n_samples": 2}
IMAGE, HOLE, DEPTH = make_image(), hole(), np.ones((16, 24), dtype=np.float32)
TASKS = {
    "text to image": ("text", lambda p: text_to_image(p, TextToImageRequest(**SMALL))),
    "text to image, fixed start": (
        "text",
        lambda p: text_to_image(p, TextToImageRequest(**SMALL, fixed_code=True, scale=1.0)),
    ),
    "text to image, noise of each image": (
        "text",
        lambda p: text_to_image(p, TextToImageRequest(**SMALL, seed_mode="image")),
    ),
    "image to image": ("text", lambda p: image_to_image(p, IMAGE, ImageToImageRequest(**SMALL, strength=0.6))),
    "depth to image": ("depth", lambda p: image_to_image(p, IMAGE, ImageToImageRequest(**SMALL, depth=True), DEPTH)),
    "inpainting": ("inpaint", lambda p: [inpaint(p, IMAGE, HOLE, InpaintRequest(steps=2))]),
    "inpainting by text": ("sd-inpaint", lambda p: [inpaint(p, IMAGE, HOLE, InpaintRequest(prompt="a", steps=2))]),
    "blended inpainting": ("text", lambda p: [inpaint(p, IMAGE, HOLE, InpaintRequest(prompt="a", steps=2))]),
    "upscaling": ("upscale", lambda p: [upscale(p, IMAGE, UpscaleRequest(steps=2))]),
    "upscaling by text": ("x4", lambda p: [upscale(p, IMAGE, UpscaleRequest(prompt="a", steps=2))]),
    "edit": ("edit", lambda p: edit(p, IMAGE, EditRequest(**SMALL))),
    "control in guess mode": ("control", lambda p: control_to_image(p, [IMAGE], ControlRequest(**SMALL, guess=True))),
    "classes": (
        "class",
        lambda p: generate_samples(p, ClassConditionalRequest(n_samples=2, steps=2, classes=(1,), scale=3.0)),
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_neither_waits_nor_uploads_while_it_samples(task, monkeypatch):
    kind, generate = TASKS[task]
    config, tables, model = model_of(kind)

    def decode(pipeline, z):
        require_cuda(pipeline.model.decode_first_stage(z))
        raise Decoded

    loop = Sampler.loop

    def guarded(*args, **kwargs):
        with no_transfers() if "each image" not in task else nullcontext():  # that noise is generated on the host
            return loop(*args, **kwargs)

    # The networks have tests of their own.
    monkeypatch.setattr(model.model.diffusion_model, "forward", lambda x, *_, **__: x[:, : model.channels])
    monkeypatch.setattr(Pipeline, "decode", decode)
    monkeypatch.setattr(Sampler, "loop", guarded)
    monkeypatch.setattr(Randomness, "__call__", nullcontext)  # a fake device has no generator whose state could be set
    monkeypatch.setattr(ddim, "model_alphas_cumprod", lambda model: tables)
    with FAKE:
        pipeline = Pipeline(model, model_info(config), CUDA, None, {})
        with pytest.raises(Decoded):
            next(iter(generate(pipeline)))
