"""The UNet and its layers: every option builds and runs; dtype and layout follow weights and inputs."""

import copy
import functools
import json
import zlib

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from ldm.modules.attention import BasicTransformerBlock, ContextBlock, CrossAttention, SpatialTransformer
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    EncoderUNetModel,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    UNetModel,
    Upsample,
)
from ldm.modules.diffusionmodules.util import timestep_embedding
from tests.reference import GOLDEN, randn, rel_error, seed_weights

TINY = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 2,
}
ATTEND = {"use_spatial_transformer": True, "context_dim": 12, "legacy": False}
T = torch.tensor([3, 700])


def unet(**options) -> UNetModel:
    return seed_weights(UNetModel(**{**TINY, **options}))


def encoder(**options) -> EncoderUNetModel:
    return seed_weights(EncoderUNetModel(**{**TINY, "out_channels": 10, **options}))


@pytest.mark.parametrize("dims, size, half", [(1, (8,), (4,)), (2, (8, 6), (4, 3)), (3, (5, 8, 6), (5, 4, 3))])
@pytest.mark.parametrize("use_conv", [False, True])
def test_resampling_halves_and_doubles_all_but_the_depth_axis(dims, size, half, use_conv):
    x = randn(1, 2, 4, *size)
    small = Downsample(4, use_conv, dims)(x)
    assert small.shape == (2, 4, *half) and Upsample(4, use_conv, dims)(small).shape == x.shape


def test_resampling_without_convolution_is_average_and_nearest():
    x = randn(1, 2, 4, 8, 6)
    assert torch.equal(Downsample(4, False)(x), F.avg_pool2d(x, 2))
    assert torch.equal(Upsample(4, False)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_resampling_may_change_the_channels_by_its_convolution():
    assert Downsample(4, True, out_channels=6)(randn(1, 2, 4, 8, 8)).shape == (2, 6, 4, 4)
    with pytest.raises(ValueError, match="out_channels=6"):
        Downsample(4, False, out_channels=6)


@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True}, {"up": True}, {"down": True}])
def test_residual_block_starts_as_its_skip_connection(options):
    block, x = ResBlock(32, 16, dropout=0.0, **options), randn(1, 2, 32, 4, 4)
    skip = Upsample(32, False)(x) if "up" in options else Downsample(32, False)(x) if "down" in options else x
    assert torch.equal(block(x, randn(2, 2, 16)), skip)


@pytest.mark.parametrize("use_conv, kernel", [(False, 1), (True, 3)])
def test_skip_connection_is_a_convolution_where_channels_change(use_conv, kernel):
    block = ResBlock(32, 16, 0.0, out_channels=64, use_conv=use_conv)
    assert block.skip_connection.kernel_size == (kernel, kernel)
    assert block(randn(1, 2, 32, 4, 4), randn(2, 2, 16)).shape == (2, 64, 4, 4)
    assert isinstance(ResBlock(32, 16, 0.0, use_conv=use_conv).skip_connection, nn.Identity)


def test_residual_block_scales_and_shifts_by_the_embedding():
    block = seed_weights(ResBlock(32, 16, 0.0, use_scale_shift_norm=True))
    x, emb = randn(1, 2, 32, 4, 4), randn(2, 2, 16)
    scale, shift = block.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
    h = block.out_layers[0](block.in_layers(x)) * (1 + scale) + shift
    torch.testing.assert_close(block(x, emb), x + block.out_layers[1:](h))


def test_a_residual_block_samples_up_or_down_not_both():
    with pytest.raises(ValueError, match="exclude"):
        ResBlock(32, 16, 0.0, up=True, down=True)


