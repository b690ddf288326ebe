"""Emphasis and long prompts: how they are read, what they do to the embeddings, and that nothing changes where they are not used."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.config.model_info import model_info
from ldm.inference import Pipeline, load_model, text_to_image
from ldm.inference.emphasis import Part, parse_emphasis
from ldm.inference.prompt_weights import PromptEncoder, weighted
from ldm.inference.requests import TextToImageRequest
from ldm.modules.encoders.modules import CaptionEmbedder, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.tokenizers import clip_tokenizer
from tests.reference import seed_weights
from tests.tiny import save_text_model, text_model_config

CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LONG = "a red fox, a blue hat, a green tree, a yellow house, a black cat, a white dog, a brown bear, " * 4


@pytest.fixture(scope="module")
def clip() -> FrozenCLIPEmbedder:
    return seed_weights(FrozenCLIPEmbedder(text_config=CLIP)).eval()


class Echo(nn.Module):
    """An encoder that says each token's id, padded with 0 as OpenCLIP's."""

    max_length, pad_id = 7, 0

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[..., None].float()


# ------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "prompt, parts",
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("(red) [cat]", [("red", 1.1), (" ", 1.0), ("cat", 1 / 1.1)]),
        ("((red))", [("red", 1.21)]),
        ("(a (red:2) cat:0.5)", [("a ", 0.5), ("red", 1.0), (" cat", 0.5)]),
        ("[(red: 2 )]", [("red", 2 / 1.1)]),
        (r"\(red\) \[cat\] 1\:2 \\ \n", [(r"(red) [cat] 1:2 \ \n", 1.0)]),
        (r"(a \(b\:1.2\):1.5)", [("a (b:1.2)", 1.5)]),
        ("portrait: (a woman: sitting)", [("portrait: ", 1.0), ("a woman: sitting", 1.1)]),
        ("(a:b:0)", [("a:b", 0.0)]),
        ("[red:2]", [("red:2", 1 / 1.1)]),
        ("16:9 (猫:1.5)", [("16:9 ", 1.0), ("猫", 1.5)]),
    ],
)
def test_brackets_become_weights(prompt, parts):
    read = parse_emphasis(prompt)
    assert [part.text for part in read] == [text for text, _ in parts]
    assert [part.weight for part in read] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("a (red cat", r"\( at character 3 is never closed"),
        ("a [red (cat)", r"\[ at character 3 is never closed"),
        ("a red) cat", r"\) at character 6 closes no bracket"),
        ("(red]", r"\] at character 5 closes no bracket"),
        ("(red:)", "':' is not a weight from 0 to 10"),
        ("(red:1.2.3)", "':1.2.3' is not a weight"),
        ("(red:-1)", "':-1' is not a weight"),
        ("(red:11)", "':11' is not a weight"),
        ("(meet at 10:30)", "':30' is not a weight"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line_with_the_way_out(prompt, words):
    with pytest.raises(ValueError, match=f"--emphasis: .*{words}") as error:
        TextToImageRequest(prompt=["a cat", prompt], emphasis=True).checked(model_info(text_model_config()))
    assert repr(prompt) in str(error.value) and r"write (words:1.3), and \( \)" in str(error.value)


@pytest.mark.parametrize("seed", range(20))
def test_a_prompt_whose_signs_are_escaped_is_read_as_it_stands(seed):
    signs = "".join(np.random.default_rng(seed).choice(list("ab ()[]:\\1.2"), 20))
    escaped = "".join("\\" + sign if sign in "()[]:\\" else sign for sign in signs)
    assert parse_emphasis(escaped) == [Part(signs, 1.0)]


# ------------------------------------------------------------------------------ encoding


def test_without_weights_and_within_a_chunk_the_embeddings_are_the_published_ones(clip):
    prompts = ["a cat", "", "A (red) fox's\n hat", LONG]
    captions = CaptionEmbedder(16, 1, vocab_rows=64, heads=2, dim_head=8)
    open_clip = FrozenOpenCLIPEmbedder(layer="penultimate", text_config={"width": 16, "heads": 2, "layers": 2})
    for encoder in (clip, seed_weights(captions), seed_weights(open_clip).eval()):
        with torch.no_grad():
            published, same = encoder.encode(prompts), PromptEncoder(encoder)(prompts)
            one = PromptEncoder(encoder, emphasis=True, long_prompts=True)(["a [(cat:1.1)] (on:1.0) \\(a mat\\)"])
            plain = encoder.encode(["a cat on (a mat)"])
        assert torch.equal(published, same) and torch.allclose(one, plain, atol=1e-5)


def test_weights_multiply_their_tokens_and_the_mean_stays(clip):
    with torch.no_grad():
        z = clip.encode(["a wonderful cat", "a dog"])
        heavy = PromptEncoder(clip, emphasis=True)(["a (wonderful:1.5) cat", "a dog"])
    weights = torch.ones(77, 1)
    weights[2] = 1.5  # after begin and "a"
    expected = z[0] * weights * z[0].mean() / (z[0] * weights).mean()
    assert torch.allclose(heavy[0], expected, rtol=1e-4) and torch.equal(heavy[1], z[1])
    assert heavy[0].mean().item() == pytest.approx(z[0].mean().item(), rel=1e-4) and not torch.allclose(
        heavy[0], z[0], rtol=1e-3
    )


def test_a_mean_of_nothing_is_not_restored():
    z = torch.stack([torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.tensor([[3.0, 0.0], [-2.0, 0.0]])])
    weights = torch.tensor([[1.0, 2.0], [1.0, 3.0]])  # a mean of 0, and one that changes its sign
    assert torch.equal(weighted(z, weights), z * weights[..., None])
    assert weighted(z.half(), weights).dtype == torch.float16


@pytest.mark.parametrize("words, chunks", [(0, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
def test_a_long_prompt_is_cut_into_chunks_with_begin_and_end_and_others_are_filled_up(words, chunks):
    encoder, tokenizer = PromptEncoder(Echo(), long_prompts=True), clip_tokenizer()
    prompts = ["cat " * words, "dog"]
    assert encoder.chunks_for(prompts) == chunks
    rows = encoder(prompts, chunks)[..., 0].long()
    (cat,), (dog,) = tokenizer.encode("cat"), tokenizer.encode("dog")
    begin, end = tokenizer.begin_id, tokenizer.end_id

    def chunk(*ids: int) -> list[int]:
        return [begin, *ids, end, *[0] * (5 - len(ids))]

    sizes = [min(5, max(0, words - 5 * k)) for k in range(chunks)]
    assert rows[0].tolist() == [i for size in sizes for i in chunk(*[cat] * size)]
    assert rows[1].tolist() == chunk(dog) + chunk() * (chunks - 1)


def test_chunks_are_encoded_alone_and_joined_along_the_tokens(clip):
    tokens = clip_tokenizer().encode(LONG)
    assert 75 < len(tokens) <= 150
    first, rest = (clip_tokenizer().decode(part) for part in (tokens[:75], tokens[75:]))
    with torch.no_grad():
        both = PromptEncoder(clip, long_prompts=True)([LONG], 2)
        assert torch.allclose(both, torch.cat([clip.encode([first]), clip.encode([rest])], dim=1), atol=1e-6)
    with pytest.raises(ValueError, match="needs more than 1 chunks"):
        PromptEncoder(clip, long_prompts=True)([LONG], 1)


def test_without_chunks_the_end_is_dropped_and_told_once(clip, caplog):
    encoder = PromptEncoder(clip, emphasis=True)
    with caplog.at_level("WARNING"), torch.no_grad():
        for _ in range(2):
            short = encoder(["(a:1.2) " + "cat " * 75 + "and (a dog:1.3)"])
    assert short.shape == (1, 77, 16)
    (record,) = caplog.records
    assert "truncated to 75 tokens" in record.message and "'cat and a dog'" in record.message


def test_an_encoder_of_other_tokens_is_refused():
    with pytest.raises(ValueError, match="text encoder of CLIP's tokens, not Linear"):
        PromptEncoder(nn.Linear(1, 1))
    bert = {"target": "ldm.modules.encoders.modules.BERTEmbedder"}
    for asked in ("emphasis", "long_prompts"):
        with pytest.raises(ValueError, match=f"--{asked}: requires one of FrozenCLIPEmbedder, .* is BERTEmbedder"):
            TextToImageRequest(height=16, width=16, **{asked: True}).checked(
                model_info(text_model_config(cond_stage_config=bert))
            )


# ------------------------------------------------------------------------------ drawing


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Pipeline:
    saved = save_text_model(tmp_path_factory.mktemp("tiny"))
    return load_model(saved.config, saved.ckpt, device="cpu", precision="full")


def draw(pipeline: Pipeline, prompts="a cat", **changes) -> tuple[np.ndarray, list[dict]]:
    request = TextToImageRequest(
        prompt=prompts, **{"height": 16, "width": 16, "steps": 2, "n_samples": 2, "n_iter": 1, "scale": 3.0, **changes}
    )
    pictures = list(text_to_image(pipeline, request, progress=False))
    return np.stack([np.asarray(picture.image) for picture in pictures]), [picture.info for picture in pictures]


def test_brackets_mean_nothing_unless_they_are_asked_to(pipeline):
    plain, _ = draw(pipeline)
    assert np.array_equal(plain, draw(pipeline, emphasis=True, long_prompts=True)[0])
    assert np.array_equal(plain, draw(pipeline, "a (cat:1.0)", emphasis=True)[0])
    assert not np.array_equal(plain, draw(pipeline, "a (cat:1.0)")[0])
    assert not np.array_equal(plain, draw(pipeline, "a (cat:3)", emphasis=True)[0])
    assert not np.array_equal(
        draw(pipeline, negative_prompt="(x:2)", emphasis=True)[0], draw(pipeline, negative_prompt="x")[0]
    )
    with pytest.raises(ValueError, match="never closed"):
        draw(pipeline, ["a", "(b"], emphasis=True)
    with pytest.raises(ValueError, match="never closed"):
        draw(pipeline, negative_prompt="(b", emphasis=True)


def test_words_beyond_the_first_chunk_matter_only_in_chunks_and_their_number_is_recorded(pipeline):
    """The tiny encoder takes 10 words at once."""
    cats, dogs = "cat " * 11, "cat " * 10 + "dog"
    assert np.array_equal(draw(pipeline, cats)[0], draw(pipeline, dogs)[0])
    pictures, (info, _) = draw(pipeline, cats, long_prompts=True)
    assert not np.array_equal(pictures, draw(pipeline, dogs, long_prompts=True)[0]) and info["chunks"] == 2
    assert draw(pipeline, "a", negative_prompt="cat " * 21, long_prompts=True)[1][0]["chunks"] == 3
    alone = draw(pipeline, ["a"], long_prompts=True, chunks=2, seed_mode="image")[0]
    beside, (first, _) = draw(pipeline, ["a", cats], long_prompts=True, seed_mode="image")
    assert first["chunks"] == 2 and np.abs(alone[0].astype(int) - beside[0]).max() <= 1
    assert draw(pipeline)[1][0]["chunks"] is None
