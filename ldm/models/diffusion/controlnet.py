"""ControlNet: spatial control of a text-to-image model by a trained copy of its encoder (arXiv 2302.05543).

The published module is `cldm.cldm`, whose names these classes also have in configs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.diffusers.plan import CONTROL
from ldm.checkpoint.names import use_ema_weights
from ldm.config.consistency import ADAPTERS, HINT_BLOCK_CHANNELS
from ldm.config.instantiate import instantiate_from_config
from ldm.config.types import PositiveInt
from ldm.models.diffusion.conditioning import Conditioning, Parts, joined_context, normalize_condition
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.image_log import log_latent_images
from ldm.modules.diffusionmodules.openaimodel import Context, TimestepEmbedSequential, UNetModel, UNetTrunk
from ldm.modules.diffusionmodules.util import conv_nd, zero_module
from ldm.modules.ema import EMAConfig

logger = logging.getLogger(__name__)


class ControlNet(UNetTrunk):
    """Copy of a UNet's contracting half that also sees a hint image; its outputs are added to the skip connections.

    hint_channels: channels of the hint. hint_block_channels: channels of the convolutions that bring the hint to the
    latent's size, which halve it between two of them; the default is the published one, for a first stage of factor 8.
    Other options are the UNet's. The attribute `global_average_pooling` says how its outputs are used, see `Control`.
    """

    global_average_pooling = False

    def __init__(
        self,
        image_size: PositiveInt,
        in_channels: PositiveInt,
        model_channels: PositiveInt,
        hint_channels: PositiveInt,
        *args: Any,
        hint_block_channels: Sequence[PositiveInt] = HINT_BLOCK_CHANNELS,
        **kwargs: Any,
    ) -> None:
        self.hint_channels, self.hint_block_channels = hint_channels, tuple(hint_block_channels)
        super().__init__(image_size, in_channels, model_channels, model_channels, *args, **kwargs)

    def _build_rest(self) -> None:
        first, *further = self.hint_block_channels
        layers: list[nn.Module] = [conv_nd(self.dims, self.hint_channels, first, 3, padding=1), nn.SiLU()]
        ch = first
        for width in further:
            layers += [conv_nd(self.dims, ch, ch, 3, padding=1), nn.SiLU()]
            layers += [conv_nd(self.dims, ch, width, 3, padding=1, stride=2), nn.SiLU()]
            ch = width
        layers.append(zero_module(conv_nd(self.dims, ch, self.model_channels, 3, padding=1)))
        self.input_hint_block = TimestepEmbedSequential(*layers)
        self.zero_convs = nn.ModuleList(self._zero_conv(ch) for ch in self._skip_channels)
        self.middle_block_out = self._zero_conv(self._middle_channels)

    def _zero_conv(self, channels: int) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(zero_module(conv_nd(self.dims, channels, channels, 1)))

    def _convert(self, dtype: torch.dtype) -> None:
        super()._convert(dtype)
        for block in (self.input_hint_block, *self.zero_convs, self.middle_block_out):
            block.to(dtype)

    @property
    def hint_factor(self) -> int:
        """Pixels of the hint for each latent cell, along each axis."""
        return 2 ** (len(self.hint_block_channels) - 1)

    def forward(
        self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Context = None, **kwargs: Any
    ) -> list[Tensor]:
        """Residuals of the skip connections, from the first, then of the middle block (section 3.1, eq. 2).

        x: (B, C, h, w), hint: (B, hint_channels, H, W) in [0, 1], timesteps: (B,), context: (B, L, context_dim); H and
        W are `hint_factor` times h and w. Other keywords are ignored, as published.
        """
        size = [side * self.hint_factor for side in x.shape[2:]]
        if hint.shape[1:] != (self.hint_channels, *size):
            expected = ", ".join(map(str, ("B", self.hint_channels, *size)))
            raise ValueError(f"hint of shape {tuple(hint.shape)}: this ControlNet needs ({expected})")
        emb, context = self.prepare(x, timesteps, context)  # (B, 4 * model_channels), (B, L, context_dim)
        (h,) = self.encode(x, emb, context, slice(1))  # (B, model_channels, h, w)
        h = h + self.input_hint_block(hint.to(self.dtype))  # (B, model_channels, h, w)
        skips = [h, *self.encode(h, emb, context, slice(1, None))]  # (B, C_i, h_i, w_i) each
        h = self.middle(skips[-1], emb, context)  # (B, C, h / f, w / f), f = size_multiple
        return [*(zero_conv(skip) for zero_conv, skip in zip(self.zero_convs, skips)), self.middle_block_out(h)]


class ControlledUnetModel(UNetModel):
    """UNet that adds the outputs of a ControlNet to its skip connections and its middle block. Options: the UNet's."""

    def forward(  # type: ignore[override]  # the published order of arguments
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Context = None,
        control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """As `UNetModel.forward`; control: outputs of `ControlNet.forward`, scaled, or None.

        only_mid_control: add the one of the middle block alone.
        """
        if control is None:
            return super().forward(x, timesteps, context, **kwargs)
        if only_mid_control:
            control = control[-1:]
        return controlled_output(self, x, timesteps, context, control)


def controlled_output(
    unet: UNetModel, x: Tensor, timesteps: Tensor | None, context: Context, control: Sequence[Tensor]
) -> Tensor:
    """Output of any UNet (B, C, H, W) with `control` added: a residual for each skip connection, then the middle's.

    A control of the middle block alone has one entry. Raises ValueError for another number of residuals.
    """
    emb, context = unet.prepare(x, timesteps, context)
    skips = unet.encode(x, emb, context)
    h = unet.middle(skips[-1], emb, context)
    *residuals, middle = (residual.to(h.dtype) for residual in control)
    if residuals and len(residuals) != len(skips):
        raise ValueError(f"control of {len(residuals) + 1} residuals: this UNet takes {len(skips) + 1}")
    if residuals:
        skips = [skip + residual for skip, residual in zip(skips, residuals)]
    return unet.head(unet.decode(h + middle, skips, emb, context)).to(x.dtype)


@dataclass(frozen=True)
class Control:
    """A ControlNet with the factors of its outputs; global_average_pooling: average them over all positions."""

    net: nn.Module
    scales: Sequence[float]
    global_average_pooling: bool = False

    def __call__(self, x: Tensor, hint: Tensor, t: Tensor, context: Context) -> list[Tensor]:
        """Scaled residuals for x (B, C, h, w), hint (B, C', H, W), t (B,) and context (B, L, D)."""
        residuals = self.net(x=x, hint=hint, timesteps=t, context=context)
        if self.global_average_pooling:
            residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
        return [residual * scale for residual, scale in zip(residuals, self.scales)]


class ControlLDM(LatentDiffusion):
    """Text-conditional latent diffusion under a ControlNet, which alone is trained.

    control_key: hints of the batch, (B, H, W, hint_channels) in [0, 1]; they are `c_concat` of the condition, and
        without it (or with None, "guess mode") the model is the one without control.
    only_mid_control: add the ControlNet's output to the middle block alone. sd_locked: false trains the UNet's
        expanding half too. global_average_pooling: average the ControlNet's outputs over all positions.
    ckpt_path: a file of the whole model, or of its base without a ControlNet, as Stable Diffusion's: the ControlNet
        then starts as a copy of the network's contracting half.
    The attribute `control_scales` multiplies the ControlNet's outputs, from the first skip connection to the middle.
    """

    def __init__(
        self,
        control_stage_config: Mapping[str, Any],
        control_key: str,
        only_mid_control: bool = False,
        *args: Any,
        sd_locked: bool = True,
        global_average_pooling: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in ADAPTERS:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: a ControlLDM trains its ControlNet alone; remove the section, train it with a "
                    "LatentDiffusion, and pass its file to control2img.py with --lora or --embedding"
                )
        super().__init__(*args, **kwargs)
        if self.model.conditioning_key != "crossattn":
            raise ValueError(f"conditioning_key {self.model.conditioning_key!r}: a ControlLDM requires crossattn")
        if self.cond_stage_trainable:
            raise ValueError("cond_stage_trainable true: only the ControlNet is trained; set it to false")
        self.control_model: Any = instantiate_from_config(control_stage_config)
        self.control_key, self.only_mid_control = control_key, only_mid_control
        self.global_average_pooling = global_average_pooling
        self.control_scales = [1.0] * (len(self.control_model.zero_convs) + 1)
        self.model.requires_grad_(False)
        self.sd_locked = sd_locked
        if self.use_ema:
            self.restart_ema()

    @property
    def sd_locked(self) -> bool:
        """True if the UNet's expanding half is frozen, as its contracting half is."""
        return not any(parameter.requires_grad for parameter in self.model.parameters())

    @sd_locked.setter
    def sd_locked(self, locked: bool) -> None:
        unet: Any = self.model.diffusion_model
        unet.output_blocks.requires_grad_(not locked)
        unet.out.requires_grad_(not locked)

    def averaged_module(self) -> nn.Module:
        return self

    def add_ema(self, config: EMAConfig | None = None, **options: Any) -> None:
        self.use_ema, self._ema_options = True, {"config": config, **options}
        if hasattr(self, "control_model"):  # not yet in the constructor of the base
            super().add_ema(config, **options)

    # ------------------------------------------------------------------------------------------------------ condition

    def further_parts(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> dict[str, Any]:
        return {**super().further_parts(batch, size, bs), "c_concat": [self.get_images(batch, self.control_key, bs)]}

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning = None, *args: Any, **kwargs: Any) -> Tensor:
        """As `LatentDiffusion.apply_model`; the hint is `c_concat` of the condition, None without control."""
        parts = normalize_condition(cond, self.model.conditioning_key)
        context, hint, residuals = joined_context(parts), parts.get("c_concat"), None
        if hint is not None:
            control = Control(self.control_model, self.control_scales, self.global_average_pooling)
            residuals = control(x_noisy, torch.cat(hint, 1), t, context)

        def call(unet: nn.Module, x: Tensor, t: Tensor, parts: Parts) -> Tensor:
            return unet(x=x, timesteps=t, only_mid_control=self.only_mid_control, **parts)

        return self.model.call(call, x_noisy, t, {"context": context, "control": residuals})

    # -------------------------------------------------------------------------------------------------------- weights

    def load_tensors(
        self, path: str, tensors: Mapping[str, Tensor], ignore_keys: Sequence[str], only_model: bool
    ) -> None:
        """Load the whole model, or a base without `control_model.*`, by its averages if it has them.

        The ControlNet then gets the weights of the same names in the UNet; its own layers keep their initial values,
        and those in front of a sum are zero, so the model predicts as its base does.
        """
        if any(name.startswith(CONTROL) for name in tensors):
            super().load_tensors(path, tensors, ignore_keys, only_model)
            return
        base, _ = use_ema_weights(tensors)
        super().load_tensors(path, base, (*ignore_keys, CONTROL), only_model)
        unet, own = self.model.diffusion_model.state_dict(), self.control_model.state_dict()
        shared = {name: unet[name] for name, tensor in own.items() if name in unet and unet[name].shape == tensor.shape}
        self.control_model.load_state_dict(shared, strict=False)
        if self.use_ema:
            self.restart_ema()  # with the weights that were just copied
        text = "%s has no control_model.*: the ControlNet starts with %d tensors of the UNet, and %d of its own"
        logger.info(text, path, len(shared), len(own) - len(shared))

    # ----------------------------------------------------------------------------------------------------- image logs

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 4,
        n_row: int = 2,
        sample: bool = False,
        ddim_steps: int | None = 50,
        ddim_eta: float = 0.0,
        plot_denoise_rows: bool = False,
        plot_diffusion_rows: bool = False,
        unconditional_guidance_scale: float | None = 9.0,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """As `LatentDiffusion.log_images`, with `control`; by default only samples under guidance, as published."""
        return log_latent_images(
            self,
            batch,
            N,
            n_row,
            sample=sample,
            ddim_steps=ddim_steps,
            ddim_eta=ddim_eta,
            plot_denoise_rows=plot_denoise_rows,
            plot_diffusion_rows=plot_diffusion_rows,
            unconditional_guidance_scale=unconditional_guidance_scale,
            **kwargs,
        )

    def further_images(self, batch: Mapping[str, Any], inputs: Tensor, cond: Any) -> dict[str, Tensor]:
        return {"control": cond["c_concat"][0] * 2.0 - 1.0}


class ControlledModel:
    """A latent diffusion model under one or several ControlNets, each with a hint; the rest is the model's own.

    It replaces the model for samplers. The hints are `c_concat` of the condition, one for each ControlNet, and their
    scaled outputs are added up; a condition without them is that of the model alone.
    """

    def __init__(self, model: Any, controls: Sequence[Control]) -> None:
        self.uncontrolled, self.controls = model, tuple(controls)

    def __getattr__(self, name: str) -> Any:
        if name == "uncontrolled":  # copy and pickle ask before __init__ ran
            raise AttributeError(name)
        return getattr(self.uncontrolled, name)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """Return the network output (B, C, h, w) at x_noisy (B, C, h, w) and t (B,)."""
        wrapper = self.uncontrolled.model
        parts = normalize_condition(cond, wrapper.conditioning_key)
        hints = parts.get("c_concat") or []
        if not hints:
            return self.uncontrolled.apply_model(x_noisy, t, parts)
        context = joined_context(parts)
        each = [control(x_noisy, hint, t, context) for control, hint in zip(self.controls, hints, strict=True)]
        total = [sum(residuals[1:], residuals[0]) for residuals in zip(*each, strict=True)]

        def call(unet: Any, x: Tensor, t: Tensor, parts: Parts) -> Tensor:
            return controlled_output(unet, x, t, parts["context"], parts["control"])

        return wrapper.call(call, x_noisy, t, {"context": context, "control": total})
