"""Token transformers: visibility of tokens, and attention against its formula."""

import pytest
import torch

from ldm.modules.x_transformer import Attention, Decoder, Encoder, TransformerWrapper
from tests.reference import randn, rel_error, seed_weights


def wrapper(layers: Encoder | Decoder, **options) -> TransformerWrapper:
    return seed_weights(TransformerWrapper(num_tokens=20, max_seq_len=6, attn_layers=layers, **options))


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def changed_by(model: TransformerWrapper, position: int, **inputs) -> list[bool]:
    """Which positions of the output change with the token at `position`."""
    ids = tokens()
    other = ids.clone()
    other[:, position] = (other[:, position] + 1) % 20
    before, after = (model(x, return_embeddings=True, **inputs) for x in (ids, other))
    return ((before - after).abs().amax((0, 2)) > 1e-6).tolist()


@torch.no_grad()
def test_attention_is_softmax_of_scaled_products():
    attention = seed_weights(Attention(8, heads=2, dim_head=4))
    x = randn(1, 2, 5, 8)
    q, k, v = (to(x).view(2, -1, 2, 4) for to in (attention.to_q, attention.to_k, attention.to_v))
    weights = (torch.einsum("blhd,bmhd->bhlm", q, k) * 4**-0.5).softmax(-1)
    expected = attention.to_out(torch.einsum("bhlm,bmhd->blhd", weights, v).reshape(2, 5, 8))
    assert rel_error(attention(x), expected) < 1e-6


def test_in_an_encoder_every_token_sees_every_other():
    assert all(changed_by(wrapper(Encoder(16, 2, heads=2, dim_head=8)), 4))


def test_in_a_decoder_a_token_is_visible_to_itself_and_later_ones():
    model = wrapper(Decoder(16, 2, heads=2, dim_head=8))
    assert changed_by(model, 3) == [False] * 3 + [True] * 3
    assert changed_by(model, 3, mask=torch.ones(2, 6, dtype=torch.bool)) == [False] * 3 + [True] * 3


def test_a_masked_token_is_visible_to_itself_only():
    mask = torch.tensor([[True] * 4 + [False] * 2]).expand(2, -1)
    changed = changed_by(wrapper(Encoder(16, 1, heads=2, dim_head=8)), 5, mask=mask)
    assert changed == [False] * 5 + [True]


def test_logits_are_optional():
    assert wrapper(Encoder(16, 1))(tokens()).shape == (2, 6, 20)
    model = wrapper(Encoder(16, 1), logits=False)
    assert model(tokens(), return_embeddings=True).shape == (2, 6, 16)
    with pytest.raises(ValueError, match="return_embeddings"):
        model(tokens())


def test_a_sequence_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="7 tokens per sequence: at most 6"):
        wrapper(Encoder(16, 1))(torch.zeros(1, 7, dtype=torch.int64))


def test_dropout_acts_in_training_only():
    model = wrapper(Encoder(16, 1, attn_dropout=0.5, ff_dropout=0.5), emb_dropout=0.5)
    assert torch.equal(model(tokens()), model(tokens()))
    model.train()
    assert not torch.equal(model(tokens()), model(tokens()))


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="rotary"):
        Encoder(16, 1, rotary=True)
    with pytest.raises(TypeError, match="causal"):
        Encoder(16, 1, causal=True)