def test_both_qkv_orders_are_one_attention():
    heads, x = 4, randn(1, 2, 64, 4, 4)
    legacy, new = (
        seed_weights(AttentionBlock(64, num_heads=heads, use_new_attention_order=order)) for order in (False, True)
    )
    assert rel_error(legacy(x), new(x).detach()) > 0.01
    with torch.no_grad():
        for p in (new.qkv.weight, new.qkv.bias):
            p.copy_(p.view(heads, 3, 16, -1).transpose(0, 1).reshape(p.shape))  # (head, qkv, c) -> (qkv, head, c)
    torch.testing.assert_close(legacy(x), new(x))


def test_attention_block_is_the_softmax_formula():
    block, x = seed_weights(AttentionBlock(64, num_head_channels=16)), randn(1, 2, 64, 4, 2)
    q, k, v = block.qkv(block.norm(x).flatten(2)).view(2 * 4, 3, 16, 8).unbind(1)
    weights = torch.einsum("bcn,bcm->bnm", q, k).div(16**0.5).softmax(-1)
    h = torch.einsum("bnm,bcm->bcn", weights, v).reshape(2, 64, 8)
    torch.testing.assert_close(block(x), x + block.proj_out(h).view(x.shape))


def test_attention_block_starts_as_identity():
    x = randn(1, 2, 32, 4, 4)
    assert torch.equal(AttentionBlock(32)(x), x)


@pytest.mark.parametrize(
    "options", [{"num_heads": 5}, {"num_head_channels": 24}, {"num_head_channels": 128}, {"num_heads": -1}]
)
def test_heads_that_do_not_divide_the_channels_are_errors(options):
    with pytest.raises(ValueError, match="64 channels cannot be split"):
        AttentionBlock(64, **options)


def test_attention_pool_reads_the_query_of_the_average():
    pool, x = seed_weights(AttentionPool2d(3, 32, 8, output_dim=5)), randn(1, 2, 32, 3, 3)
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.mean(-1, keepdim=True), tokens], -1) + pool.positional_embedding
    q, k, v = pool.qkv_proj(tokens).view(2, 3, 4, 8, 10).unbind(1)
    out = torch.einsum("bhm,bhcm->bhc", (torch.einsum("bhc,bhcm->bhm", q[..., 0], k) / 8**0.5).softmax(-1), v).reshape(
        2, 32, 1
    )
    torch.testing.assert_close(pool(x), pool.c_proj(out)[:, :, 0])


def test_attention_pool_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="got 16 positions, expected 9"):
        AttentionPool2d(3, 32, 8)(randn(1, 2, 32, 4, 4))
    with pytest.raises(ValueError, match="num_head_channels=7"):
        AttentionPool2d(3, 32, 7)


def test_a_sequence_passes_embedding_and_context_on():
    sequence = seed_weights(
        TimestepEmbedSequential(
            nn.Conv2d(4, 32, 1), ResBlock(32, 16, 0.0), SpatialTransformer(32, 2, 16, context_dim=8)
        )
    )
    x, emb, context = randn(1, 2, 4, 4, 4), randn(2, 2, 16), randn(3, 2, 3, 8)
    torch.testing.assert_close(sequence(x, emb, context), sequence[2](sequence[1](sequence[0](x), emb), context))


@pytest.mark.parametrize("flag, calls", [(False, 1), (True, 2)])
def test_only_checkpointed_layers_are_computed_again(flag, calls):
    x, emb, count = randn(1, 2, 32, 4, 4), randn(2, 2, 16), []
    res, attention = ResBlock(32, 16, 0.0, use_checkpoint=flag), AttentionBlock(32, use_checkpoint=flag)
    block = BasicTransformerBlock(32, 2, 16, checkpoint=flag)
    for first in (res.in_layers[0], attention.norm, block.norm1):
        first.register_forward_hook(lambda *_: count.append(1))
    for out in (res(x, emb), attention(x), block(x.flatten(2).transpose(1, 2))):
        count.clear()
        out.sum().backward()
        assert len(count) == calls - 1


