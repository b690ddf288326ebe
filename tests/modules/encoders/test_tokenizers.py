"""Laws of the tokenizers: the ids of the published models, no download while building, and no silent truncation."""

import json
import logging
import random
from pathlib import Path

import pytest
import torch

from ldm.modules.encoders import tokenizers
from ldm.modules.encoders.modules import BERTEmbedder
from ldm.modules.encoders.tokenizers import BERTTokenizer, CLIPTokenizer, clip_tokenizer

PROMPT = "a photograph of an astronaut riding a horse"
ASTRONAUT = [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]  # its ids in Stable Diffusion v1
# [text, ids without begin and end] of 201 prompts: Unicode, HTML entities, emoji, long words, special tokens, random
GOLDEN_IDS = json.loads((Path(__file__).parent / "clip_tokens.json").read_text())
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "horse", "rid", "##ing", "virus", ","]


def random_text(seed: int) -> str:
    """Words of the vocabulary, random letters, or random symbols."""
    rng = random.Random(seed)
    if seed % 3 == 0:
        words = rng.choices([*clip_tokenizer().token_ids][300:48000], k=rng.randint(1, 20))
        return " ".join(words).replace("</w>", "")
    if seed % 3 == 1:
        return "".join(rng.choices("abcdeinorst", k=rng.randint(5, 300)))
    spans = [(32, 126), (32, 126), (160, 591), (0x3000, 0x30FF), (0x1F300, 0x1F64F)]
    return "".join(chr(rng.randint(*rng.choice(spans))) for _ in range(rng.randint(1, 60)))


def test_clip_ids_are_the_golden_ones():
    assert len(GOLDEN_IDS) > 200
    assert [(text, clip_tokenizer().encode(text)) for text, _ in GOLDEN_IDS] == [tuple(pair) for pair in GOLDEN_IDS]


def test_clip_ids_are_those_of_open_clip():
    from open_clip.tokenizer import SimpleTokenizer

    theirs, ours = SimpleTokenizer(), clip_tokenizer()
    for prompt in [*(text for text, _ in GOLDEN_IDS[:15]), *map(random_text, range(200, 300))]:
        assert ours.encode(prompt) == theirs.encode(prompt), prompt
        ids, padded = ours(prompt)[0].tolist(), theirs([prompt])[0].tolist()
        end = padded.index(49407) + 1
        assert ids[:end] == padded[:end] and set(ids[end:]) <= {49407}, prompt


def test_a_known_prompt_has_its_known_ids_and_the_padding_of_its_model():
    ids = clip_tokenizer()(PROMPT)
    assert ids.shape == (1, 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == ASTRONAUT + [49407] * 67
    assert clip_tokenizer()(PROMPT, pad_id=0)[0].tolist() == ASTRONAUT + [0] * 67


def test_literal_begin_and_end_stay_special():
    assert clip_tokenizer().encode("a <|endoftext|> b <|startoftext|>") == [320, 49407, 321, 49406]


def test_decoding_gives_the_cleaned_text():
    tokenizer = clip_tokenizer()
    assert tokenizer.decode(tokenizer("A  naïve 🎨 horse </w>")[0].tolist()) == "a naïve 🎨 horse </ w >"


def test_a_truncated_text_is_reported_once_with_what_was_dropped(caplog):
    tokenizer = CLIPTokenizer()
    with caplog.at_level(logging.WARNING, "ldm"):
        for _ in range(3):
            ids = tokenizer(["one two three four five six", "short"], max_length=6)
        assert tokenizer("".join(random.Random(0).choices("abcdeinorst", k=10_000))).shape == (1, 77)
    assert ids[0].tolist()[1:-1] == tokenizer.encode("one two three four") and ids[0, -1] == 49407
    first, second = (record.getMessage() for record in caplog.records)
    assert "truncated to 4 tokens; dropped: 'five six'" in first
    assert "more characters" in second and len(second) < 1000


def test_the_truncated_texts_of_a_call_are_one_warning_with_count_and_example(caplog):
    tokenizer = CLIPTokenizer()
    texts = [f"{word} two three four five six" for word in ("a", "b", "c", "a")]
    with caplog.at_level(logging.WARNING, "ldm"):
        tokenizer([*texts, "short"], max_length=6)
        tokenizer(texts, max_length=6)
        (message,) = caplog.messages
        assert message == "3 of 5 texts truncated to 4 tokens; dropped from the first: 'five six'"


def test_clip_raises_for_wrong_inputs_and_missing_files(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="expected texts, got int: 3"):
        clip_tokenizer()(["a", 3])
    with pytest.raises(ValueError, match="max_length 1"):
        clip_tokenizer()("a", max_length=1)
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install open-clip-torch"):
        CLIPTokenizer()


@pytest.mark.parametrize("form", ["file", "folder"])
def test_bert_reads_its_vocabulary_from_a_path_at_the_first_text(tmp_path, form, caplog):
    path = tmp_path / "vocab.txt"
    tokenizer = BERTTokenizer(path if form == "file" else tmp_path, max_length=8)
    path.write_text("\n".join(VOCABULARY))
    assert tokenizer(["A  Horse, riding", ""]).tolist() == [[2, 5, 6, 10, 7, 8, 3, 0], [2, 3, 0, 0, 0, 0, 0, 0]]
    with caplog.at_level(logging.WARNING, "ldm"):
        for _ in range(3):
            tokenizer(["a horse riding a horse a virus"])
        tokenizer(["a horse riding a horse a " + "horse " * 100])
    first, second = (record.getMessage() for record in caplog.records)
    assert "dropped: 'a virus'" in first and "more characters" in second


def test_bert_without_its_vocabulary_says_what_to_do(tmp_path, no_hub):
    with pytest.raises(FileNotFoundError, match="tokenizer_path"):
        BERTTokenizer()("a horse")
    with pytest.raises(FileNotFoundError, match="no such file"):
        BERTTokenizer(tmp_path / "no.txt")("a horse")


def test_bert_embedder_encodes_texts_or_ids(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    shape = {"n_embed": 16, "n_layer": 1, "vocab_size": len(VOCABULARY), "max_seq_len": 8}
    model = BERTEmbedder(**shape, tokenizer_path=tmp_path)
    assert model.encode(["a horse", ""]).shape == (2, 8, 16) and model.unconditional_input(2) == ["", ""]
    model = BERTEmbedder(**shape, use_tokenizer=False)
    empty = model.unconditional_input(2)
    assert empty.shape == (2, 8) and set(empty.flatten().tolist()) == {len(VOCABULARY) - 1}
    assert model.encode(empty).shape == (2, 8, 16)
    assert not model.transformer.to_logits.weight.requires_grad, "no gradient ever reaches it"
