"""Names and call forms that published configs, ControlNet, textual inversion, DreamBooth and k-diffusion rely on."""

import importlib
import inspect

import pytest
import torch
from torch import nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from tests.models.diffusion.samplers.toy import ToyModel
from tests.models.diffusion.tiny import ATTEND, CAPTIONS, latent_diffusion

FUNCTIONS = """
    ldm.util: instantiate_from_config get_obj_from_str exists default ismap isimage mean_flat count_params
        log_txt_as_img
    ldm.modules.diffusionmodules.util: make_beta_schedule make_ddim_timesteps make_ddim_sampling_parameters
        extract_into_tensor noise_like timestep_embedding conv_nd linear avg_pool_nd zero_module normalization
        checkpoint
"""
CLASSES = """
    main: DataModuleFromConfig ImageLogger SetupCallback CUDACallback
    ldm.modules.attention: CrossAttention BasicTransformerBlock SpatialTransformer
    ldm.modules.diffusionmodules.openaimodel: UNetModel EncoderUNetModel TimestepEmbedSequential TimestepBlock
        ResBlock Downsample Upsample AttentionBlock
    ldm.modules.ema: LitEma
    ldm.modules.distributions.distributions: DiagonalGaussianDistribution
    ldm.modules.losses.contperceptual: DummyLoss LPIPSWithDiscriminator
    ldm.data.base: Txt2ImgIterableBaseDataset
    ldm.data.previews.pytorch_dataset: PreviewsTrain PreviewsValidation
    ldm.models.autoencoder: AutoencoderKL VQModel VQModelInterface IdentityFirstStage
    ldm.models.diffusion.ddpm: DDPM LatentDiffusion LatentFinetuneDiffusion LatentInpaintDiffusion
        LatentDepth2ImageDiffusion LatentUpscaleDiffusion
    ldm.models.diffusion.ddim: DDIMSampler
    ldm.models.diffusion.plms: PLMSSampler
    ldm.models.diffusion.dpm_solver: DPMSolverSampler
"""
# function(number of positional arguments) names of keyword arguments: calls as published code writes them.
CALLS = """
    ldm.util.instantiate_from_config(1)
    ldm.util.get_obj_from_str(1) reload
    ldm.util.count_params(1) verbose
    ldm.util.log_txt_as_img(2) size
    ldm.modules.diffusionmodules.util.make_beta_schedule(2) linear_start linear_end cosine_s
    ldm.modules.diffusionmodules.util.make_ddim_timesteps(0) ddim_discr_method num_ddim_timesteps num_ddpm_timesteps
        verbose
    ldm.modules.diffusionmodules.util.make_ddim_sampling_parameters(0) alphacums ddim_timesteps eta verbose
    ldm.modules.diffusionmodules.util.extract_into_tensor(3)
    ldm.modules.diffusionmodules.util.noise_like(3)
    ldm.modules.diffusionmodules.util.timestep_embedding(2) repeat_only
    ldm.modules.diffusionmodules.util.conv_nd(4) padding
    ldm.modules.diffusionmodules.util.checkpoint(4)
    ldm.modules.attention.CrossAttention(0) query_dim context_dim heads dim_head dropout
    ldm.modules.attention.CrossAttention.forward(2) context mask
    ldm.modules.attention.BasicTransformerBlock(3) dropout context_dim
    ldm.modules.attention.SpatialTransformer(3) depth context_dim
    ldm.modules.attention.SpatialTransformer.forward(3)
    ldm.modules.diffusionmodules.openaimodel.UNetModel.forward(2) timesteps context y
    ldm.modules.diffusionmodules.openaimodel.ResBlock(3) out_channels dims use_checkpoint use_scale_shift_norm
    ldm.modules.diffusionmodules.openaimodel.Downsample(2) dims out_channels
    ldm.modules.diffusionmodules.openaimodel.AttentionBlock(1) use_checkpoint num_heads num_head_channels
        use_new_attention_order
    ldm.modules.ema.LitEma(1) decay
    ldm.modules.distributions.distributions.DiagonalGaussianDistribution(1) deterministic
    ldm.models.diffusion.ddpm.LatentDiffusion.apply_model(4)
    ldm.models.diffusion.ddpm.LatentDiffusion.get_learned_conditioning(2)
    ldm.models.diffusion.ddpm.LatentDiffusion.get_unconditional_conditioning(2) null_label
    ldm.models.diffusion.ddpm.LatentDiffusion.encode_first_stage(2)
    ldm.models.diffusion.ddpm.LatentDiffusion.get_first_stage_encoding(2)
    ldm.models.diffusion.ddpm.LatentDiffusion.decode_first_stage(2)
    ldm.models.diffusion.ddpm.LatentDiffusion.q_sample(1) x_start t noise
    ldm.models.diffusion.ddpm.LatentDiffusion.p_losses(4) noise
    ldm.models.diffusion.ddpm.LatentDiffusion.shared_step(2)
    ldm.models.diffusion.ddpm.LatentDiffusion.get_input(3) bs
    ldm.models.diffusion.ddpm.LatentDiffusion.log_images(2) N n_row split
    ldm.models.diffusion.ddpm.LatentDiffusion.ema_scope(2)
    ldm.models.diffusion.ddim.DDIMSampler.sample(1) S batch_size shape conditioning callback img_callback eta mask
        x0 verbose x_T log_every_t unconditional_guidance_scale unconditional_conditioning
    ldm.models.diffusion.ddim.DDIMSampler.sample(5) verbose eta
    ldm.models.diffusion.ddim.DDIMSampler.make_schedule(1) ddim_num_steps ddim_discretize ddim_eta verbose
    ldm.models.diffusion.ddim.DDIMSampler.stochastic_encode(3) use_original_steps noise
    ldm.models.diffusion.ddim.DDIMSampler.decode(1) x_latent cond t_start unconditional_guidance_scale
        unconditional_conditioning
    ldm.models.diffusion.ddim.DDIMSampler.p_sample_ddim(4) index use_original_steps unconditional_guidance_scale
    ldm.models.diffusion.plms.PLMSSampler.sample(1) S batch_size shape conditioning callback img_callback eta mask
        x0 verbose x_T log_every_t unconditional_guidance_scale unconditional_conditioning
    ldm.models.diffusion.dpm_solver.DPMSolverSampler.sample(1) S batch_size shape conditioning callback img_callback
        eta mask x0 verbose x_T log_every_t unconditional_guidance_scale unconditional_conditioning
"""
MODEL_ATTRIBUTES = {
    int: "num_timesteps channels",
    str: "parameterization first_stage_key cond_stage_key model.conditioning_key",
    torch.Tensor: "betas alphas_cumprod alphas_cumprod_prev",
    (int, tuple): "image_size",
    (float, torch.Tensor): "scale_factor",
    nn.ModuleList: "model.diffusion_model.input_blocks model.diffusion_model.output_blocks",
    nn.Module: "first_stage_model cond_stage_model model.diffusion_model model.diffusion_model.middle_block "
    "model.diffusion_model.time_embed model.diffusion_model.out",
}