class AddContext(ContextBlock):
    """Smallest layer of a user that takes context: its mean is added to every position."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, channels)

    def forward(self, x, context):
        return x + self.project(context.mean(dim=1))[:, :, None, None]


class AddBoth(TimestepBlock, AddContext):
    def forward(self, x, emb, context):
        return AddContext.forward(self, x, context) + emb.mean(dim=1)[:, None, None, None]


@pytest.mark.parametrize("options", [{}, ATTEND], ids=["plain", "attends"])
@pytest.mark.parametrize("layer", [AddContext, AddBoth])
def test_a_new_layer_gets_what_its_base_class_says(options, layer):
    model, x, context = unet(**options), randn(1, 2, 4, 8, 8), randn(2, 2, 3, 12)
    before = model(x, T, context if options else None)
    model.middle_block.append(seed_weights(layer(12, 64)))
    out = model(x, T, context)
    out.square().mean().backward()
    assert rel_error(out, before.detach()) > 1e-3 and model.middle_block[-1].project.weight.grad.any()
    assert not torch.equal(out, model(x, T, context + 1))


@torch.no_grad()
def test_a_control_is_added_between_encode_and_decode():
    """ControlNet, arXiv 2302.05543: residuals are added to the skip connections."""
    model, x, context = unet(**ATTEND), randn(1, 2, 4, 8, 8), randn(2, 2, 3, 12)
    emb, prepared = model.prepare(x, T, context)
    skips = model.encode(x, emb, prepared)
    h = model.middle(skips[-1], emb, prepared)
    shapes = [s.shape for s in skips]
    assert shapes == [(2, 32, 8, 8), (2, 32, 8, 8), (2, 32, 4, 4), (2, 64, 4, 4)] and h.shape == (2, 64, 4, 4)
    plain = model.out(model.decode(h, list(skips), emb, prepared))
    assert torch.equal(plain, model(x, T, context))
    controlled = model.out(model.decode(h, [s + 0.1 for s in skips], emb, prepared))
    assert controlled.shape == x.shape and rel_error(controlled, plain) > 1e-3


@torch.no_grad()
def test_deep_features_can_be_reused():
    """DeepCache, arXiv 2312.00858: only the outer blocks run again."""
    model, x = unet(), randn(1, 2, 4, 8, 8)
    emb, _ = model.prepare(x, T)
    skips = model.encode(x, emb)
    deep = model.decode(model.middle(skips[-1], emb), skips, emb, blocks=slice(-1))
    outer = model.encode(x, emb, blocks=slice(1))
    assert len(skips) == 1 and torch.equal(skips[0], outer[0])
    assert torch.equal(model.out(model.decode(deep, outer, emb, blocks=slice(-1, None))), model(x, T))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.1, "conv_resample": False, "use_checkpoint": True},
        {"resblock_updown": True, "use_scale_shift_norm": True},
        {"num_classes": 10, "use_new_attention_order": True, "num_heads_upsample": 4},
        {"num_heads": -1, "num_head_channels": 16},
        {"legacy": False, "n_embed": 17},
        {"num_res_blocks": [1, 2], "num_attention_blocks": [0, 1]},
        {"attention_resolutions": [], "out_channels": 8},
        {"channel_mult": [2], "attention_resolutions": [1]},
        ATTEND,
        {**ATTEND, "legacy": True, "num_head_channels": 24},
        {**ATTEND, "transformer_depth": 2, "use_linear_in_transformer": True, "use_checkpoint": True},
        {**ATTEND, "transformer_depth": 2, "context_dim": [12, 12]},
        {**ATTEND, "disable_self_attentions": [True, False], "disable_middle_self_attn": True, "num_classes": 10},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_every_option_builds_runs_and_trains(options):
    model = unet(**options).train()
    inputs = {"context": randn(2, 2, 3, 12)} if "context_dim" in options else {}
    if "num_classes" in options:
        inputs["y"] = torch.tensor([0, 9])
    out = model(randn(1, 2, 4, 8, 12), T, **inputs)
    assert out.shape == (2, options.get("n_embed") or options.get("out_channels") or 4, 8, 12) and out.isfinite().all()
    out.square().mean().backward()
    # Where ids are predicted the published model still holds the head for values.
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert all(name.startswith("out.") for name in without) and bool(without) == ("n_embed" in options)


@pytest.mark.parametrize("dims, size", [(1, (8,)), (3, (3, 8, 8))])
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_sequences_and_volumes_work(dims, size, resblock_updown):
    x = randn(1, 2, 4, *size)
    assert unet(dims=dims, resblock_updown=resblock_updown)(x, T).shape == x.shape


def test_fresh_model_predicts_zero():
    assert not UNetModel(**TINY)(randn(1, 2, 4, 8, 8), T).any()


@pytest.mark.parametrize(
    "channels, options, expected",
    [
        # (heads, channels per head) that the published constructor chooses
        (64, {"num_heads": 4}, (4, 16)),
        (64, {"num_heads": 4, "legacy": False}, (4, 16)),
        (64, {"num_heads": 8, "num_head_channels": 16}, (4, 16)),
        (64, {**ATTEND, "num_heads": 8}, (8, 8)),
        (64, {**ATTEND, "num_head_channels": 24}, (2, 24)),
        (64, {**ATTEND, "num_head_channels": 24, "legacy": True}, (2, 32)),
        (64, {**ATTEND, "num_heads": 1, "legacy": True}, (1, 64)),
    ],
)
def test_heads_are_chosen_as_published(channels, options, expected):
    layer = UNetModel(**{**TINY, **options}).middle_block[1]
    attention = layer.transformer_blocks[0].attn1 if isinstance(layer, SpatialTransformer) else layer
    width = attention.to_q.out_features if isinstance(layer, SpatialTransformer) else channels
    assert (attention.heads if hasattr(attention, "heads") else attention.num_heads, width // expected[0]) == expected


@pytest.mark.parametrize("legacy, heads", [(True, 4), (False, 2)])
def test_heads_of_the_expanding_half_are_its_own_only_under_legacy(legacy, heads):
    model = UNetModel(**{**TINY, "num_heads_upsample": 4, "legacy": legacy})
    blocks = [m for m in model.output_blocks.modules() if isinstance(m, AttentionBlock)]
    assert {block.num_heads for block in blocks} == {heads}
    assert model.input_blocks[1][1].num_heads == model.middle_block[1].num_heads == 2


def test_attention_is_where_its_options_put_it():
    model = UNetModel(
        **{**TINY, "num_res_blocks": 2, "attention_resolutions": [2], "num_attention_blocks": [2, 1], **ATTEND}
    )
    places = [name for name, m in model.named_modules() if isinstance(m, SpatialTransformer)]
    # One block of the second level, on either side; the first level's factor is not among the resolutions.
    assert places == ["input_blocks.4.1", "middle_block.1", "output_blocks.0.1"]


def test_self_attention_is_disabled_where_asked():
    options = {**TINY, **ATTEND, "disable_self_attentions": [True, False]}
    for middle in (False, True):
        model = UNetModel(**options, disable_middle_self_attn=middle)
        disabled = [name for name, m in model.named_modules() if getattr(m, "disable_self_attn", False)]
        level = ["input_blocks.1.1", "output_blocks.2.1", "output_blocks.3.1"]
        expected = [level[0], *(["middle_block.1"] if middle else []), *level[1:]]
        assert disabled == [f"{name}.transformer_blocks.0" for name in expected]


# Number of parameters, and CRC-32 of the sorted "name shape" lines, of the published models' `model.diffusion_model`.
PUBLISHED = {
    "configs/latent-diffusion/celebahq-ldm-vq-4.yaml": (
        {
            "model_channels": 224,
            "attention_resolutions": [8, 4, 2],
            "channel_mult": [1, 2, 3, 4],
            "num_head_channels": 32,
        },
        (3, 3, 274056163, 2457482995),
    ),
    "configs/latent-diffusion/cin256-v2.yaml": (
        {
            "model_channels": 192,
            "attention_resolutions": [8, 4, 2],
            "channel_mult": [1, 2, 3, 5],
            "num_heads": 1,
            "use_spatial_transformer": True,
            "context_dim": 512,
        },
        (3, 3, 400920579, 3486431368),
    ),
    "configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml": (
        {
            "model_channels": 192,
            "attention_resolutions": [1, 2, 4, 8],
            "channel_mult": [1, 2, 2, 4, 4],
            "num_heads": 8,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
        },
        (4, 4, 294966916, 964886599),
    ),
    "configs/retrieval-augmented-diffusion/768x768.yaml": (
        {
            "model_channels": 448,
            "attention_resolutions": [4, 2, 1],
            "channel_mult": [1, 2, 3, 4],
            "num_head_channels": 32,
            "use_spatial_transformer": True,
            "context_dim": 768,
        },
        (16, 16, 1335480400, 1565987860),
    ),
    "configs/stable-diffusion/v1-inference.yaml": (
        {
            "model_channels": 320,
            "attention_resolutions": [4, 2, 1],
            "channel_mult": [1, 2, 4, 4],
            "num_heads": 8,
            "use_spatial_transformer": True,
            "context_dim": 768,
            "use_checkpoint": True,
            "legacy": False,
        },
        (4, 4, 859520964, 3513246975),
    ),
    "models/ldm/layout2img-openimages256/config.yaml": (
        {
            "model_channels": 128,
            "attention_resolutions": [8, 4, 2],
            "channel_mult": [1, 2, 3, 4],
            "num_head_channels": 32,
            "use_spatial_transformer": True,
            "transformer_depth": 3,
            "context_dim": 512,
        },
        (3, 3, 246277379, 466361997),
    ),
    "models/ldm/semantic_synthesis256/config.yaml": (
        {"model_channels": 128, "attention_resolutions": [32, 16, 8], "channel_mult": [1, 4, 8], "num_heads": 8},
        (6, 3, 215229315, 1087077846),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name):
    options, (in_channels, out_channels, parameters, checksum) = PUBLISHED[name]
    with torch.device("meta"):
        model = UNetModel(
            image_size=32, in_channels=in_channels, out_channels=out_channels, num_res_blocks=2, **options
        )
    lines = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(model.state_dict().items()))
    assert (sum(p.numel() for p in model.parameters()), zlib.crc32(lines.encode())) == (parameters, checksum)


def test_list_of_context_widths_may_come_from_a_config():
    config = OmegaConf.create({**TINY, **ATTEND, "transformer_depth": 2, "context_dim": [12, 6]})
    model = seed_weights(UNetModel(**config))
    assert model(randn(1, 2, 4, 8, 8), T, context=[randn(2, 2, 3, 12), randn(3, 2, 5, 6)]).shape == (2, 4, 8, 8)
    assert type(model.context_dim) is list and type(model.channel_mult) is tuple


def test_expanding_half_can_be_driven_from_outside():
    """The loop that ControlNet's UNet runs over the published attributes."""
    assert unet(use_checkpoint=True).use_checkpoint and not unet().use_checkpoint
    model, x, context = unet(**ATTEND), randn(1, 2, 4, 8, 8), randn(2, 2, 3, 12)
    emb = model.time_embed(timestep_embedding(T, model.model_channels, repeat_only=False))
    h, skips = x.type(model.dtype), []
    for block in model.input_blocks:
        assert isinstance(block, TimestepEmbedSequential)
        h = block(h, emb, context)
        skips.append(h)
    h = model.middle_block(h, emb, context)
    for block in model.output_blocks:
        h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
    assert not skips
    torch.testing.assert_close(model.out(h), model(x, T, context))


