"""Token merging: similar tokens share their self-attention."""

import copy

import pytest
import torch

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.token_merging import match_tokens, partition, token_merging
from tests.reference import rel_error, seed_weights


def tokens(height=6, width=8, seed=0):
    return torch.randn(2, height * width, 16, generator=torch.Generator().manual_seed(seed))


def match_of(x, ratio, height=6, width=8):
    return match_tokens(x, *partition(height, width, torch.Generator().manual_seed(1)), ratio)


@pytest.mark.parametrize("height, width", [(4, 6), (5, 7), (2, 2), (3, 2)])
def test_every_token_is_a_source_or_a_destination_and_each_2x2_has_one_destination(height, width):
    sources, destinations = partition(height, width, torch.Generator().manual_seed(0))
    assert sorted([*sources.tolist(), *destinations.tolist()]) == list(range(height * width))
    cells = [(place // width // 2, place % width // 2) for place in destinations.tolist()]
    assert cells == [(row, column) for row in range(height // 2) for column in range(width // 2)]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.75])
def test_merging_removes_the_ratio_of_the_tokens_and_unmerging_keeps_their_order_and_mean(ratio):
    x = tokens()
    match = match_of(x, ratio)
    merged = match.merge(x)
    back = match.unmerge(merged)
    assert merged.shape[1] == x.shape[1] - int(ratio * x.shape[1]) and back.shape == x.shape
    assert torch.allclose(back.mean(dim=1), x.mean(dim=1), atol=1e-6)
    changed = (back != x).any(dim=2).sum(dim=1)
    r = int(ratio * x.shape[1])
    assert (changed <= 2 * r).all() and (changed >= r).all()  # the merged ones, and at most as many destinations


def test_equal_tokens_are_merged_first_and_come_back_exactly():
    x = tokens()
    sources, destinations = partition(6, 8, torch.Generator().manual_seed(1))
    x[:, sources[:5]] = x[:, destinations[:5]]
    match = match_tokens(x, sources, destinations, 5 / 48)
    assert match.merged.sort().values.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert torch.allclose(match.unmerge(match.merge(x)), x, atol=1e-6)


def test_each_sample_has_its_own_match():
    x = tokens()
    both, alone = match_of(x, 0.5), match_of(x[1:], 0.5)
    assert torch.equal(both.merge(x)[1:], alone.merge(x[1:])) and not torch.equal(both.merged[0], both.merged[1])


@pytest.fixture(scope="module")
def unet():
    options = {"use_spatial_transformer": True, "context_dim": 8, "legacy": False}
    net = UNetModel(8, 4, 32, 4, 1, [1, 2], channel_mult=[1, 1], num_heads=2, **options)
    return seed_weights(net).eval().requires_grad_(False)


X, T, CONTEXT = (
    torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)),
    torch.tensor([9, 9]),
    torch.ones(2, 3, 8),
)


def test_zero_is_the_full_network_and_more_changes_more(unet):
    full, errors = unet(X, T, CONTEXT), []
    for ratio in (0.0, 0.25, 0.75):
        with token_merging(unet, ratio):
            errors.append(rel_error(unet(X, T, CONTEXT), full))
    assert errors[0] == 0.0 < errors[1] < errors[2] < 0.5


def test_the_finest_level_alone_is_merged(unet):
    lengths = []
    attentions = [m for name, m in unet.named_modules() if name.endswith("attn1")]
    with token_merging(unet, 0.5):  # after the hooks that merge
        hooks = [m.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1])) for m in attentions]
        unet(X, T, CONTEXT)
    for hook in hooks:
        hook.remove()
    assert lengths == [32, 16, 16, 16, 16, 32, 32]


def test_a_run_repeats_itself_and_leaves_the_random_numbers_and_the_network_as_they_were(unet):
    state, full = torch.get_rng_state(), unet(X, T, CONTEXT)
    runs = []
    for _ in range(2):
        with token_merging(unet, 0.5):
            runs.append(torch.stack([unet(X, T, CONTEXT), unet(X, T, CONTEXT)]))
    assert torch.equal(*runs) and not torch.equal(runs[0][0], runs[0][1])  # each call has partitions of its own
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(unet(X, T, CONTEXT), full)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in unet.modules())


def test_a_network_without_self_attention_in_transformers_is_refused():
    plain = UNetModel(8, 4, 32, 4, 1, [1], channel_mult=[1], num_heads=2)
    problem = "token merging: UNetModel has no spatial transformer with self-attention"
    with pytest.raises(ValueError, match=problem), token_merging(plain, 0.5):
        pass


def test_a_compiled_network_is_refused(unet):  # it would ignore the hooks
    network = copy.deepcopy(unet)
    network.compile(backend="eager")
    with pytest.raises(ValueError, match="not supported by a compiled network"), token_merging(network, 0.5):
        pass
