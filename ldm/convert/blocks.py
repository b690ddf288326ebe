"""diffusers' networks computed from their config and tensors alone, block by block: the other side of the parity check.

Nothing here knows a published name or a table of names. The order of blocks, skip connections and layers is that of
diffusers' UNet2DConditionModel, UNet2DModel, AutoencoderKL and VQModel and of transformers' CLIPTextModel, in float32.
"""

import math
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """A block's name in diffusers and its output."""

    name: str
    output: Tensor


class Weights:
    """Layers by name, in float32 from tensors of any precision."""

    def __init__(self, tensors: Mapping[str, Tensor], groups: int = 32) -> None:
        self.tensors, self.groups = tensors, groups

    def has(self, layer: str) -> bool:
        return f"{layer}.weight" in self.tensors

    def _of(self, layer: str) -> tuple[Tensor, Tensor | None]:
        bias = self.tensors.get(f"{layer}.bias")
        return self.tensors[f"{layer}.weight"].float(), None if bias is None else bias.float()

    def linear(self, layer: str, x: Tensor) -> Tensor:
        weight, bias = self._of(layer)
        return F.linear(x, weight.flatten(1), bias)  # old folders keep 1x1 convolutions

    def conv(self, layer: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, *self._of(layer), stride=stride, padding=padding)

    def group_norm(self, layer: str, x: Tensor, eps: float) -> Tensor:
        return F.group_norm(x, self.groups, *self._of(layer), eps=eps)

    def layer_norm(self, layer: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._of(layer), eps=eps)

    def embedding(self, layer: str, ids: Tensor) -> Tensor:
        return self.tensors[f"{layer}.weight"][ids].float()