@pytest.mark.parametrize(
    "options", [{}, {"transformer_depth": 2}, {"disable_self_attentions": [True, False]}, {"num_classes": 3}]
)
def test_a_context_of_a_multiple_of_the_batch_repeats_the_inputs(options):
    net, x, context = unet(**ATTEND, **options), randn(0, 2, 4, 8, 8), randn(1, 6, 5, 12)
    y = torch.tensor([0, 2]) if "num_classes" in options else None
    expected = net(x.repeat(3, 1, 1, 1), T.repeat(3), context, None if y is None else y.repeat(3))
    with torch.no_grad():
        assert rel_error(net(x, T, context, y), expected) < 1e-5
    assert net.repeats_inputs


def _hook(net, monkeypatch):
    net.middle_block[0].register_forward_hook(lambda *args: None)


def _replace_forward(net, monkeypatch):
    net.middle_block[1].transformer_blocks[0].attn1.forward = lambda x, context=None: x


def _replace_forward_of_the_class(net, monkeypatch):
    monkeypatch.setattr(BasicTransformerBlock, "_forward", lambda self, x, context=None: x)


def _wrap_forward_of_the_class(net, monkeypatch):
    original = CrossAttention.forward
    monkeypatch.setattr(CrossAttention, "forward", functools.wraps(original)(lambda self, *args: original(self, *args)))


