"""DDPM and LatentDiffusion, each from top to bottom in the order of a training step.

batch -> get_input -> z, cond -> t -> q_sample -> apply_model -> loss weighting -> logs -> optimizer step -> EMA; the
last two are in ldm.models.training. The published variants are attributes of this module too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm import rng
from ldm.config.instantiate import (
    FIRST_STAGE_AS_CONDITION,
    UNCONDITIONAL,
    build_section,
    describe_section,
    instantiate_from_config,
)
from ldm.config.types import Dropout, NonNegativeFloat, PositiveFloat, PositiveInt, Probability
from ldm.models.cached import EMBEDDING, LATENT, MOMENTS
from ldm.models.diffusion.adapters import AdapterTraining
from ldm.models.diffusion.compile import compile_network
from ldm.models.diffusion.condition_stage import ConditionStage, drop_condition
from ldm.models.diffusion.conditioning import (
    Conditioning,
    DiffusionWrapper,
    compose_condition,
    normalize_condition,
)
from ldm.models.diffusion.image_log import log_latent_images, log_pixel_images
from ldm.models.diffusion.latent_scale import BATCHES, measure_latent_std
from ldm.models.diffusion.loss_weighting import SimpleLossWeighting, make_loss_weighting
from ldm.models.diffusion.published import PublishedDDPM, PublishedLatentDiffusion
from ldm.models.diffusion.samplers.ddim import DDIMSampler
from ldm.models.diffusion.timesteps import UniformTimesteps
from ldm.models.diffusion.training_noise import TrainingNoise
from ldm.models.frozen import hold_frozen_stages
from ldm.models.training import Losses, TrainedModule, fixed_noise, freeze
from ldm.models.training import disabled_train as disabled_train
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.parameterization import get_parameterization
from ldm.modules.diffusionmodules.util import is_own, is_unchanged
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import PUBLISHED_DECAY, checked_ema
from ldm.published import published_names
from ldm.rng import Purpose

LOSSES = ("l1", "l2", "pseudo_huber")
HUBER_C = 0.1  # default of huber_c


# The variants among these are built on this module and live in others, which therefore cannot be imported above.
__getattr__ = published_names(__name__)


class DDPM(TrainedModule, PublishedDDPM):
    """Diffusion in pixel space (arXiv 2006.11239), and everything that latent diffusion shares with it.

    Batches are dicts; `batch[first_stage_key]` holds images (B, H, W, C) in [-1, 1].
    original_elbo_weight, l_simple_weight, learn_logvar, logvar_init: the published loss, see SimpleLossWeighting;
    loss_weighting_config replaces it. load_only_unet: `ckpt_path` gives the network's weights alone.
    loss_type: l2, l1, or pseudo_huber, 2c (sqrt(d^2 + c^2) - c) for each difference d with c = huber_c, 0.1 by default
        (arXiv 2403.16728; that of arXiv 2310.14189 takes the norm of a sample's difference instead).
    noise_config, timestep_config: noise and timesteps of training, see training_noise.py and timesteps.py.
    loss_mask_key: masks of the batch, (B, H, W[, 1]): the error of a sample is the mean weighted by its mask, averaged
        down to the latent's size. Values below 0 count as 0; a mask without a positive value gives the error 0.
    optimizer_config: see OptimizerConfig. ema_config: see EMAConfig; it replaces ema_decay.
    """

    model: DiffusionWrapper

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: PositiveInt = 1000,
        beta_schedule: str = "linear",
        loss_type: Literal["l1", "l2", "pseudo_huber"] = "l2",
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 256,
        channels: PositiveInt = 3,
        log_every_t: PositiveInt = 100,
        clip_denoised: bool = True,
        linear_start: Annotated[float, "(0, 1)"] = 1e-4,
        linear_end: Annotated[float, "(0, 1)"] = 2e-2,
        cosine_s: NonNegativeFloat = 8e-3,
        given_betas: Sequence[Annotated[float, "(0, 1]"]] | None = None,
        original_elbo_weight: NonNegativeFloat = 0.0,
        v_posterior: Probability = 0.0,
        l_simple_weight: NonNegativeFloat = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        *,
        loss_weighting_config: Mapping[str, Any] | None = None,
        noise_config: Mapping[str, Any] | None = None,
        timestep_config: Mapping[str, Any] | None = None,
        loss_mask_key: str | None = None,
        huber_c: PositiveFloat | None = None,
        optimizer_config: Annotated[Mapping[str, Any], "ldm.models.optimizers.OptimizerConfig"] | None = None,
        ema_config: Annotated[Mapping[str, Any], "ldm.modules.ema.EMAConfig"] | None = None,
        ema_decay: Probability = PUBLISHED_DECAY,
        zero_terminal_snr: bool = False,
    ) -> None:
        super().__init__(ckpt_path, ignore_keys, optimizer_config)
        get_parameterization(parameterization)
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type {loss_type!r}: choose one of {', '.join(LOSSES)}")
        if huber_c is not None and loss_type != "pseudo_huber":
            raise ValueError(
                f"huber_c {huber_c}: loss_type {loss_type} does not use it; choose pseudo_huber or remove it"
            )
        if use_positional_encodings:
            raise ValueError("use_positional_encodings: not supported, no published model uses it; leave it false")
        self.parameterization, self.loss_type, self.v_posterior = parameterization, loss_type, v_posterior
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
        self.huber_c, self.loss_mask_key = HUBER_C if huber_c is None else huber_c, loss_mask_key
        self.training_noise = build_section("noise_config", noise_config, TrainingNoise)
        self.timestep_sampler = build_section("timestep_config", timestep_config, UniformTimesteps)
        self.log_every_t, self.clip_denoised, self.monitor = log_every_t, clip_denoised, monitor
        self.scheduler_config, self.load_only_unet = scheduler_config, load_only_unet
        self.use_scheduler = scheduler_config is not None
        self.cond_stage_model: Any = None
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        averages = checked_ema(ema_config, use_ema, ema_decay)
        if use_ema:
            self.add_ema(averages, decay=ema_decay)
        # Overrides in research code have the published arguments only.
        further = {"zero_terminal_snr": True} if zero_terminal_snr else {}
        self.register_schedule(
            given_betas=given_betas,
            beta_schedule=beta_schedule,
            timesteps=timesteps,
            linear_start=linear_start,
            linear_end=linear_end,
            cosine_s=cosine_s,
            **further,
        )
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.learn_logvar = learn_logvar
        self.loss_weighting = make_loss_weighting(
            loss_weighting_config,
            l_simple_weight=l_simple_weight,
            original_elbo_weight=original_elbo_weight,
            learn_logvar=learn_logvar,
        )
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
            self.register_load_state_dict_pre_hook(_take_logvar)

    def describe_objective(self) -> str:
        """Return a line about the objective: target, loss, and the sections that differ from the published ones."""
        huber = f" (c {self.huber_c:g})" if self.loss_type == "pseudo_huber" else ""
        sections = (
            describe_section(self.loss_weighting, SimpleLossWeighting),
            describe_section(self.training_noise, TrainingNoise),
            describe_section(self.timestep_sampler, UniformTimesteps),
        )
        mask = f"masked by {self.loss_mask_key}" if self.loss_mask_key else ""
        return ", ".join(filter(None, (self.parameterization, f"{self.loss_type}{huber}", *sections, mask)))

    def compile_network(self, backend: str) -> None:
        compile_network(self.model.diffusion_model, backend)

    # ------------------------------------------------------------------------------------------------- training step

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, logs = self.shared_step(batch)
        self.log_training(loss, logs, self.batch_size_of(batch))
        return loss

    def batch_size_of(self, batch: Mapping[str, Any]) -> int:
        key = next((key for key in (MOMENTS, LATENT) if key in batch), self.first_stage_key)
        return len(self.batch_value(batch, key))

    def shared_step(self, batch: Mapping[str, Any]) -> Losses:
        """Return the loss of a batch and its named logs."""
        return self(self.get_input(batch, self.first_stage_key), **self.loss_options(batch))

    def loss_options(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the arguments of `denoising_loss` in a batch: `loss_weight` (B,), if it has any, and the masks."""
        options = {}
        if "loss_weight" in batch:
            options["sample_weight"] = batch["loss_weight"].to(self.device)
        if self.loss_mask_key is not None:
            self.batch_value(batch, self.loss_mask_key, "loss_mask_key")
            options["mask"] = self.get_images(batch, self.loss_mask_key)
        return options

    def get_input(self, batch: Mapping[str, Any], k: str, *, bs: int | None = None) -> Any:
        """Return the inputs of `forward` from a batch: images (B, C, H, W)."""
        return self.get_images(batch, k, bs)

    def clean_inputs(self, batch: Mapping[str, Any], bs: int | None = None) -> tuple[Tensor, Conditioning]:
        """Return (x_start, encoded condition) of the first `bs` samples, for `denoising_errors`."""
        return self.get_input(batch, self.first_stage_key, bs=bs), None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Losses:
        """Return the loss at random timesteps."""
        return self.p_losses(x, self.random_timesteps(x.shape[0]), *args, **kwargs)

    def random_timesteps(self, batch_size: int) -> Tensor:
        """Sample timesteps (B,) int64, uniform in [0, T); in training as `timestep_config` says."""
        if self.training:
            return self.timestep_sampler(batch_size, self.num_timesteps, self.device)
        return rng.integers(self.num_timesteps, batch_size, Purpose.TIMESTEP, self.device)

    def p_losses(self, x_start: Tensor, *args: Any, **kwargs: Any) -> Losses:
        """p_losses(x_start, t, noise=None): loss without a condition, see `denoising_loss`."""
        return self.denoising_loss(x_start, None, *args, **kwargs)

    def denoising_loss(
        self,
        x_start: Tensor,
        cond: Conditioning,
        t: Tensor,
        noise: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Losses:
        """Return the loss of x_start (B, C, H, W) at t (B,) and its logs (DDPM eq. 12 and 14, LDM eq. 2 and 3).

        sample_weight: factors (B,) of the samples' errors. mask: weights of positions, see `denoising_errors`.
        """
        errors = self.denoising_errors(x_start, cond, t, noise, mask)
        errors = errors if sample_weight is None else errors * sample_weight
        loss, logs = self.loss_weighting(errors, t, self)
        prefix = "train" if self.training else "val"
        logs = {f"{prefix}/{name}": value.detach() for name, value in {**logs, "loss": loss}.items()}
        if self.learn_logvar:
            logs["logvar"] = self.logvar.detach().mean()
        return loss, logs

    def denoising_errors(
        self,
        x_start: Tensor,
        cond: Conditioning,
        t: Tensor,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the mean errors (B,) of the network's output for x_start (B, C, H, W) at t (B,).

        mask: (B, 1, H', W'), weights of the mean, see `loss_mask_key`.
        """
        seen = noise
        if noise is None and self.training:
            noise, seen = self.training_noise(x_start)
        elif noise is None:
            noise = seen = rng.normal_like(x_start, Purpose.NOISE)
        x_noisy = self.q_sample(x_start, t, seen)  # (B, C, H, W)
        out = self.apply_model(x_noisy, t, cond)  # (B, C, H, W)
        errors = self.get_loss(out, self.training_target(x_start, noise, t), mean=False)  # (B, C, H, W)
        return errors.mean(dim=(1, 2, 3)) if mask is None else masked_mean(errors, mask)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """Return the network output at x_noisy (B, C, H, W) and t (B,), under a condition in any published form."""
        return self.model(x_noisy, t, **normalize_condition(cond, self.model.conditioning_key))

    @property
    def repeats_inputs(self) -> bool:
        """True if `apply_model` takes a condition of a multiple of the batch, see `UNetModel.forward`."""
        wrapper = self.model
        own = type(self).apply_model is DDPM.apply_model and is_own(self, "apply_model") and is_own(wrapper, "call")
        network = isinstance(wrapper.diffusion_model, UNetModel) and wrapper.diffusion_model.repeats_inputs
        return own and wrapper.conditioning_key == "crossattn" and network and is_unchanged(wrapper)

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Return the loss of `loss_type`, averaged or (B, C, H, W)."""
        if self.loss_type == "pseudo_huber":
            square, c = (pred - target).square(), self.huber_c
            losses = 2.0 * c * square / ((square + c**2).sqrt() + c)  # 2c (sqrt(d^2 + c^2) - c) without cancellation
            return losses.mean() if mean else losses
        loss = nn.functional.l1_loss if self.loss_type == "l1" else nn.functional.mse_loss
        return loss(pred, target, reduction="mean" if mean else "none")

    # ---------------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the losses of the trained and the averaged weights, with the same noise so that they compare."""
        with fixed_noise(batch_idx, self.device):
            _, logs = self.shared_step(batch)
        logs_ema = dict(logs)
        if self.use_ema:
            with self.ema_scope(), fixed_noise(batch_idx, self.device):
                _, logs_ema = self.shared_step(batch)
        logs |= {f"{name}_ema": value for name, value in logs_ema.items()}
        self.log_validation(logs, self.batch_size_of(batch))

    # ------------------------------------------------------------------------------------------------------ sampling

    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a sample."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return self.channels, height, width

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, n_row: int = 2, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return images of the training, each (B, C, H, W) in about [-1, 1]; see ldm.models.diffusion.image_log."""
        return log_pixel_images(self, batch, N, n_row, *args, **kwargs)


class LatentDiffusion(AdapterTraining, ConditionStage, PublishedLatentDiffusion, DDPM):
    """Diffusion in the latent space of a frozen first stage, under a condition (arXiv 2112.10752, section 3).

    Further positional arguments are those of DDPM, as published.
    concat_keys, masked_image_key, adm_key: parts that join the condition of `cond_stage_key`, see ConditionStage.
    cond_dropout: fraction of training samples that get the encoder's unconditional condition, which classifier-free
        guidance needs (Ho & Salimans 2022, algorithm 1); it is saved in the checkpoint.
    untrained_first_stage: allow training in the latent space of a first stage without loaded weights.
    frozen_precision: in training, hold and run the frozen first stage and the frozen encoder of conditions in 16 bits;
        checkpoints keep their float32 weights. A stage that is trained, wholly or in part, stays as it is.
    adapters: LoRA layers on a frozen base, see LoRASpec; only they are trained, see AdapterTraining.
    token_embeddings: new tokens of the text encoder; only their vectors are trained, see AdapterTraining.
    """

    quick_images: ClassVar[Mapping[str, int]] = {"N": 4, "ddim_steps": 20}  # of image logs on the CPU

    cond_ids: Tensor

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: PositiveInt | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: PositiveFloat = 1.0,
        scale_by_std: bool = False,
        *args: Any,
        cond_dropout: Dropout = 0.0,
        concat_keys: Sequence[str] = (),
        masked_image_key: str | None = "masked_image",
        adm_key: str | None = None,
        untrained_first_stage: bool = False,
        frozen_precision: Literal["bf16", "fp16"] | None = None,
        adapters: Annotated[Mapping[str, Any], "ldm.modules.adapters.lora.LoRASpec"] | None = None,
        token_embeddings: Annotated[Mapping[str, Any], "ldm.modules.adapters.token_embeddings.NewToken"]
        | Sequence[Mapping[str, Any]]
        | None = None,
        **kwargs: Any,
    ) -> None:
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == UNCONDITIONAL:
            conditioning_key = None
        if scale_by_std and scale_factor != 1.0:
            raise ValueError(f"scale_factor {scale_factor}: remove it, scale_by_std measures it")
        kwargs["conditioning_key"] = conditioning_key
        super().__init__(*args, **kwargs)
        self.set_further_parts(concat_keys, masked_image_key, adm_key)
        self.num_timesteps_cond = 1 if num_timesteps_cond is None else num_timesteps_cond
        self.shorten_cond_schedule, self.untrained_first_stage = self.num_timesteps_cond > 1, untrained_first_stage
        self.frozen_precision = frozen_precision
        if not 1 <= self.num_timesteps_cond <= self.num_timesteps:
            raise ValueError(f"num_timesteps_cond {num_timesteps_cond}: choose 1 to {self.num_timesteps}")
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        self.cond_stage_forward, self.concat_mode, self.cond_dropout = cond_stage_forward, concat_mode, cond_dropout
        self.clip_denoised = False
        self.scale_by_std, self._scale_factor_loaded = scale_by_std, False
        self.scale_factor: float | Tensor
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor), device="cpu"))
        else:
            self.scale_factor = scale_factor
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        if self.shorten_cond_schedule:
            self.make_cond_schedule()
        if adapters is not None or token_embeddings is not None:
            if any(True for _ in self.loss_weighting.parameters()):
                name = type(self.loss_weighting).__name__
                raise ValueError(
                    f"loss_weighting_config: {name} has parameters of its own, and adapters train on a frozen base; "
                    "choose a weighting without"
                )
            self.freeze_base()
        if token_embeddings is not None:
            self.add_tokens(token_embeddings)
        self.adapters = None
        if adapters is not None:
            unet_config = kwargs["unet_config"] if "unet_config" in kwargs else args[0]
            params = {"unet_config": unet_config, "cond_stage_config": cond_stage_config}
            self.adapters = self.new_lora(adapters, {"model": {"params": params}})
        if self.trains_adapters and self.use_ema:  # of the adapters alone
            self.restart_ema()

    def instantiate_first_stage(self, config: Mapping[str, Any]) -> None:
        """Build `first_stage_model`, frozen."""
        self.first_stage_model: Any = freeze(instantiate_from_config(config))

    def instantiate_cond_stage(self, config: Mapping[str, Any] | str) -> None:
        """Build `cond_stage_model`, frozen unless `cond_stage_trainable`; None for an unconditional model."""
        if config == FIRST_STAGE_AS_CONDITION:
            if self.cond_stage_trainable:
                raise ValueError(
                    f"cond_stage_config {config}: the first stage is frozen; set cond_stage_trainable false"
                )
            self.cond_stage_model = self.first_stage_model
        else:
            stage = instantiate_from_config(config)
            self.cond_stage_model = stage if stage is None or self.cond_stage_trainable else freeze(stage)

    def make_cond_schedule(self) -> None:
        """Register `cond_ids`, the timestep of the condition's noise for each t."""
        ids = _cond_timesteps(self.num_timesteps, self.num_timesteps_cond)
        self.register_buffer("cond_ids", ids, persistent=False)

    # ------------------------------------------------------------------------------------------------- training step

    def shared_step(self, batch: Mapping[str, Any], **kwargs: Any) -> Losses:
        z, c = self.get_input(batch, self.first_stage_key)
        return self(z, c, **{**kwargs, **self.loss_options(batch)})

    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
        return_x: bool = False,
    ) -> list[Any]:
        """Return [latents z, condition] of a batch or its first `bs` samples, then what the flags ask for.

        These are images and reconstructions, images, and the raw condition, None without an encoder. In training mode a
        fraction `cond_dropout` of the conditions is dropped here. The condition of a trained encoder stays raw, so that
        `forward` encodes it with gradients, unless `force_c_encode`.
        """
        z = self.latents_of_batch(batch, k, bs)  # (B, c, h, w)
        c = raw = None
        if self.model.conditioning_key is not None and self.cond_stage_model is not None:
            raw = main = self.raw_condition(batch, cond_key or self.cond_stage_key, bs)
            cached, chance = EMBEDDING in batch, None
            if cached:
                main = batch[EMBEDDING][:bs].to(self.device).float()  # (B, L, D)
            if self.training and self.cond_dropout > 0:
                device = rng.CPU if isinstance(raw, list | tuple) else self.device  # lists of texts wait for no GPU
                chance = rng.uniform(len(z), Purpose.CONDITION_DROPOUT, device)
                null = self.unconditional_input_like(raw, len(z))
                null = self.get_learned_conditioning(null) if cached else null
                main = drop_condition(main, null, self.drops_main(chance))
            if not cached and not self.cond_stage_trainable:
                main = self.encode_distinct(main)
            elif not cached and force_c_encode:
                main = self.get_learned_conditioning(main)
            further = self.further_parts(batch, z.shape[2:], bs)
            further = further if chance is None else self.drop_further(further, chance)
            c = compose_condition(main, self.model.conditioning_key, further)
        out = [z, c]
        if return_first_stage_outputs or return_x:
            x = self.get_images(batch, k, bs) if k in batch else self.decode_first_stage(z)  # a cache has no images
            out += [x, self.decode_first_stage(z)] if return_first_stage_outputs else []
            out += [x] if return_x else []
        return [*out, raw] if return_original_cond else out

    def clean_inputs(self, batch: Mapping[str, Any], bs: int | None = None) -> tuple[Tensor, Conditioning]:
        z, c, *_ = self.get_input(batch, self.first_stage_key, force_c_encode=True, bs=bs)
        return z, c

    def latents_of_batch(self, batch: Mapping[str, Any], k: str, bs: int | None = None) -> Tensor:
        """Return the scaled latents (B, c, h, w) of the images `batch[k]`, or those that a cache provides."""
        if MOMENTS in batch:
            posterior = DiagonalGaussianDistribution(batch[MOMENTS][:bs].to(self.device).float())
            return self.get_first_stage_encoding(posterior)
        if LATENT in batch:
            return self.get_first_stage_encoding(batch[LATENT][:bs].to(self.device).float())
        return self.latents_of(self.get_images(batch, k, bs))

    def latents_of(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] to scaled latents (B, c, h, w)."""
        return self.get_first_stage_encoding(self.encode_first_stage(x)).detach()

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Encode images (B, C, H, W) in [-1, 1] with the first stage, to a posterior or to unscaled latents."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: Any) -> Tensor:
        """Return a scaled latent (B, c, h, w) of a posterior (a sample) or of an unscaled latent."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample()
        elif not torch.is_tensor(encoder_posterior):
            raise TypeError(
                f"the first stage must return a posterior or a tensor, got {type(encoder_posterior).__name__}"
            )
        return self.scale_factor * encoder_posterior

    def forward(self, x: Tensor, c: Any = None, *args: Any, **kwargs: Any) -> Losses:
        """Return the loss of latents x (B, c, h, w) at random timesteps; `c` is raw if its encoder is trained."""
        t = self.random_timesteps(x.shape[0])
        if self.model.conditioning_key is not None and self.cond_stage_trainable:
            c = self.map_main_condition(self.get_learned_conditioning, c)
        if self.shorten_cond_schedule and torch.is_tensor(c):
            noise = rng.normal_like(c, Purpose.CONDITION_NOISE)
            c = self.q_sample(c, self.cond_ids[t], noise)  # the condition has its own noise schedule
        return self.p_losses(x, c, t, *args, **kwargs)

    def p_losses(
        self,
        x_start: Tensor,
        cond: Conditioning,
        t: Tensor,
        noise: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Losses:
        """Return the loss of latents x_start (B, c, h, w) at t (B,), see `denoising_loss`."""
        return self.denoising_loss(x_start, cond, t, noise, sample_weight, mask)

    # ------------------------------------------------------------------------------------------- weights, first stage

    def load_tensors(
        self, path: str, tensors: Mapping[str, Tensor], ignore_keys: Sequence[str], only_model: bool
    ) -> None:
        """Raise ValueError too if the file was trained with another scale factor than the config's."""
        super().load_tensors(path, tensors, ignore_keys, only_model)
        given = None if only_model or "scale_factor" in ignore_keys else tensors.get("scale_factor")
        self._scale_factor_loaded = given is not None
        if given is not None and not self.scale_by_std and abs(float(given) / float(self.scale_factor) - 1) > 1e-3:
            raise ValueError(
                f"{path}: trained with scale_factor {float(given):.6g}, the config has {float(self.scale_factor):.6g}: "
                f"set model.params.scale_factor={float(given):.6g}, or add scale_factor to ignore_keys"
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.untrained_first_stage:  # a resumed run's checkpoint is loaded by now
            require_weights(
                self.first_stage_model,
                "the first stage",
                "set model.params.first_stage_config.params.ckpt_path to its checkpoint, or "
                "model.params.untrained_first_stage=true to train on it as it is",
            )
        self._release_stages()  # of a fit that failed
        if self.frozen_precision is not None:
            stages = {"first stage": self.first_stage_model, "condition stage": self.cond_stage_model}
            self.stages_in_16_bits = hold_frozen_stages(stages, self.frozen_precision)

    def on_fit_end(self) -> None:
        super().on_fit_end()
        self._release_stages()

    def _release_stages(self) -> None:
        for stage in self.stages_in_16_bits:
            stage.release()
        self.stages_in_16_bits = ()

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Measure the scale factor of a new run, 1 / std of the latents, over several batches and all ranks."""
        key, resumed = self.first_stage_key, self.global_step > 0 or self.trainer.ckpt_path is not None
        if isinstance(self.scale_factor, Tensor) and not resumed and not self._scale_factor_loaded:
            self.scale_factor.fill_(1.0)
            batches: Any = self.trainer.train_dataloader

            def encode(batch: Mapping[str, Any]) -> Tensor:
                return self.latents_of_batch(batch, key)

            samples_of = getattr(getattr(self.trainer, "datamodule", None), "training_samples", lambda number: None)
            number = BATCHES * self.trainer.accumulate_grad_batches
            std = measure_latent_std(encode, batches, self.device, samples_of, number)
            self.scale_factor.copy_(1.0 / std)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["latent_diffusion"] = {
            "cond_dropout": float(self.cond_dropout),
            "parameterization": self.parameterization,
            "conditioning_key": self.model.conditioning_key,
            "scale_factor": float(self.scale_factor),
        }

    def differentiable_decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Decode scaled latents (B, c, h, w) to images (B, C, H, W) in about [-1, 1], with gradients."""
        options = {"force_not_quantize": True} if force_not_quantize else {}
        return self.first_stage_model.decode(z / self.scale_factor, **options)

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Decode scaled latents (B, c, h, w) to images (B, C, H, W) in about [-1, 1]."""
        return self.differentiable_decode_first_stage(z, force_not_quantize)

    # ----------------------------------------------------------------------------------------------------- image logs

    @torch.no_grad()
    def sample_log(
        self, cond: Conditioning, batch_size: int, ddim: bool, ddim_steps: int, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Return (samples, intermediates) of DDIM or of the ancestral sampler: the published hook of image logs."""
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, **kwargs)
        return DDIMSampler(self).sample(ddim_steps, batch_size, self.latent_shape(), cond, verbose=False, **kwargs)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        return log_latent_images(self, batch, N, n_row, *args, **kwargs)

    def further_images(self, batch: Mapping[str, Any], inputs: Tensor, cond: Any) -> dict[str, Tensor]:
        """Return what a subclass adds to the image log of `inputs` (B, C, H, W) under their encoded condition."""
        return {}


def masked_mean(errors: Tensor, mask: Tensor) -> Tensor:
    """Return the means (B,) of errors (B, C, h, w) weighted by a mask (B, 1, H, W), averaged down to h x w.

    Mask values below 0 count as 0. The mean of a sample without a positive value is 0, without a gradient.
    """
    if mask.shape[1] != 1:
        raise ValueError(f"loss_mask_key: expected masks of one channel, got {mask.shape[1]}")
    weights = nn.functional.adaptive_avg_pool2d(mask.clamp(min=0.0), (errors.shape[2], errors.shape[3]))  # (B, 1, h, w)
    total = errors.shape[1] * weights.sum(dim=(1, 2, 3))
    return (errors * weights).sum(dim=(1, 2, 3)) / total.clamp(min=torch.finfo(total.dtype).tiny)


def require_weights(module: Any, name: str, advice: str) -> None:
    """Raise ValueError if a module of this package still has weights with their random initial values."""
    random = module.untrained_weights() if isinstance(module, TrainedModule) else []
    if random:
        raise ValueError(f"{name} has random weights ({len(random)}, the first is {random[0]}): {advice}")


def _take_logvar(model: DDPM, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # Files of published models hold it or not; here it is saved only if it is trained.
    logvar = state.pop(f"{prefix}logvar", None)
    if logvar is not None and logvar.shape == model.logvar.shape and not model.logvar.is_meta:
        model.logvar.copy_(logvar)


def _cond_timesteps(num_timesteps: int, num_timesteps_cond: int) -> Tensor:
    """Timestep of the condition's noise for each t: spread over the schedule at first, then the last one."""
    ids = torch.full((num_timesteps,), num_timesteps - 1, dtype=torch.long, device="cpu")
    ids[:num_timesteps_cond] = torch.linspace(0, num_timesteps - 1, num_timesteps_cond, device="cpu").round().long()
    return ids
