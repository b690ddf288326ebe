"""Attention layers: SDPA is the published formula; options of the transformer."""

import pytest
import torch

from ldm.modules.attention import (
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    LinearAttention,
    Normalize,
    SpatialSelfAttention,
    SpatialTransformer,
    attend,
)
from tests.reference import randn, rel_error, seed_weights


def softmax_formula(q, k, v, visible=None, lowest=None):
    """The published arithmetic: masked logits at the lowest finite value, softmax, weighted sum."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if visible is not None:
        logits = logits.masked_fill(~visible, lowest)
    return logits.softmax(dim=-1) @ v


def test_attention_is_the_softmax_formula():
    q, k, v = randn(1, 3, 2, 5, 8), randn(2, 3, 2, 7, 8), randn(3, 3, 2, 7, 8)
    assert rel_error(attend(q, k, v), softmax_formula(q, k, v)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_a_masked_logit_is_the_lowest_value_of_the_dtype(dtype, causal):
    """A masked key has no weight however low the visible logits; without a visible key all weigh the same."""
    # Multiples of 1/8 and a scale of 1/4: float32 has the logits exactly, in whatever order a kernel adds.
    q, k = ((randn(seed, 3, 2, 5, 16) * 8).round().to(dtype) / 8 for seed in (1, 2))
    v = randn(3, 3, 2, 5, 16).to(dtype)
    q[..., 0], k[..., 0] = 150.0, -300.0  # all logits are near -11,250
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True], [False] * 5])
    visible = mask[:, None, None, :] & torch.ones(5, 5, dtype=torch.bool).tril(0 if causal else 5)
    expected = softmax_formula(q.float(), k.float(), v.float(), visible, torch.finfo(dtype).min)
    out = attend(q, k, v, mask, causal=causal)
    assert out.dtype == dtype and rel_error(out.float(), expected) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_beyond_half_precision_stay_finite(dtype):
    q, k, v = (
        (100 * randn(1, 1, 2, 6, 64)).to(dtype),
        (100 * randn(2, 1, 2, 6, 64)).to(dtype),
        randn(3, 1, 2, 6, 64).to(dtype),
    )
    assert (q.float() @ k.float().transpose(-1, -2)).abs().max() > torch.finfo(torch.float16).max
    assert rel_error(attend(q, k, v).float(), softmax_formula(q.float(), k.float(), v.float())) < 0.02


def test_masked_keys_have_no_influence():
    layer, x, context = (
        seed_weights(CrossAttention(16, 12, heads=2, dim_head=8)),
        randn(1, 2, 5, 16),
        randn(2, 2, 6, 12),
    )
    mask = torch.tensor([[True, True, False, True, False, True]] * 2)
    changed = context.clone()
    changed[:, ~mask[0]] = 100.0
    torch.testing.assert_close(layer(x, context, mask), layer(x, changed, mask))
    torch.testing.assert_close(layer(x, context, mask), layer(x, context[:, mask[0]]))


def test_mask_may_keep_its_spatial_axes():
    layer, x, mask = seed_weights(CrossAttention(16, heads=2, dim_head=8)), randn(1, 2, 6, 16), randn(3, 2, 2, 3) > 0
    torch.testing.assert_close(layer(x, mask=mask), layer(x, mask=mask.flatten(1)))


@pytest.mark.parametrize("mask", [torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6)])
def test_a_mask_that_does_not_fit_is_an_error(mask):
    with pytest.raises(ValueError, match=r"attention mask .* \(2, 6\)"):
        CrossAttention(16, heads=2, dim_head=8)(randn(1, 2, 6, 16), mask=mask)


def test_without_context_attention_is_on_itself():
    layer, x = seed_weights(CrossAttention(16, heads=2, dim_head=8)), randn(1, 2, 5, 16)
    assert torch.equal(layer(x), layer(x, context=x))


def test_norms_of_spatial_layers_have_the_small_eps():
    assert Normalize(64).eps == 1e-6
    assert SpatialTransformer(64, 2, 8).norm.eps == SpatialSelfAttention(64).norm.eps == 1e-6


def test_spatial_transformer_starts_as_identity():
    x = randn(1, 2, 32, 4, 6)
    for use_linear in (False, True):
        assert torch.equal(SpatialTransformer(32, 2, 16, context_dim=8, use_linear=use_linear)(x, randn(2, 2, 3, 8)), x)


def test_linear_projections_equal_convolutions():
    conv, linear = (seed_weights(SpatialTransformer(32, 2, 24, context_dim=8, use_linear=u)) for u in (False, True))
    state = conv.state_dict()
    for name in ("proj_in.weight", "proj_out.weight"):
        state[name] = state[name][:, :, 0, 0]
    linear.load_state_dict(state)
    x, context = randn(1, 2, 32, 4, 6), randn(2, 2, 3, 8)
    torch.testing.assert_close(conv(x, context), linear(x, context))


def test_each_block_may_have_its_own_context():
    layer = seed_weights(SpatialTransformer(32, 2, 16, depth=2, context_dim=[8, 12]))
    x, first, second = randn(1, 2, 32, 4, 4), randn(2, 2, 3, 8), randn(3, 2, 5, 12)
    assert layer(x, [first, second]).shape == x.shape
    shared = seed_weights(SpatialTransformer(32, 2, 16, depth=2, context_dim=8))
    assert torch.equal(shared(x, first), shared(x, [first, first]))
    assert torch.equal(shared(x, first), shared(x, [first]))


def test_wrong_numbers_of_contexts_are_errors():
    with pytest.raises(ValueError, match=r"context_dim: 3 values for 2"):
        SpatialTransformer(32, 2, 16, depth=2, context_dim=[8, 8, 8])
    with pytest.raises(ValueError, match="context: 3 values for 2"):
        SpatialTransformer(32, 2, 16, depth=2, context_dim=8)(randn(1, 1, 32, 4, 4), [randn(2, 1, 3, 8)] * 3)


def test_disabled_self_attention_turns_to_the_context():
    plain, disabled = (
        BasicTransformerBlock(16, 2, 8, context_dim=6),
        BasicTransformerBlock(16, 2, 8, context_dim=6, disable_self_attn=True),
    )
    assert plain.attn1.to_k.in_features == 16 and disabled.attn1.to_k.in_features == 6
    torch.nn.init.zeros_(disabled.attn2.to_out[0].weight)  # what is left of the context's influence goes through attn1
    x = randn(1, 2, 5, 16)
    assert not torch.equal(disabled(x, randn(2, 2, 3, 6)), disabled(x, randn(3, 2, 3, 6)))


@pytest.mark.parametrize("glu, names", [(True, "net.0.proj"), (False, "net.0.0")])
def test_feed_forward_is_four_times_as_wide(glu, names):
    net = FeedForward(8, dim_out=6, glu=glu)
    assert net(randn(1, 2, 3, 8)).shape == (2, 3, 6)
    assert dict(net.named_modules())[names].out_features == (64 if glu else 32)


def test_linear_attention_is_its_formula():
    layer, x = seed_weights(LinearAttention(16, heads=2, dim_head=4)), randn(1, 2, 16, 3, 5)
    q, k, v = layer.to_qkv(x).view(2, 3, 2, 4, 15).unbind(1)
    out = torch.einsum("bhdm,bhem,bhdn->bhen", k.softmax(-1), v, q).reshape(2, 8, 3, 5)
    torch.testing.assert_close(layer(x), layer.to_out(out))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_format_of_the_input_is_kept(memory_format):
    x = randn(1, 2, 32, 4, 6).contiguous(memory_format=memory_format)
    for layer in (SpatialTransformer(32, 2, 16), SpatialSelfAttention(32)):
        assert layer.to(memory_format=memory_format)(x).is_contiguous(memory_format=memory_format)


def test_checkpointing_changes_no_gradient():
    x, context, gradients = randn(1, 2, 5, 16), randn(2, 2, 3, 6), []
    for flag in (False, True):
        block = seed_weights(BasicTransformerBlock(16, 2, 8, dropout=0.5, context_dim=6, checkpoint=flag)).train()
        torch.manual_seed(0)  # the same dropout again
        block(x, context).square().sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
