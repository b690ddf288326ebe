"""First-stage networks. tests/golden/modules: figures of the published implementation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.modules.diffusionmodules.model import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    LinAttnBlock,
    Model,
    Normalize,
    ResnetBlock,
    Upsample,
    get_timestep_embedding,
    make_attn,
    silu_of_norm,
)
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error, seed_weights

DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 4],
    "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
}  # fmt: skip
TINY = {**DDCONFIG, "resolution": 16, "ch_mult": [1, 1], "attn_resolutions": []}
UNET = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 16,
}


@pytest.mark.parametrize(
    ("name", "network", "options", "inputs", "kwargs"),
    [
        ("encoder_kl", Encoder, DDCONFIG, (9, 2, 3, 32, 32), {}),
        ("decoder_kl", Decoder, DDCONFIG, (10, 2, 4, 8, 8), {}),
        (
            "encoder_attn_none",
            Encoder,
            {**DDCONFIG, "double_z": False, "z_channels": 3, "attn_resolutions": [], "attn_type": "none"},
            (11, 1, 3, 32, 32),
            {},
        ),
        ("ddpm_model_unet", Model, UNET, (12, 2, 3, 16, 16), {"t": torch.tensor([5, 600])}),
    ],
)
@torch.no_grad()
def test_networks_agree_with_the_published_figures(name, network, options, inputs, kwargs):
    out = seed_weights(network(**options))(randn(*inputs), **kwargs)
    assert rel_error(out, np.load(GOLDEN / f"modules/{name}.npz")["out0"]) < TOLERANCE


def test_timestep_embedding_is_sines_then_cosines_with_frequencies_from_1_to_1e_4():
    t = torch.tensor([0, 1, 500])
    embedding = get_timestep_embedding(t, 9)
    frequencies = torch.tensor([1e4 ** (-i / 3) for i in range(4)])
    assert embedding.shape == (3, 9) and embedding.dtype == torch.float32
    torch.testing.assert_close(embedding[:, :4], torch.sin(t[:, None] * frequencies), atol=1e-4, rtol=0)
    torch.testing.assert_close(embedding[:, 4:8], torch.cos(t[:, None] * frequencies), atol=1e-4, rtol=0)
    assert (embedding[:, 8] == 0).all()


def test_timestep_embedding_of_wrong_shapes_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(B,\)"):
        get_timestep_embedding(torch.zeros(2, 1), 8)
    with pytest.raises(ValueError, match="embedding_dim=2"):
        get_timestep_embedding(torch.zeros(2), 2)


def test_downsampling_pads_right_and_bottom_only():
    down = Downsample(1, with_conv=True)
    with torch.no_grad():
        down.conv.weight.fill_(1.0)
        down.conv.bias.zero_()
        out = down(torch.ones(1, 1, 4, 4))[0, 0]
    assert out.tolist() == [[9.0, 6.0], [6.0, 4.0]]


def test_resampling_without_convolution_is_mean_and_nearest():
    x = randn(1, 1, 2, 4, 4)
    torch.testing.assert_close(Downsample(2, with_conv=False)(x), F.avg_pool2d(x, 2))
    assert torch.equal(Upsample(2, with_conv=False)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@torch.no_grad()
def test_attention_is_softmax_over_all_positions_plus_its_input():
    block = seed_weights(AttnBlock(32))
    x = randn(2, 2, 32, 4, 3)
    h = block.norm(x)
    q, k, v = (f(h).flatten(2) for f in (block.q, block.k, block.v))  # (B, C, N)
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(32), dim=-1)
    expected = x + block.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))
    assert rel_error(block(x), expected) < 1e-5


def test_attention_types():
    assert isinstance(make_attn(32), AttnBlock) and isinstance(make_attn(32, "vanilla-xformers"), AttnBlock)
    assert isinstance(make_attn(32, "linear"), LinAttnBlock)
    x = randn(3, 1, 32, 4, 4)
    assert torch.equal(make_attn(32, "none")(x), x)
    assert make_attn(32, "linear")(x).shape == x.shape
    with pytest.raises(ValueError, match=r"'linaer'.*vanilla, vanilla-xformers, linear, none"):
        make_attn(32, "linaer")


def test_use_linear_attn_replaces_every_attention():
    encoder = Encoder(**DDCONFIG, use_linear_attn=True)
    assert isinstance(encoder.mid.attn_1, LinAttnBlock) and isinstance(encoder.down[2].attn[0], LinAttnBlock)


def test_norms_have_the_first_stages_eps():
    norms = [m for m in Encoder(**TINY).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms and all(norm.eps == 1e-6 for norm in norms)


@pytest.mark.parametrize("half", [Encoder, Decoder])
def test_every_norm_has_the_number_of_groups_asked_for(half):
    network = half(**{**DDCONFIG, "ch": 16}, norm_num_groups=4)
    groups = [module.num_groups for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert len(groups) > 5 and set(groups) == {4}


@torch.no_grad()
def test_decoder_options_stop_before_the_last_norm_or_bound_the_output():
    z = 5 * randn(4, 1, 4, 8, 8)
    plain, early, bounded = (
        seed_weights(Decoder(**TINY, **options)) for options in ({}, {"give_pre_end": True}, {"tanh_out": True})
    )
    assert early(z).shape == (1, 32, 16, 16)
    torch.testing.assert_close(bounded(z), torch.tanh(plain(z)))


@torch.no_grad()
def test_decoder_takes_other_sizes_than_its_resolution():
    assert seed_weights(Decoder(**TINY))(randn(5, 1, 4, 6, 10)).shape == (1, 3, 12, 20)


def test_every_parameter_of_the_unet_gets_a_gradient():
    model = seed_weights(Model(**{**UNET, "in_channels": 5}))
    model(randn(6, 1, 3, 16, 16), torch.tensor([3]), context=randn(7, 1, 2, 16, 16)).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias of the keys moves all scores of a query alike, which softmax ignores.
    assert [name for name in silent if not name.endswith(".k.bias")] == []


def test_unet_built_for_time_needs_it():
    with pytest.raises(ValueError, match="use_timestep"):
        Model(**UNET)(randn(8, 1, 3, 16, 16))


def test_wrong_sizes_are_errors_when_building():
    with pytest.raises(ValueError, match=r"resolution=30.*multiple of 4"):
        Encoder(**{**DDCONFIG, "resolution": 30})
    with pytest.raises(ValueError, match="48 channels are not a multiple of 32"):
        Normalize(48)


def test_levels_may_have_no_residual_block():
    options = {**TINY, "num_res_blocks": 0}
    encoder, decoder = Encoder(**options), Decoder(**options)
    assert [len(level.block) for level in encoder.down] == [0, 0]
    assert [len(level.block) for level in decoder.up] == [1, 1]
    assert decoder(encoder(randn(1, 1, 3, 16, 16))[:, :4]).shape == (1, 3, 16, 16)


def test_networks_build_without_memory():
    with torch.device("meta"):
        networks = [Encoder(**DDCONFIG), Decoder(**DDCONFIG), Model(**UNET)]
    assert all(p.is_meta for network in networks for p in network.parameters())


def test_residual_block_shortcuts():
    x = randn(9, 1, 32, 4, 4)
    narrow = seed_weights(ResnetBlock(in_channels=32, out_channels=64, dropout=0.0, temb_channels=0))
    wide = seed_weights(ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=True, dropout=0.0, temb_channels=0))
    assert narrow.nin_shortcut.kernel_size == (1, 1) and wide.conv_shortcut.kernel_size == (3, 3)
    assert narrow(x).shape == wide(x).shape == (1, 64, 4, 4)


def test_levels_of_other_widths_need_residual_blocks():
    Encoder(**{**TINY, "num_res_blocks": 0})
    with pytest.raises(ValueError, match=r"num_res_blocks 0 with ch_mult \[1, 2\]: only residual blocks change"):
        Encoder(**{**TINY, "num_res_blocks": 0, "ch_mult": [1, 2]})
    with pytest.raises(ValueError, match=r"ch_mult \[\]: expected at least one level"):
        Decoder(**{**TINY, "ch_mult": []})


@pytest.mark.parametrize("network", [Encoder, Decoder, Model])
def test_checkpointing_changes_no_gradient_and_stores_less(network):
    options = UNET if network is Model else {**DDCONFIG, "dropout": 0.2}
    inputs = {Encoder: (randn(1, 1, 3, 32, 32),), Decoder: (randn(1, 1, 4, 8, 8),)}
    inputs[Model] = (randn(1, 1, 3, 16, 16), torch.tensor([3]))
    gradients, stored = [], []
    for flag in (False, True):
        model, kept = seed_weights(network(**options, use_checkpoint=flag)).train(), []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            loss = model(*inputs[network]).square().mean()
        stored.append(sum(kept))
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert stored[1] < 0.7 * stored[0]


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_may_keep_the_output_of_a_norm(everywhere, monkeypatch):
    block, kept = seed_weights(ResnetBlock(in_channels=32, out_channels=32, dropout=0.0, temb_channels=0)), []

    def keep(layer, args, out):
        if isinstance(layer, torch.nn.GroupNorm):
            kept.append((out, out.clone()))

    if everywhere:
        monkeypatch.setitem(torch.nn.modules.module._global_forward_hooks, -1, keep)
    else:
        block.norm1.register_forward_hook(keep)
        block.norm2.register_forward_hook(keep)
    with torch.no_grad():
        block(randn(1, 1, 32, 4, 4))
    assert len(kept) == 2 and all(torch.equal(out, copy) for out, copy in kept)


def test_a_block_without_norms_has_one_output_with_and_without_gradients():
    block, x = (
        seed_weights(ResnetBlock(in_channels=32, out_channels=32, dropout=0.0, temb_channels=0)),
        randn(1, 1, 32, 4, 4),
    )
    block.norm1 = block.norm2 = torch.nn.Identity()
    expected, before = block(x), x.clone()
    with torch.no_grad():
        assert torch.equal(block(x), expected) and torch.equal(x, before)


def test_a_map_of_an_unchanged_norm_is_not_copied_by_the_activation():
    norm, outputs, plain = Normalize(32), [], F.silu
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "silu", lambda h, inplace=False: outputs.append((h, plain(h, inplace))) or outputs[-1][1])
        silu_of_norm(norm, randn(1, 1, 32, 4, 4))
    assert outputs[0][0] is outputs[0][1]
