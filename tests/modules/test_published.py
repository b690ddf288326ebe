"""Parts of published modules for research code."""

import numpy as np
import torch

from ldm.modules import published
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock
from ldm.modules.diffusionmodules.util import make_beta_schedule
from tests.reference import randn


def test_qkv_attention_is_that_of_the_attention_block():
    qkv = randn(0, 2, 3 * 8, 5)
    legacy = published.QKVAttentionLegacy(2)(qkv)
    assert legacy.shape == (2, 8, 5)
    reordered = qkv.view(2, 2, 3, 4, 5).transpose(1, 2).reshape(2, 24, 5)  # (head, qkv, c) -> (qkv, head, c)
    assert torch.allclose(published.QKVAttention(2)(reordered), legacy, atol=1e-6)
    assert isinstance(AttentionBlock(32), torch.nn.Module)


def test_betas_of_the_cosine_function_are_the_cosine_schedule():
    betas = published.betas_for_alpha_bar(50, lambda t: np.cos((t + 8e-3) / (1 + 8e-3) * np.pi / 2) ** 2)
    assert np.allclose(betas, make_beta_schedule("cosine", 50))


def test_small_parts_do_what_their_names_say():
    x = randn(0, 1, 3, 4, 4)
    assert published.IdentityEncoder().encode(x) is x and published.DiracDistribution(x).sample() is x
    identity = {"target": "torch.nn.Identity"}
    both = published.HybridConditioner(identity, identity)(x, x)
    assert set(both) == {"c_concat", "c_crossattn"} and both["c_concat"][0] is x
    assert published.uniq([3, 1, 3]) == [3, 1] and published.max_neg_value(x) == torch.finfo(torch.float32).min
