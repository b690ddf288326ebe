"""New tokens of text encoders: ids, vectors and their place in prompts."""

import pytest
import torch

from ldm.modules.adapters.token_embeddings import NewToken, initial_vectors
from ldm.modules.encoders.modules import CaptionEmbedder, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.tokenizers import VOCAB_SIZE, clip_tokenizer

CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODERS = {
    "clip": lambda: FrozenCLIPEmbedder(text_config=CLIP),
    "open_clip": lambda: FrozenOpenCLIPEmbedder(
        layer="penultimate", text_config={"width": 16, "heads": 2, "layers": 2, "embed_dim": 8}
    ),
    "captions": lambda: CaptionEmbedder(16, 1, heads=2, dim_head=8),
    "hashed captions": lambda: CaptionEmbedder(16, 1, vocab_rows=64, heads=2, dim_head=8),
}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    torch.manual_seed(1)
    return ENCODERS[request.param]().eval()


@torch.no_grad()
def test_a_token_with_the_embedding_of_a_word_encodes_as_the_word(encoder):
    word = encoder.encode(["a photo of a cat, small"])
    encoder.add_token(["<me>"], encoder.embed_words("cat"))
    torch.testing.assert_close(encoder.encode(["a photo of a <ME>, small"]), word, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_other_prompts_keep_every_bit(encoder):
    before = encoder.encode(["a photo of a cat", ""])
    encoder.add_token(["<me>"], torch.randn(3, 16))
    assert torch.equal(encoder.encode(["a photo of a cat", ""]), before)


@torch.no_grad()
def test_a_token_takes_the_place_of_as_many_tokens_as_it_has_vectors(encoder):
    encoder.add_token(["<me>"], encoder.embed_words("cat dog"))
    torch.testing.assert_close(encoder.encode(["a <me>"]), encoder.encode(["a cat dog"]), rtol=1e-6, atol=1e-6)


def test_gradients_reach_the_vectors_of_the_prompt_alone(encoder):
    encoder.requires_grad_(False)
    for name in ("<a>", "<b>"):
        encoder.add_token([name], torch.randn(2, 16))
    encoder.encode(["the <b>"]).square().sum().backward()
    a, b = encoder.token_embeddings.vectors
    assert not a.grad.any() and (b.grad != 0).any(dim=1).all()


def test_state_dict_keys_of_the_encoder_stay(encoder):
    before = list(encoder.state_dict())
    encoder.add_token(["<me>"], torch.zeros(1, 16))
    assert [key for key in encoder.state_dict() if not key.startswith("token_embeddings.")] == before


def test_another_width_is_refused_with_both(encoder):
    with pytest.raises(ValueError, match=r"'<me>': its vectors have width 1024, those of the text encoder 16;"):
        encoder.add_token(["<me>"], torch.zeros(1, 1024))


def test_more_vectors_than_a_prompt_has_tokens_are_refused(encoder):
    with pytest.raises(ValueError, match="76 vectors, but a prompt has room for 75 tokens"):
        encoder.add_token(["<me>"], torch.zeros(76, 16))


def ids(text, added):
    return clip_tokenizer().encode(text, added)


ADDED = {"<me>": [VOCAB_SIZE], "cat": [VOCAB_SIZE + 1, VOCAB_SIZE + 2], "<me>-2": [VOCAB_SIZE + 3], "my style": [7]}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a <me>, red", ["a", ADDED["<me>"], ", red"]),
        ("a<me>b", ["a", ADDED["<me>"], "b"]),
        ("A  CAT", ["a", ADDED["cat"]]),
        ("cats and a concatenation", ["cats and a concatenation"]),
        ("<me>-2 <me>", [ADDED["<me>-2"], ADDED["<me>"]]),
        ("in My\nStyle.", ["in", ADDED["my style"], "."]),
        ("a &lt;me&gt;", ["a", ADDED["<me>"]]),
        ("", []),
    ],
)
def test_names_are_found_in_clean_text_as_whole_words(text, pieces):
    expected = [i for piece in pieces for i in (ids(piece, {}) if isinstance(piece, str) else piece)]
    assert ids(text, ADDED) == expected


def test_truncated_text_names_added_tokens(caplog):
    encoder = CaptionEmbedder(16, 1, max_seq_len=6, heads=2, dim_head=8)
    encoder.add_token(["<me>"], torch.zeros(2, 16))
    encoder.warn_of_long_texts(["one two three four <me> five"])
    assert "truncated to 4 tokens; dropped: '<me> five'" in caplog.text


def test_two_tokens_of_one_name_are_refused():
    encoder = CaptionEmbedder(16, 1, heads=2, dim_head=8)
    encoder.add_token(["cat", "<cat>"], torch.zeros(1, 16))
    with pytest.raises(ValueError, match="token 'cat': two tokens have this name"):
        encoder.add_token(["Cat"], torch.zeros(1, 16))


def test_a_name_of_clip_itself_is_refused():
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>': this is a token of CLIP itself"):
        CaptionEmbedder(16, 1, heads=2, dim_head=8).add_token(["<|EndOfText|>"], torch.zeros(1, 16))


def test_initial_vectors_share_the_words():
    words = torch.arange(6.0)[:, None]
    assert initial_vectors(words[:1], 3).flatten().tolist() == [0, 0, 0]
    assert initial_vectors(words[:2], 4).flatten().tolist() == [0, 0, 1, 1]
    assert initial_vectors(words, 3).flatten().tolist() == [0.5, 2.5, 4.5]
    assert initial_vectors(words[:3], 2).flatten().tolist() == [0, 1.5]


def test_the_stem_of_a_token_is_a_file_name():
    stems = {"<me>": "me", "<my cat>": "my-cat", "../../x": "x", "<>": "token", "a/b": "a-b"}
    assert {token: NewToken(token, "x").stem for token in stems} == stems
