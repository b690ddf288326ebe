"""Emphasis and long prompts: their effect on the embeddings, and none if unused."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.config.model_info import model_info
from ldm.inference import Pipeline, load_model, text_to_image
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


# --- reading


# --- encoding


def test_unweighted_short_prompts_have_the_published_embeddings(clip):
    prompts = ["a cat", "", "A (red) fox's\n hat", LONG]
    captions = CaptionEmbedder(16, 1, vocab_rows=64, heads=2, dim_head=8)
    open_clip = FrozenOpenCLIPEmbedder(layer="penultimate", text_config={"width": 16, "heads": 2, "layers": 2})
    for encoder in (clip, seed_weights(captions), seed_weights(open_clip).eval()):
        with torch.no_grad():
            published, same = encoder.encode(prompts), PromptEncoder(encoder)(prompts)
            one = PromptEncoder(encoder, emphasis=True, long_prompts=True)(["a [(cat:1.1)] (on:1.0) \\(a mat\\)"])
            plain = encoder.encode(["a cat on (a mat)"])
        assert torch.equal(published, same) and torch.allclose(one, plain, atol=1e-5)


def test_weights_multiply_their_tokens_and_keep_the_mean(clip):
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


def test_a_mean_near_zero_is_not_restored():
    z = torch.stack([torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.tensor([[3.0, 0.0], [-2.0, 0.0]])])
    weights = torch.tensor([[1.0, 2.0], [1.0, 3.0]])  # a mean of 0, and one that changes its sign
    assert torch.equal(weighted(z, weights), z * weights[..., None])
    assert weighted(z.half(), weights).dtype == torch.float16


@pytest.mark.parametrize("words, chunks", [(0, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
def test_a_long_prompt_is_split_into_chunks_and_others_are_padded(words, chunks):
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


def test_chunks_are_encoded_separately_and_joined_along_the_tokens(clip):
    tokens = clip_tokenizer().encode(LONG)
    assert 75 < len(tokens) <= 150
    first, rest = (clip_tokenizer().decode(part) for part in (tokens[:75], tokens[75:]))
    with torch.no_grad():
        both = PromptEncoder(clip, long_prompts=True)([LONG], 2)
        assert torch.allclose(both, torch.cat([clip.encode([first]), clip.encode([rest])], dim=1), atol=1e-6)
    with pytest.raises(ValueError, match="needs more than 1 chunks"):
        PromptEncoder(clip, long_prompts=True)([LONG], 1)


def test_without_chunks_the_end_is_truncated_with_one_warning(clip, caplog):
    encoder = PromptEncoder(clip, emphasis=True)
    with caplog.at_level("WARNING"), torch.no_grad():
        for _ in range(2):
            short = encoder(["(a:1.2) " + "cat " * 75 + "and (a dog:1.3)"])
    assert short.shape == (1, 77, 16)
    (record,) = caplog.records
    assert "truncated to 75 tokens" in record.message and "'cat and a dog'" in record.message


def test_all_prompts_that_are_truncated_are_one_warning(clip, caplog):
    prompts = [f"(number {i}:1.2) " + "cat " * 75 for i in range(3)]
    PromptEncoder(clip, emphasis=True).warn_of_long_texts([*prompts, "short"])
    PromptEncoder(clip, long_prompts=True).warn_of_long_texts(["number 9 " + "cat " * 75])
    (message,) = caplog.messages
    assert message == "3 of 4 texts truncated to 75 tokens; dropped from the first: 'cat cat'"


def test_an_encoder_of_other_tokens_is_refused():
    with pytest.raises(ValueError, match="text encoder of CLIP's tokens, not Linear"):
        PromptEncoder(nn.Linear(1, 1))
    bert = {"target": "ldm.modules.encoders.modules.BERTEmbedder"}
    for asked in ("emphasis", "long_prompts"):
        with pytest.raises(ValueError, match=f"--{asked}: requires one of FrozenCLIPEmbedder, .* is BERTEmbedder"):
            TextToImageRequest(height=16, width=16, **{asked: True}).checked(
                model_info(text_model_config(cond_stage_config=bert))
            )


# --- drawing


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Pipeline:
    saved = save_text_model(tmp_path_factory.mktemp("tiny"))
    return load_model(saved.config, saved.ckpt, device="cpu", precision="full")


def generate(pipeline: Pipeline, prompts="a cat", **changes) -> tuple[np.ndarray, list[dict]]:
    request = TextToImageRequest(
        prompt=prompts, **{"height": 16, "width": 16, "steps": 2, "n_samples": 2, "n_iter": 1, "scale": 3.0, **changes}
    )
    images = list(text_to_image(pipeline, request, progress=False))
    return np.stack([np.asarray(generated.image) for generated in images]), [generated.info for generated in images]


def test_brackets_are_literal_without_emphasis(pipeline):
    plain, _ = generate(pipeline)
    assert np.array_equal(plain, generate(pipeline, emphasis=True, long_prompts=True)[0])
    assert np.array_equal(plain, generate(pipeline, "a (cat:1.0)", emphasis=True)[0])
    assert not np.array_equal(plain, generate(pipeline, "a (cat:1.0)")[0])
    assert not np.array_equal(plain, generate(pipeline, "a (cat:3)", emphasis=True)[0])
    assert not np.array_equal(
        generate(pipeline, negative_prompt="(x:2)", emphasis=True)[0], generate(pipeline, negative_prompt="x")[0]
    )
    with pytest.raises(ValueError, match="never closed"):
        generate(pipeline, ["a", "(b"], emphasis=True)
    with pytest.raises(ValueError, match="never closed"):
        generate(pipeline, negative_prompt="(b", emphasis=True)


def test_words_beyond_the_first_chunk_matter_only_with_long_prompts(pipeline):
    """The tiny encoder takes 10 words at once."""
    cats, dogs = "cat " * 11, "cat " * 10 + "dog"
    assert np.array_equal(generate(pipeline, cats)[0], generate(pipeline, dogs)[0])
    images, (info, _) = generate(pipeline, cats, long_prompts=True)
    assert not np.array_equal(images, generate(pipeline, dogs, long_prompts=True)[0]) and info["chunks"] == 2
    assert generate(pipeline, "a", negative_prompt="cat " * 21, long_prompts=True)[1][0]["chunks"] == 3
    alone = generate(pipeline, ["a"], long_prompts=True, chunks=2, seed_mode="image")[0]
    beside, (first, _) = generate(pipeline, ["a", cats], long_prompts=True, seed_mode="image")
    assert first["chunks"] == 2 and np.abs(alone[0].astype(int) - beside[0]).max() <= 1
    assert generate(pipeline)[1][0]["chunks"] is None