def _wrap_forward_of_the_network(net, monkeypatch):
    original = UNetModel.forward
    monkeypatch.setattr(UNetModel, "forward", functools.wraps(original)(lambda self, *args: original(self, *args)))


def _hook_all(net, monkeypatch):
    monkeypatch.setitem(torch.nn.modules.module._global_forward_hooks, -1, lambda *args: None)


def _replace_call(net, monkeypatch):
    monkeypatch.setattr(CrossAttention, "__call__", lambda self, x, context=None: x, raising=False)


def _replace_layer(net, monkeypatch):
    class Other(SpatialTransformer):
        pass

    net.middle_block[1].__class__ = Other


CHANGES = [_hook, _hook_all, _replace_forward, _replace_forward_of_the_class, _replace_call, _replace_layer]
CHANGES += [_wrap_forward_of_the_class, _wrap_forward_of_the_network]


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_with_other_code_or_a_hook_does_not_repeat_its_inputs(change, monkeypatch):
    net = unet(**ATTEND)
    assert net.repeats_inputs
    change(net, monkeypatch)
    assert not net.repeats_inputs


@pytest.mark.parametrize("method", ["forward", "encode", "decode"])
def test_a_network_with_a_method_of_its_own_does_not_repeat_its_inputs(method):
    driven = type("Driven", (UNetModel,), {method: lambda self, *args, **kwargs: None})
    assert not driven(**TINY, **ATTEND).repeats_inputs


