"""DeepCache: the deep blocks of the UNet in some calls only."""

import copy

import pytest
import torch

from ldm.models.diffusion.deep_cache import deep_cache
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.reference import seed_weights

T = torch.tensor([500, 500])


@pytest.fixture(scope="module")
def unet():
    return seed_weights(UNetModel(8, 4, 32, 4, 1, [1], channel_mult=[1, 1], num_heads=2)).eval().requires_grad_(False)


def latent(seed, batch=2):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_nth_call_is_the_full_network_and_the_others_reuse_its_deep_features(unet, depth):
    full = [unet(latent(seed), T) for seed in range(7)]
    with deep_cache(unet, 3, depth):
        cached = [unet(latent(seed), T) for seed in range(7)]
        again = unet(latent(6), T)  # the same input as the last full call
    assert [torch.equal(a, b) for a, b in zip(full, cached)] == [seed % 3 == 0 for seed in range(7)]
    assert torch.isfinite(torch.stack(cached)).all() and torch.equal(again, full[6])


def test_one_is_the_full_network(unet):
    full = [unet(latent(seed), T) for seed in range(3)]
    with deep_cache(unet, 1):
        assert all(torch.equal(unet(latent(seed), T), out) for seed, out in enumerate(full))


def test_cached_calls_run_the_outer_blocks_alone(unet):
    seen = []
    hooks = [block.register_forward_hook(lambda *_, n=n: seen.append(n)) for n, block in unet.named_children()]
    blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    hooks += [block.register_forward_hook(lambda *_, n=n: seen.append(n)) for n, block in enumerate(blocks)]
    with deep_cache(unet, 2):
        unet(latent(0), T)
        seen.clear()
        unet(latent(1), T)
    for hook in hooks:
        hook.remove()
    assert seen == ["time_embed", 0, len(blocks) - 1, "out"]


def test_another_batch_size_runs_the_full_network(unet):
    x = latent(1, 4)
    full = unet(x, T.repeat(2))
    with deep_cache(unet, 5):
        unet(latent(0), T)
        assert torch.equal(unet(x, T.repeat(2)), full)  # as where guidance begins or ends within a run


def test_the_network_is_unchanged_after_the_context_and_after_an_error_in_it(unet):
    before, full = dict(vars(unet)), unet(latent(1), T)
    with pytest.raises(ZeroDivisionError), deep_cache(unet, 2):
        unet(latent(0), T)
        raise ZeroDivisionError
    assert vars(unet) == before and torch.equal(unet(latent(1), T), full)


def test_a_compiled_network_is_refused(unet):
    network = copy.deepcopy(unet)
    network.compile(backend="eager")
    with pytest.raises(ValueError, match="not supported by a compiled network"), deep_cache(network, 2):
        pass
