"""The UNet's layers: residual branches start silent, resampling halves and doubles, both QKV orders are the same attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
)
from tests.reference import randn, rel_error, seed_weights


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
    with pytest.raises(ValueError, match="4 channels"):
        Upsample(4, True)(randn(1, 2, 5, 8, 8))


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


def test_residual_block_refuses_to_go_both_ways():
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
def test_heads_that_do_not_divide_the_channels_are_refused(options):
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


def test_attention_pool_refuses_another_size():
    with pytest.raises(ValueError, match="16 positions arrived, it was built for 9"):
        AttentionPool2d(3, 32, 8)(randn(1, 2, 32, 4, 4))
    with pytest.raises(ValueError, match="num_head_channels=7"):
        AttentionPool2d(3, 32, 7)


def test_sequence_hands_each_layer_what_it_takes():
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