def test_a_network_without_context_does_not_repeat_its_inputs():
    assert not unet().repeats_inputs


def test_fractional_timesteps_are_not_rounded():
    model, x = unet(), randn(1, 2, 4, 8, 8)
    torch.testing.assert_close(model(x, T), model(x, T.float()))
    assert rel_error(model(x, T + 0.5), model(x, T).detach()) > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("how", ["bf16 weights", "fp16 blocks", "autocast", "half of everything"])
def test_16_bit_arithmetic_is_close_to_float32(how):
    model, x, context = unet(**ATTEND, num_classes=10), randn(1, 2, 4, 8, 8), randn(2, 2, 3, 12)
    inputs = {"context": context, "y": torch.tensor([1, 9])}
    reference = model(x, T, **inputs)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x, T, **inputs)
    elif how == "fp16 blocks":
        half = UNetModel(**TINY, **ATTEND, num_classes=10, use_fp16=True)
        half.load_state_dict(model.state_dict())
        assert (
            half.dtype == torch.float16 and half.out[2].weight.dtype == half.time_embed[0].weight.dtype == torch.float32
        )
        out = half.eval()(x, T, **inputs)
        half.convert_to_fp32()
        assert half.dtype == torch.float32
    else:
        model.to(torch.bfloat16)
        out = model(x.bfloat16() if how == "half of everything" else x, T, **inputs)
    assert out.dtype == (torch.bfloat16 if how == "half of everything" else torch.float32)  # that of the input
    assert rel_error(out.float(), reference) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, ATTEND, {"resblock_updown": True, "use_scale_shift_norm": True}])
