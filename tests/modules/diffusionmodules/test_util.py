"""Small layers: float32 norms, checkpointing, timestep embedding, n-dimensional convolutions."""

import copy
import math

import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules import schedule
from ldm.modules.diffusionmodules import util as U
from tests.reference import randn, rel_error, seed_weights


def test_published_names_can_be_imported():
    for name in (
        "make_beta_schedule",
        "make_ddim_timesteps",
        "make_ddim_sampling_parameters",
        "extract_into_tensor",
        "noise_like",
    ):
        assert getattr(U, name) is getattr(schedule, name)
    torch.testing.assert_close(U.mean_flat(randn(1, 2, 3, 4)), randn(1, 2, 3, 4).flatten(1).mean(1))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_follow_dims(dims):
    x = randn(1, 2, 4, *[6] * dims)
    assert U.conv_nd(dims, 4, 5, 3, padding=1)(x).shape == (2, 5, *[6] * dims)
    assert U.avg_pool_nd(dims, kernel_size=2, stride=2)(x).shape == (2, 4, *[3] * dims)


def test_other_dims_are_errors():
    for make in (U.conv_nd, U.avg_pool_nd):
        with pytest.raises(ValueError, match="dims=4: expected one of 1, 2, 3"):
            make(4, 1, 1, 1)


def test_unet_norm_has_the_large_eps():
    assert U.normalization(64).eps == 1e-5 and U.normalization(64).num_groups == 32


def test_channels_that_norm_cannot_split_are_errors():
    with pytest.raises(ValueError, match="48 channels"):
        U.normalization(48)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_16_bit_inputs_is_the_float32_one_rounded_once(dtype):
    norm, x = (
        seed_weights(U.normalization(32)),
        (100 + randn(1, 2, 32, 8, 8)).to(dtype),
    )  # a mean that 16-bit sums would drown in
    assert torch.equal(norm(x), norm(x.float()).to(dtype))
    rounded = copy.deepcopy(norm).to(dtype)
    assert rounded(x).dtype == dtype and rel_error(rounded(x).float(), norm(x.float())) < 0.01


def test_norm_takes_float32_inputs_with_16_bit_weights():
    norm, x = U.normalization(32), randn(1, 2, 32, 8, 8)
    reference = norm(x).detach()
    out = norm.to(torch.bfloat16)(x)
    assert out.dtype == torch.float32 and rel_error(out, reference) < 1e-6


def test_module_is_scaled_and_zeroed_in_place():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    assert U.scale_module(layer, 0.5) is layer and torch.equal(layer.weight, before * 0.5)
    assert U.zero_module(layer) is layer and not any(p.any() for p in layer.parameters())
    assert layer.weight.requires_grad


def test_timestep_embedding_has_cosines_first():
    t = torch.tensor([0, 3, 999])
    emb = U.timestep_embedding(t, 8)
    for i in range(4):
        frequency = math.exp(-math.log(10000) * i / 4)  # the divisor is half of dim, not half - 1
        torch.testing.assert_close(emb[:, i], torch.cos(t * frequency))
        torch.testing.assert_close(emb[:, 4 + i], torch.sin(t * frequency))


def test_timestep_embedding_of_odd_width_ends_in_zero():
    emb = U.timestep_embedding(torch.tensor([5, 7]), 9)
    assert emb.shape == (2, 9) and not emb[:, -1].any()
    assert torch.equal(emb[:, :-1], U.timestep_embedding(torch.tensor([5, 7]), 8))


def test_fractional_timesteps_are_not_rounded():
    emb = U.timestep_embedding(torch.tensor([10.0, 10.5]), 8)
    assert emb.dtype == torch.float32 and not torch.equal(emb[0], emb[1])


def test_timestep_may_be_repeated_instead():
    assert U.timestep_embedding(torch.tensor([3, 4]), 3, repeat_only=True).tolist() == [[3, 3, 3], [4, 4, 4]]


def test_checkpoint_works_with_frozen_weights_and_plain_inputs():
    frozen, live, x = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4), randn(1, 2, 4)  # x needs no gradient
    gradients = []
    for flag in (False, True):
        live.zero_grad()
        U.checkpoint(lambda x: live(frozen(x).tanh()), (x,), live.parameters(), flag).sum().backward()
        gradients.append(live.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].any() and frozen.weight.grad is None


@pytest.mark.parametrize("flag, calls", [(False, 1), (True, 2)])
def test_checkpoint_computes_again_only_where_it_is_asked_to(flag, calls):
    count = []

    def f(x):
        count.append(1)
        return (x * x).sin()

    U.checkpoint(f, (randn(1, 3).requires_grad_(),), (), flag).sum().backward()
    assert len(count) == calls
    with torch.no_grad():
        U.checkpoint(f, (randn(1, 3),), (), flag)
    assert len(count) == calls + 1