def entries(text):
    """Return the entries of an indented list, each on a line with its continuation lines."""
    return " ".join(
        line.strip() if line.startswith("     ") else "\n" + line.strip() for line in text.splitlines()
    ).split("\n")


def names(text):
    """Return "module.name" of each name in "module: name name ..."."""
    pairs = (entry.partition(": ") for entry in entries(text) if entry.strip())
    return [f"{module}.{name}" for module, _, listed in pairs for name in listed.split()]


def find(path):
    """Return the object at a dotted path that begins with a module."""
    module, *attributes = path.split(".")
    found = importlib.import_module(module)
    for name in attributes:
        module = f"{module}.{name}"
        try:
            found = getattr(found, name)
        except AttributeError:
            found = importlib.import_module(module)
    return found


def test_published_functions_and_classes_exist():
    functions, classes = names(FUNCTIONS), names(CLASSES)
    assert len(functions) == 21 and len(classes) == 35
    assert [path for path in functions if not inspect.isfunction(find(path))] == []
    assert [path for path in classes if not inspect.isclass(find(path))] == []


def test_published_call_forms_are_accepted():
    calls = [entry for entry in entries(CALLS) if entry.strip()]
    assert len(calls) == 43
    for call in calls:
        path, _, arguments = call.partition("(")
        positional, _, named = arguments.partition(")")
        try:
            inspect.signature(find(path)).bind(*range(int(positional)), **dict.fromkeys(named.split()))
        except TypeError as error:
            raise AssertionError(call) from error


def test_a_model_has_the_published_attributes():
    model = latent_diffusion("crossattn", ATTEND, CAPTIONS, cond_stage_key="caption")
    for kind, paths in MODEL_ATTRIBUTES.items():
        for path in paths.split():
            value = model
            for name in path.split("."):
                value = getattr(value, name)
            assert isinstance(value, kind), path


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_a_sampler_returns_samples_and_intermediates(sampler):
    given = {"S": 2, "batch_size": 1, "shape": (4, 4, 4), "conditioning": torch.zeros(1, 4, 4, 4)}
    samples, intermediates = sampler(ToyModel()).sample(**given, verbose=False)
    assert samples.shape == (1, 4, 4, 4) and {"x_inter", "pred_x0"} <= set(intermediates)


def test_a_schedule_has_the_published_tables():
    sampler = DDIMSampler(ToyModel())
    sampler.make_schedule(ddim_num_steps=5, ddim_eta=0.5, verbose=False)
    for name in ("ddim_timesteps", "ddim_alphas", "ddim_alphas_prev", "ddim_sigmas"):
        assert len(getattr(sampler, name)) == 5
    assert all(sampler.ddim_sigmas > 0)


def test_positional_arguments_of_sampling_stand_in_their_published_order():
    sample = list(inspect.signature(DDIMSampler.sample).parameters)
    assert sample[1:20] == [
        *("S", "batch_size", "shape", "conditioning", "callback", "normals_sequence", "img_callback", "quantize_x0"),
        *("eta", "mask", "x0", "temperature", "noise_dropout", "score_corrector", "corrector_kwargs", "verbose", "x_T"),
        *("log_every_t", "unconditional_guidance_scale"),
    ]
    step = list(inspect.signature(DDIMSampler.p_sample_ddim).parameters)
    assert step[1:14] == [
        *("x", "c", "t", "index", "repeat_noise", "use_original_steps", "quantize_denoised", "temperature"),
        *("noise_dropout", "score_corrector", "corrector_kwargs", "unconditional_guidance_scale"),
        "unconditional_conditioning",
    ]