def test_channels_last_gives_the_same_and_stays(options):
    model, x = unet(**options), randn(1, 2, 4, 8, 8)
    context = randn(2, 2, 3, 12) if options is ATTEND else None
    reference = model(x, T, context)
    assert reference.is_contiguous()
    layouts = []
    for block in (*model.input_blocks, model.middle_block, *model.output_blocks):
        block.register_forward_hook(
            lambda m, args, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    out = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), T, context)
    assert rel_error(out, reference) < 1e-5 and all(layouts) and out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{"dropout": 0.2}, {**ATTEND, "use_scale_shift_norm": True}])
def test_checkpointing_changes_no_gradient_and_stores_less(options):
    gradients, stored = [], {}
    for flag in (False, "residual", "attention", True):
        model, kept = unet(**options, use_checkpoint=flag).train(), []
        for p in model.input_blocks[1].parameters():
            p.requires_grad_(False)  # a frozen block in the middle
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            out = model(randn(1, 2, 4, 8, 8), T, randn(2, 2, 3, 12) if "context_dim" in options else None)
        stored[flag] = sum(kept)
        out.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], each[name]) for each in gradients[1:] for name in each)
    assert stored[True] < min(stored["residual"], stored["attention"])
    assert max(stored["residual"], stored["attention"]) < stored[False]


def test_model_can_be_copied_and_run_on_the_meta_device():
    with torch.device("meta"):
        model = UNetModel(**TINY, **ATTEND)
        out = copy.deepcopy(model)(torch.empty(2, 4, 8, 8), torch.zeros(2), torch.empty(2, 3, 12))
    assert out.shape == (2, 4, 8, 8) and out.device.type == "meta"


@pytest.mark.parametrize("levels, multiple", [([1], 1), ([1, 1], 2), ([1, 1, 1, 1], 8)])
def test_sizes_are_multiples_of_two_to_the_levels(levels, multiple):
    model = unet(channel_mult=levels, attention_resolutions=[])
    assert model.size_multiple == multiple
    assert model(randn(1, 1, 4, multiple, 3 * multiple), T[:1]).shape == (1, 4, multiple, 3 * multiple)


@pytest.mark.parametrize("size, nearest", [((8, 10), "8x8"), ((1, 30), "4x32"), ((9, 12), "8x12")])
def test_other_sizes_are_errors_that_name_the_nearest(size, nearest):
    model = unet(channel_mult=[1, 1, 1], attention_resolutions=[])
    with pytest.raises(ValueError, match=rf"size {size[0]}x{size[1]}: .* multiples of 4; the nearest is {nearest}"):
        model(randn(1, 2, 4, *size), T)


X, CONTEXT = randn(1, 2, 4, 8, 8), randn(2, 2, 3, 12)


