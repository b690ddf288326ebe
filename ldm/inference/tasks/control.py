"""Images from prompts under ControlNets (arXiv 2302.05543): edges, depth and other hints, one or several at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import cli
from ldm.checkpoint import CheckpointError, WeightsSource, load_weights, open_weights, weights_on_meta
from ldm.checkpoint.diffusers.files import read_json
from ldm.checkpoint.diffusers.plan import CONTROL
from ldm.checkpoint.formats import preview
from ldm.checkpoint.names import use_ema_weights
from ldm.config.instantiate import value_at
from ldm.data.detectors import to_hint
from ldm.inference.pipeline import Pipeline
from ldm.inference.precision import cast_weights
from ldm.inference.quantize import quantize_weights
from ldm.inference.requests import ControlRequest
from ldm.inference.tasks.text_to_image import text_to_image
from ldm.models.diffusion.controlnet import Control, ControlLDM, ControlledModel, ControlNet
from ldm.modules.dtype import weights_dtype
from ldm.modules.prepacked import prepack
from ldm.output.images import GeneratedImage


def control_to_image(
    pipeline: Pipeline,
    hints: Sequence[Image.Image],
    request: ControlRequest,
    controlnets: Sequence[ControlNet] = (),
    progress: bool = True,
    only: int | None = None,
) -> Iterator[GeneratedImage]:
    """Generate as `text_to_image` does, under a hint for each ControlNet, of the request's size or resized to it.

    controlnets: see `load_controlnet`; that of a ControlLDM, if the pipeline has one, comes before them.
    In guess mode the unconditional half of guidance sees no hint.
    """
    request = request.checked(pipeline.info)
    model: Any = pipeline.model
    own = [model.control_model] if isinstance(model, ControlLDM) else []
    nets = [*own, *controlnets]
    if not len(nets) == len(hints) == request.controls:
        raise ValueError(f"{len(nets)} ControlNets, {len(hints)} hints and a request for {request.controls}")
    controls = []
    for k, net in enumerate(nets):
        scales = request.layer_scales(k, len(net.zero_convs) + 1)
        if k < len(own) and model.only_mid_control:
            scales = [*[0.0] * (len(scales) - 1), scales[-1]]
        pooled = net.global_average_pooling or (k < len(own) and model.global_average_pooling)
        controls.append(Control(net, scales, pooled))
    height, width = request.size
    seen = [_hint(net, hint.resize((width, height))).to(pipeline.device) for net, hint in zip(nets, hints)]
    parts = {"c_concat": seen}
    controlled = pipeline.with_model(ControlledModel(model, controls))
    yield from text_to_image(controlled, request, progress, None, only, parts, {} if request.guess else parts)


def _hint(net: ControlNet, image: Image.Image) -> Tensor:
    """A hint image as (1, hint_channels, H, W) in [0, 1], grey for a ControlNet of one channel."""
    hint = torch.from_numpy(to_hint(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    if net.hint_channels not in (1, 3):
        raise ValueError(f"this ControlNet takes hints of {net.hint_channels} channels; images have 3, or 1 if grey")
    return hint if net.hint_channels == 3 else hint.mean(dim=1, keepdim=True)


def load_controlnet(pipeline: Pipeline, ckpt: str | Path | WeightsSource, use_ema: bool | None = None) -> ControlNet:
    """Load a ControlNet for the pipeline's model, on its device, in its dtype and quantized as it is.

    ckpt: a file of `control_model.*` alone or of a whole model, or a folder of diffusers' ControlNetModel, whose
        `global_pool_conditions` is the ControlNet's `global_average_pooling`.
    use_ema: false for the regular weights of a file; else its EMA weights, if it has them.
    Raises CheckpointError for a ControlNet of another base.
    """
    source, info = open_weights(ckpt), pipeline.info
    weights = source.tensors() if use_ema is False else use_ema_weights(source.tensors())[0]
    own = {
        name.removeprefix(CONTROL): tensor for name, tensor in weights.items() if name.startswith(CONTROL)
    } or weights
    unet: Mapping[str, Any] = value_at(info.config, "model", "params", "unet_config", "params") or {}
    params = {name: value for name, value in unet.items() if name != "out_channels"}
    with weights_on_meta():
        net = ControlNet(**{**params, "use_checkpoint": False, **_hint_params(source, own)})
    if info.factor is not None and net.hint_factor != info.factor:
        raise CheckpointError(
            f"{source.path}: hints of {net.hint_factor} pixels per latent cell; this model's cells have {info.factor}"
        )
    latent_diffusion: Any = pipeline.model
    dtype = weights_dtype(latent_diffusion.model) or torch.float32
    cast_weights(net, dtype, channels_last=pipeline.device.type == "cpu" and dtype != torch.float32)
    report = load_weights(net, source, weights=own, strict_blocks=False)
    wrong = report.missing or report.unexpected
    if wrong:
        problem = "lacks" if report.missing else "also has"
        raise CheckpointError(f"{source.path}: {problem} {preview(wrong)}: not a ControlNet of this model")
    net = net.requires_grad_(False).eval().to(pipeline.device)
    if pipeline.moved:
        pipeline.moved.add(net)
    own_config = source.path / "config.json"  # of a folder
    net.global_average_pooling = own_config.is_file() and bool(read_json(own_config).get("global_pool_conditions"))
    if (quantize := pipeline.identity.get("quantize")) is not None:
        quantize_weights([net], quantize)
    if pipeline.device.type == "cpu" and cli.only_samples:
        prepack(net)
    return net


def _hint_params(source: WeightsSource, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The parameters of a ControlNet that its UNet does not state, from the shapes of its hint block."""
    name = "input_hint_block.{}.weight"
    widths: list[int] = []
    while (convolution := weights.get(name.format(4 * len(widths)))) is not None:  # conv_in, then every strided one
        widths.append(convolution.shape[0])
    if not widths:
        raise CheckpointError(f"{source.path}: not a ControlNet (no {name.format(0)}); it has {preview(weights)}")
    return {"hint_channels": weights[name.format(0)].shape[1], "hint_block_channels": widths}
