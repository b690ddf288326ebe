"""LatentDiffusion: the first stage, the condition stage and the batches around the diffusion of their latents."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm import checkpoint
from ldm.config.instantiate import FIRST_STAGE_AS_CONDITION, UNCONDITIONAL, instantiate_from_config
from ldm.models.diffusion.condition_stage import ConditionStage
from ldm.models.diffusion.conditioning import Conditioning, compose_condition
from ldm.models.diffusion.dropout import drop_samples
from ldm.models.diffusion.image_log import log_latent_images
from ldm.models.diffusion.latent_scale import measure_latent_std
from ldm.models.diffusion.pixel import DDPM, latent_size
from ldm.models.diffusion.samplers.ddim import DDIMSampler
from ldm.modules.diffusionmodules.schedule import extract_into_tensor
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """A batch in the model's terms."""

    z: Tensor  # (B, c, h, w), scaled latents
    c: Any  # the condition: encoded, or raw where its encoder is trained
    x: Tensor  # (B, C, H, W), the pictures
    raw_c: Any  # the condition as the encoder takes it; None without one


class LatentDiffusion(ConditionStage, DDPM):
    """Diffusion in the latent space of a frozen first stage, under a condition (arXiv 2112.10752, section 3).

    `concat_keys`, `masked_image_key` and `adm_key` add parts to the condition that comes from `cond_stage_key`: see ConditionStage.
    `cond_dropout` is the share of training samples whose condition is replaced by the encoder's "no condition", which
    classifier-free guidance needs (Ho & Salimans 2022, algorithm 1); it is recorded in the checkpoint.
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        cond_dropout: float = 0.0,
        concat_keys: Sequence[str] = (),
        masked_image_key: str | None = "masked_image",
        adm_key: str | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        if conditioning_key is None and cond_stage_config != UNCONDITIONAL:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == UNCONDITIONAL:
            conditioning_key = None
        if not 0.0 <= cond_dropout < 1.0:
            raise ValueError(f"cond_dropout {cond_dropout}: choose a share in [0, 1), 0.1 is usual")
        if scale_by_std and scale_factor != 1.0:
            raise ValueError(f"scale_by_std measures the scale factor: leave scale_factor out, got {scale_factor}")
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        self.set_further_parts(concat_keys, masked_image_key, adm_key)
        self.num_timesteps_cond = 1 if num_timesteps_cond is None else num_timesteps_cond
        if not 1 <= self.num_timesteps_cond <= self.num_timesteps:
            raise ValueError(f"num_timesteps_cond {self.num_timesteps_cond}: choose 1 to {self.num_timesteps}")
        self.cond_stage_key, self.cond_stage_trainable, self.cond_stage_forward = (
            cond_stage_key,
            cond_stage_trainable,
            cond_stage_forward,
        )
        self.concat_mode, self.cond_dropout, self.scale_by_std = concat_mode, cond_dropout, scale_by_std
        self.clip_denoised = False
        self._scale_factor_loaded = False
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor), device="cpu"))
        else:
            self.scale_factor = scale_factor
        self.first_stage_model = instantiate_from_config(first_stage_config)
        self.first_stage_model.requires_grad_(False)
        self._build_cond_stage(cond_stage_config)
        if self.num_timesteps_cond > 1:
            self.register_buffer(
                "cond_ids", _cond_timesteps(self.num_timesteps, self.num_timesteps_cond), persistent=False
            )
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)
        self.train(self.training)

    def _build_cond_stage(self, config: Mapping[str, Any] | str) -> None:
        if config == FIRST_STAGE_AS_CONDITION:
            if self.cond_stage_trainable:
                raise ValueError(
                    "cond_stage_config __is_first_stage__ is frozen with the first stage: set cond_stage_trainable false"
                )
            self.cond_stage_model = self.first_stage_model
        else:
            self.cond_stage_model = instantiate_from_config(config)
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.requires_grad_(False)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """As every module, but frozen stages stay in evaluation mode."""
        super().train(mode)
        for name, trained in (
            ("first_stage_model", False),
            ("cond_stage_model", getattr(self, "cond_stage_trainable", False)),
        ):
            stage = getattr(self, name, None)
            if stage is not None and not trained:
                stage.eval()
        return self

    # ---------------------------------------------------------------------------------------------------- first stage

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Pictures (B, C, H, W) in [-1, 1] -> what the first stage gives: a posterior, or latents."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: Any) -> Tensor:
        """A scaled latent (B, c, h, w): a sample of the posterior, or the latents themselves."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample()
        elif not torch.is_tensor(encoder_posterior):
            raise TypeError(f"a first stage gives a posterior or a tensor, got {type(encoder_posterior).__name__}")
        return self.scale_factor * encoder_posterior

    def differentiable_decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Scaled latents (B, c, h, w) -> pictures (B, C, H, W) in about [-1, 1], with gradients."""
        options = {"force_not_quantize": True} if force_not_quantize else {}
        return self.first_stage_model.decode(z / self.scale_factor, **options)

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Scaled latents (B, c, h, w) -> pictures (B, C, H, W) in about [-1, 1]."""
        return self.differentiable_decode_first_stage(z, force_not_quantize)

    def on_fit_start(self) -> None:
        """Pretrained encoders that no checkpoint has filled find their weights now; a random first stage is worth a warning."""
        checkpoint.ensure_weights(self)
        stage = self.first_stage_model
        resumed = self.restarted_from_ckpt or self.trainer.ckpt_path is not None
        filled = resumed or checkpoint.has_loaded_weights(stage)
        if not filled and any(True for _ in stage.parameters()):
            logger.warning(
                "the first stage has random weights: set model.params.first_stage_config.params.ckpt_path to a trained one"
            )

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load weights from a file, see DDPM. A scale factor that is measured comes from the file where it has one.

        Raises ValueError where the file was trained with another scale factor than the config's.
        """
        super().init_from_ckpt(path, ignore_keys, only_model)
        given = (
            None if only_model or "scale_factor" in ignore_keys else checkpoint.read_weights(path).get("scale_factor")
        )
        self._scale_factor_loaded = given is not None
        if given is not None and not self.scale_by_std and abs(float(given) / float(self.scale_factor) - 1) > 1e-3:
            raise ValueError(
                f"{path}: trained with scale_factor {float(given):.6g}, the config has {float(self.scale_factor):.6g}: set "
                f"model.params.scale_factor={float(given):.6g}, or name scale_factor in ignore_keys"
            )

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Measure the scale factor on a fresh run: 1 / std of the latents, over several batches and all ranks."""
        fresh = self.global_step == 0 and not self._scale_factor_loaded and self.trainer.ckpt_path is None
        if self.scale_by_std and fresh:
            self.scale_factor.fill_(1.0)
            self.scale_factor.copy_(1.0 / measure_latent_std(self, self.trainer.train_dataloader))

    # -------------------------------------------------------------------------------------------------------- batches

    def encode_batch(
        self,
        batch: Mapping[str, Any],
        k: str | None = None,
        bs: int | None = None,
        force_c_encode: bool = False,
        cond_key: str | None = None,
    ) -> Encoded:
        """Latents and condition of a batch, or of its first `bs` samples.

        In training mode `cond_dropout` of the conditions are dropped here. The condition of a trained encoder stays raw,
        so that `forward` encodes it with gradients, unless `force_c_encode`.
        """
        x = self.get_pictures(batch, k or self.first_stage_key, bs)
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        if self.model.conditioning_key is None or self.cond_stage_model is None:
            return Encoded(z, None, x, None)
        raw_c = self.raw_condition(batch, cond_key or self.cond_stage_key, bs)
        kept = raw_c
        if self.training and self.cond_dropout > 0:
            dropped = torch.rand(x.shape[0], device=self.device) < self.cond_dropout
            kept = drop_samples(raw_c, self.no_condition_like(raw_c, x.shape[0]), dropped)
        encode = force_c_encode or not self.cond_stage_trainable
        main = self.get_learned_conditioning(kept) if encode else kept
        c = compose_condition(main, self.model.conditioning_key, self.further_parts(batch, z.shape[2:], bs))
        return Encoded(z, c, x, raw_c)

    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
    ) -> tuple[Any, ...]:
        """The published form of `encode_batch`: (z, c), then (x, reconstruction) and the raw condition where asked for."""
        encoded = self.encode_batch(batch, k, bs, force_c_encode, cond_key)
        out: tuple[Any, ...] = (encoded.z, encoded.c)
        if return_first_stage_outputs:
            out += (encoded.x, self.decode_first_stage(encoded.z))
        if return_original_cond:
            out += (encoded.raw_c,)
        return out

    def shared_step(self, batch: Mapping[str, Any], **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        z, c = self.get_input(batch, self.first_stage_key)
        return self(z, c, **kwargs)

    def forward(self, x: Tensor, c: Any = None, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of latents x (B, c, h, w) under a condition, raw where its encoder is trained, at random timesteps."""
        t = self.draw_timesteps(x.shape[0])
        if self.model.conditioning_key is not None and self.cond_stage_trainable:
            c = self.map_main_condition(self.get_learned_conditioning, c)
        if self.num_timesteps_cond > 1 and torch.is_tensor(c):
            c = self.q_sample(c, self.cond_ids[t], torch.randn_like(c))  # a noise schedule of the condition's own
        return self.p_losses(x, c, t, *args, **kwargs)

    def p_losses(
        self, x_start: Tensor, cond: Conditioning, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of latents x_start (B, c, h, w) at t (B,) and its named parts (LDM eq. 2 and 3).

        `logvar` weighs timesteps, each loss l as l / exp(logvar_t) + logvar_t.
        """

        def weigh(per_sample: Tensor) -> Tensor:
            logvar = extract_into_tensor(self.logvar, t, per_sample.shape)
            return per_sample / torch.exp(logvar) + logvar

        return self._losses(x_start, cond, t, noise, weigh)

    def trainable_parameters(self) -> list[nn.Parameter]:
        condition = (
            list(self.cond_stage_model.parameters())
            if self.cond_stage_trainable and self.cond_stage_model is not None
            else []
        )
        return [*super().trainable_parameters(), *condition]

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        """Record what a reader of the weights has to know."""
        content["latent_diffusion"] = {
            "cond_dropout": float(self.cond_dropout),
            "parameterization": self.parameterization,
            "conditioning_key": self.model.conditioning_key,
            "scale_factor": float(self.scale_factor),
        }

    @torch.no_grad()
    def sample_log(
        self, cond: Conditioning, batch_size: int, ddim: bool, ddim_steps: int, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """(samples, intermediates) of DDIM, or of the ancestral chain: the published hook of image logs."""
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, **kwargs)
        shape = (self.channels, *latent_size(self.image_size))
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, verbose=False, **kwargs)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, **kwargs: Any) -> dict[str, Tensor]:
        """Pictures of how training goes, each (B, C, H, W) in about [-1, 1]; see ldm.models.diffusion.image_log."""
        return log_latent_images(self, batch, N, n_row, **kwargs)


def _cond_timesteps(num_timesteps: int, num_timesteps_cond: int) -> Tensor:
    """Timestep at which the condition is noised for each t: the first ones spread over the chain, the rest at its end."""
    ids = torch.full((num_timesteps,), num_timesteps - 1, dtype=torch.long, device="cpu")
    ids[:num_timesteps_cond] = torch.linspace(0, num_timesteps - 1, num_timesteps_cond, device="cpu").round().long()
    return ids
