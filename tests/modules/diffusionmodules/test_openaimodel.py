"""The UNet: every option builds and runs, precision and layout follow weights and inputs, wrong inputs are refused in words."""

import copy
import json
import zlib

import pytest
import torch
from omegaconf import OmegaConf

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    EncoderUNetModel,
    TimestepEmbedSequential,
    UNetModel,
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
    # The second level has one block with attention on either side, the first none: its factor 1 is not among the resolutions.
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
def test_checkpointing_changes_no_gradient(options):
    gradients = []
    for flag in (False, True):
        model = unet(**options, use_checkpoint=flag).train()
        for p in model.input_blocks[1].parameters():
            p.requires_grad_(False)  # a frozen block in the middle
        torch.manual_seed(0)
        model(
            randn(1, 2, 4, 8, 8), T, randn(2, 2, 3, 12) if "context_dim" in options else None
        ).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


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
def test_other_sizes_are_refused_with_the_nearest(size, nearest):
    model = unet(channel_mult=[1, 1, 1], attention_resolutions=[])
    with pytest.raises(ValueError, match=rf"size {size[0]}x{size[1]}: .* multiples of 4; the nearest is {nearest}"):
        model(randn(1, 2, 4, *size), T)


X, CONTEXT = randn(1, 2, 4, 8, 8), randn(2, 2, 3, 12)


@pytest.mark.parametrize(
    "options, inputs, message",
    [
        ({}, {"x": X}, "timesteps of shape None"),
        ({}, {"x": X, "timesteps": torch.zeros(3)}, r"timesteps of shape \(3,\): expected one for each of the 2"),
        ({}, {"x": X, "timesteps": T, "y": T}, "without num_classes"),
        ({"num_classes": 5}, {"x": X, "timesteps": T}, "num_classes=5: class labels y"),
        ({"num_classes": 5}, {"x": X, "timesteps": T, "y": torch.tensor(3)}, r"expected \(2,\)"),
        ({}, {"x": X, "timesteps": T, "context": CONTEXT}, "without use_spatial_transformer"),
        (ATTEND, {"x": X, "timesteps": T}, r"context of shape \(2, L, 12\), which is missing"),
        (ATTEND, {"x": X, "timesteps": T, "context": CONTEXT[..., :6]}, r"\(2, 3, 6\): expected \(2, L, 12\)"),
        (ATTEND, {"x": X, "timesteps": T, "context": CONTEXT[:1]}, r"\(1, 3, 12\): expected \(2, L, 12\)"),
        ({}, {"x": X[:, :3], "timesteps": T}, r"takes \(B, 4, H, W\)"),
        ({}, {"x": X[0], "timesteps": T}, r"takes \(B, 4, H, W\)"),
    ],
)
def test_wrong_inputs_are_refused_in_words(options, inputs, message):
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
        ({"num_head_channels": 128}, "0 attention heads for 32 channels"),
    ],
)
def test_wrong_options_are_refused_in_words(options, message):
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
    h = h.relu() if pool == "spatial" else torch.nn.functional.silu(model.out[1](h))
    torch.testing.assert_close(out, model.out[-1](h))


def test_averaging_pools_take_any_size_and_attention_its_own():
    assert encoder(pool="adaptive")(randn(1, 2, 4, 7, 9), T).shape == (2, 10)
    with pytest.raises(ValueError, match="image_size"):
        encoder(pool="attention", num_head_channels=16)(randn(1, 2, 4, 16, 16), T)


@pytest.mark.parametrize(
    "options, message",
    [({"pool": "max"}, "expected one of adaptive, attention"), ({"pool": "attention"}, "needs num_head_channels")],
)
def test_wrong_pools_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        encoder(**options)


def test_golden_cases_hold_the_unets():
    cases = json.loads((GOLDEN / "modules" / "cases.json").read_text())
    assert sum(name.startswith(("unet_", "encoder_unet_")) for name in cases) == 7