@pytest.mark.parametrize(
    "options, inputs, message",
    [
        ({}, {"x": X}, "timesteps of shape None"),
        ({}, {"x": X, "timesteps": torch.zeros(3)}, r"timesteps of shape \(3,\): expected one for each of the 2"),
        ({}, {"x": X, "timesteps": T, "y": T}, "y are not supported: .* num_classes=None"),
        ({"num_classes": 5}, {"x": X, "timesteps": T}, "labels y are missing: .* num_classes=5"),
        ({"num_classes": 5}, {"x": X, "timesteps": T, "y": torch.tensor(3)}, r"expected \(2,\)"),
        (
            {},
            {"x": X, "timesteps": T, "context": CONTEXT},
            "context is not supported: .* without use_spatial_transformer",
        ),
        (ATTEND, {"x": X, "timesteps": T}, r"context is missing: .* \(2, L, 12\)"),
        (ATTEND, {"x": X, "timesteps": T, "context": CONTEXT[..., :6]}, r"\(2, 3, 6\): expected \(2, L, 12\)"),
        (ATTEND, {"x": X, "timesteps": T, "context": CONTEXT[:1]}, r"\(1, 3, 12\): expected \(2, L, 12\)"),
        ({}, {"x": X[:, :3], "timesteps": T}, r"takes \(B, 4, H, W\)"),
        ({}, {"x": X[0], "timesteps": T}, r"takes \(B, 4, H, W\)"),
    ],
)
def test_wrong_inputs_are_errors(options, inputs, message):
    with pytest.raises(ValueError, match=message):
        unet(**options)(**inputs)


def test_further_keywords_are_ignored():
    model = unet()
    assert torch.equal(model(X, T), model(X, timesteps=T, control=None))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": -1}, "both -1"),
        ({"use_spatial_transformer": True}, "context_dim=None"),
        ({"context_dim": 12}, "use_spatial_transformer=False"),
        ({**ATTEND, "dims": 3}, "dims must be 2"),
        ({"num_res_blocks": [1, 1, 1]}, "num_res_blocks=.* 3 values for the 2 levels"),
        ({"disable_middle_self_attn": True}, "options of spatial transformers"),
        ({"use_linear_in_transformer": True}, "options of spatial transformers"),
        ({**ATTEND, "disable_self_attentions": [True]}, "disable_self_attentions=.* 1 values"),
        ({"model_channels": 48}, "48 channels"),
        ({"num_heads": 5}, "cannot be split into heads"),
        ({"num_head_channels": 128}, ": 0 heads for 32 channels"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        UNetModel(**{**TINY, **options})


@pytest.mark.parametrize("pool", openaimodel.POOLS)
@pytest.mark.parametrize("options", [{}, {"resblock_updown": True, "use_fp16": True}])
def test_every_pool_gives_scores(pool, options):
    out = encoder(pool=pool, num_head_channels=16, **options)(X, T)
    assert out.shape == (2, 10) and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("pool", ["spatial", "spatial_v2"])
def test_spatial_pools_read_the_average_of_every_block(pool):
    model, averages = encoder(pool=pool), []
    for block in (*model.input_blocks, model.middle_block):
        block.register_forward_hook(lambda m, args, out: averages.append(out.mean(dim=(2, 3))))
    out = model(X, T)
    h = model.out[0](torch.cat(averages, dim=1))
    h = h.relu() if pool == "spatial" else F.silu(model.out[1](h))
    torch.testing.assert_close(out, model.out[-1](h))


def test_averaging_pools_take_any_size_and_attention_its_own():
    assert encoder(pool="adaptive")(randn(1, 2, 4, 7, 9), T).shape == (2, 10)
    with pytest.raises(ValueError, match="image_size"):
        encoder(pool="attention", num_head_channels=16)(randn(1, 2, 4, 16, 16), T)


@pytest.mark.parametrize(
    "options, message",
    [({"pool": "max"}, "expected one of adaptive, attention"), ({"pool": "attention"}, "needs num_head_channels")],
)
def test_wrong_pools_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        encoder(**options)


def test_golden_cases_hold_the_unets():
    cases = json.loads((GOLDEN / "modules" / "cases.json").read_text())
    assert sum(name.startswith(("unet_", "encoder_unet_")) for name in cases) == 7


def test_a_unet_needs_a_level():
    with pytest.raises(ValueError, match=r"channel_mult \[\]: expected at least one level"):
        unet(channel_mult=[])