def attention(w: Weights, name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    """x: (B, N, C), context: (B, L, D) -> (B, N, C); softmax written out."""
    inputs = (("to_q", x), ("to_k", context), ("to_v", context))
    q, k, v = (w.linear(f"{name}.{part}", of).unflatten(-1, (heads, -1)).transpose(1, 2) for part, of in inputs)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return w.linear(f"{name}.to_out.0", (scores @ v).transpose(1, 2).flatten(2))


def spatial_attention(w: Weights, name: str, x: Tensor, heads: int, eps: float) -> Tensor:
    """Attention over all pixels, with a residual connection: (B, C, H, W) -> (B, C, H, W)."""
    h = w.group_norm(f"{name}.group_norm", x, eps).flatten(2).transpose(1, 2)
    return x + attention(w, name, h, h, heads).transpose(1, 2).reshape(x.shape)


def resnet(
    w: Weights, name: str, x: Tensor, eps: float, temb: Tensor | None = None, scale_shift: bool = False
) -> Tensor:
    """(B, C, H, W), (B, E) -> (B, C', H, W)."""
    h = w.conv(f"{name}.conv1", F.silu(w.group_norm(f"{name}.norm1", x, eps)))
    shift = torch.zeros(()) if temb is None else w.linear(f"{name}.time_emb_proj", F.silu(temb))[:, :, None, None]
    if scale_shift:
        scale, shift = shift.chunk(2, dim=1)
        h = w.group_norm(f"{name}.norm2", h, eps) * (1 + scale) + shift
    else:
        h = w.group_norm(f"{name}.norm2", h + shift, eps)
    h = w.conv(f"{name}.conv2", F.silu(h))
    return h + (w.conv(f"{name}.conv_shortcut", x, padding=0) if w.has(f"{name}.conv_shortcut") else x)


def transformer(
    w: Weights, name: str, x: Tensor, context: Tensor, heads: int, config: Mapping[str, Any], cross_only: bool
) -> Tensor:
    """Transformer2DModel: (B, C, H, W) on a context (B, L, D) -> (B, C, H, W)."""
    linear = bool(config.get("use_linear_projection"))
    h = w.group_norm(f"{name}.norm", x, 1e-6)
    h = h if linear else w.conv(f"{name}.proj_in", h, padding=0)
    h = h.flatten(2).transpose(1, 2)
    h = w.linear(f"{name}.proj_in", h) if linear else h
    for k in range(config.get("transformer_layers_per_block", 1)):
        block = f"{name}.transformer_blocks.{k}"
        n = w.layer_norm(f"{block}.norm1", h)
        h = h + attention(w, f"{block}.attn1", n, context if cross_only else n, heads)
        h = h + attention(w, f"{block}.attn2", w.layer_norm(f"{block}.norm2", h), context, heads)
        value, gate = w.linear(f"{block}.ff.net.0.proj", w.layer_norm(f"{block}.norm3", h)).chunk(2, dim=-1)
        h = h + w.linear(f"{block}.ff.net.2", value * F.gelu(gate))
    h = w.linear(f"{name}.proj_out", h) if linear else h
    h = h.transpose(1, 2).reshape(x.shape)
    return x + (h if linear else w.conv(f"{name}.proj_out", h, padding=0))


# ------------------------------------------------------------------------------------------------------------- UNets


class _UNetBlocks:
    """Blocks of a UNet or a ControlNet at one context (B, L, D), or without one."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], context: Tensor | None) -> None:
        self.w, self.config, self.context = Weights(tensors, config["norm_num_groups"]), config, context
        self.eps, self.levels = config["norm_eps"], len(config["block_out_channels"])
        self.shift = config.get("resnet_time_scale_shift") == "scale_shift"
        self.layers = _per_level(config["layers_per_block"], self.levels)
        self.head = _per_level(config["attention_head_dim"], self.levels)
        self.only = _per_level(config.get("only_cross_attention") or False, self.levels)

    def step(self, name: str, k: int, h: Tensor, temb: Tensor, attends: bool, level: int, cross_only: bool) -> Tensor:
        """A residual block (B, C, H, W) -> (B, C', H, W), and its attention if it `attends`."""
        h = resnet(self.w, f"{name}.resnets.{k}", h, self.eps, temb, self.shift)
        name, head = f"{name}.attentions.{k}", self.head[level]
        if not attends:
            return h
        if self.context is not None:
            return transformer(self.w, name, h, self.context, head, self.config, cross_only)
        return spatial_attention(self.w, name, h, h.shape[1] // (head or h.shape[1]), self.eps)

    def contracting(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, hint: Tensor | None = None
    ) -> Generator[Block, None, tuple[Tensor, list[Tensor], Tensor]]:
        """Return the time embedding (B, E), the skip connections and the output of the middle block."""
        w = self.w
        temb = _time_features(t, self.config["block_out_channels"][0])
        temb = w.linear("time_embedding.linear_2", F.silu(w.linear("time_embedding.linear_1", temb)))
        yield Block("time_embedding", temb)
        if y is not None:
            temb = temb + w.embedding("class_embedding", y)
        h = w.conv("conv_in", x)
        yield Block("conv_in", h)
        if hint is not None:
            added = _hint_embedding(w, len(self.config["conditioning_embedding_out_channels"]), hint)
            yield Block("controlnet_cond_embedding", added)
            h = h + added
        skips = [h]
        for level, block_type in enumerate(self.config["down_block_types"]):
            name = f"down_blocks.{level}"
            for k in range(self.layers[level]):
                h = self.step(name, k, h, temb, "Attn" in block_type, level, self.only[level])
                yield Block(f"{name}.resnets.{k}", h)
                skips.append(h)
            if level != self.levels - 1:
                h = w.conv(f"{name}.downsamplers.0.conv", h, stride=2)
                yield Block(f"{name}.downsamplers.0", h)
                skips.append(h)
        middle_only = bool(self.config.get("mid_block_only_cross_attention"))
        h = self.step("mid_block", 0, h, temb, True, self.levels - 1, middle_only)
        h = resnet(w, "mid_block.resnets.1", h, self.eps, temb, self.shift)
        yield Block("mid_block", h)
        return temb, skips, h


def unet(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    x: Tensor,
    t: Tensor,
    context: Tensor | None,
    y: Tensor | None,
) -> Iterator[Block]:
    """UNet2DConditionModel or UNet2DModel at x (B, C, H, W), t (B,), context (B, L, D), class ids y (B,)."""
    net = _UNetBlocks(tensors, config, context)
    temb, skips, h = yield from net.contracting(x, t, y)
    for up, block_type in enumerate(config["up_block_types"]):
        name, level = f"up_blocks.{up}", net.levels - 1 - up
        for k in range(net.layers[level] + 1):
            h = torch.cat([h, skips.pop()], dim=1)
            h = net.step(name, k, h, temb, "Attn" in block_type, level, net.only[level])
            if up != net.levels - 1 and k == net.layers[level]:
                h = net.w.conv(f"{name}.upsamplers.0.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
            yield Block(f"{name}.resnets.{k}", h)
    yield Block("conv_out", net.w.conv("conv_out", F.silu(net.w.group_norm("conv_norm_out", h, net.eps))))


def controlnet(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], x: Tensor, hint: Tensor, t: Tensor, context: Tensor
) -> Iterator[Block]:
    """ControlNetModel at x (B, C, h, w), hint (B, C', H, W), t (B,), context (B, L, D)."""
    net = _UNetBlocks(tensors, config, context)
    _, skips, h = yield from net.contracting(x, t, hint=hint)
    for k, skip in enumerate(skips):
        yield Block(f"controlnet_down_blocks.{k}", net.w.conv(f"controlnet_down_blocks.{k}", skip, padding=0))
    yield Block("controlnet_mid_block", net.w.conv("controlnet_mid_block", h, padding=0))


def _hint_embedding(w: Weights, widths: int, hint: Tensor) -> Tensor:
    """ControlNetConditioningEmbedding: (B, C', H, W) -> (B, C, h, w), halved between two of `widths`."""
    name = "controlnet_cond_embedding"
    h = F.silu(w.conv(f"{name}.conv_in", hint))
    for k in range(2 * (widths - 1)):
        h = F.silu(w.conv(f"{name}.blocks.{k}", h, stride=1 + k % 2))
    return w.conv(f"{name}.conv_out", h)


def _per_level(value: Any, levels: int) -> list[Any]:
    return value if isinstance(value, list) else [value] * levels


def _time_features(t: Tensor, width: int) -> Tensor:
    """Timesteps with flip_sin_to_cos and freq_shift 0: cosines, then sines."""
    half = width // 2
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half).float() / half)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# ------------------------------------------------------------------------------------------------------- first stages


def encoder(tensors: Mapping[str, Tensor], config: Mapping[str, Any], x: Tensor) -> Iterator[Block]:
    """The encoder and quant_conv of AutoencoderKL or VQModel at images x (B, C, H, W)."""
    w = Weights(tensors, config["norm_num_groups"])
    h = w.conv("encoder.conv_in", x)
    yield Block("encoder.conv_in", h)
    last = len(config["down_block_types"]) - 1
    for level, block_type in enumerate(config["down_block_types"]):
        name = f"encoder.down_blocks.{level}"
        h = yield from _level(w, name, config["layers_per_block"], "Attn" in block_type, h)
        if level != last:
            h = w.conv(f"{name}.downsamplers.0.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
            yield Block(f"{name}.downsamplers.0", h)
    h = yield from _middle(w, config, "encoder", h)
    h = w.conv("encoder.conv_out", F.silu(w.group_norm("encoder.conv_norm_out", h, 1e-6)))
    yield Block("encoder.conv_out", h)
    yield Block("quant_conv", w.conv("quant_conv", h, padding=0))


def decoder(tensors: Mapping[str, Tensor], config: Mapping[str, Any], z: Tensor) -> Iterator[Block]:
    """post_quant_conv and the decoder of AutoencoderKL or VQModel at latents z (B, c, h, w)."""
    w = Weights(tensors, config["norm_num_groups"])
    h = w.conv("post_quant_conv", z, padding=0)
    yield Block("post_quant_conv", h)
    h = w.conv("decoder.conv_in", h)
    yield Block("decoder.conv_in", h)
    h = yield from _middle(w, config, "decoder", h)
    last = len(config["up_block_types"]) - 1
    for up, block_type in enumerate(config["up_block_types"]):
        name = f"decoder.up_blocks.{up}"
        h = yield from _level(w, name, config["layers_per_block"] + 1, "Attn" in block_type, h)
        if up != last:
            h = w.conv(f"{name}.upsamplers.0.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
            yield Block(f"{name}.upsamplers.0", h)
    yield Block("decoder.conv_out", w.conv("decoder.conv_out", F.silu(w.group_norm("decoder.conv_norm_out", h, 1e-6))))


def _level(w: Weights, name: str, layers: int, attention: bool, h: Tensor) -> Generator[Block, None, Tensor]:
    for k in range(layers):
        h = resnet(w, f"{name}.resnets.{k}", h, 1e-6)
        yield Block(f"{name}.resnets.{k}", h)
        if attention:
            h = spatial_attention(w, f"{name}.attentions.{k}", h, 1, 1e-6)
            yield Block(f"{name}.attentions.{k}", h)
    return h


def _middle(w: Weights, config: Mapping[str, Any], half: str, h: Tensor) -> Generator[Block, None, Tensor]:
    name = f"{half}.mid_block"
    h = resnet(w, f"{name}.resnets.0", h, 1e-6)
    yield Block(f"{name}.resnets.0", h)
    if config.get("mid_block_add_attention", True):
        h = spatial_attention(w, f"{name}.attentions.0", h, 1, 1e-6)
        yield Block(f"{name}.attentions.0", h)
    h = resnet(w, f"{name}.resnets.1", h, 1e-6)
    yield Block(f"{name}.resnets.1", h)
    return h


# ------------------------------------------------------------------------------------------------------- text encoder


def text_model(tensors: Mapping[str, Tensor], config: Mapping[str, Any], tokens: Tensor) -> Iterator[Block]:
    """CLIPTextModel at tokens (B, L): each layer, and the last one after the final LayerNorm, (B, L, D)."""
    w, heads, eps, length = Weights(tensors), config["num_attention_heads"], config["layer_norm_eps"], tokens.shape[1]
    name = "text_model.embeddings"
    h = w.embedding(f"{name}.token_embedding", tokens) + w.embedding(f"{name}.position_embedding", torch.arange(length))
    causal = torch.full((length, length), float("-inf")).triu(1)
    for n in range(config["num_hidden_layers"]):
        name = f"text_model.encoder.layers.{n}"
        x = w.layer_norm(f"{name}.layer_norm1", h, eps)
        parts = (w.linear(f"{name}.self_attn.{part}_proj", x) for part in ("q", "k", "v"))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + causal).softmax(dim=-1)
        h = h + w.linear(f"{name}.self_attn.out_proj", (scores @ v).transpose(1, 2).flatten(2))
        x = w.linear(f"{name}.mlp.fc1", w.layer_norm(f"{name}.layer_norm2", h, eps))
        x = x * torch.sigmoid(1.702 * x) if config["hidden_act"] == "quick_gelu" else F.gelu(x)
        h = h + w.linear(f"{name}.mlp.fc2", x)
        yield Block(name, h)
    yield Block("text_model.final_layer_norm", w.layer_norm("text_model.final_layer_norm", h, eps))
