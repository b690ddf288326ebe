"""Laws of CLIP's tokenizer: the ids of Stable Diffusion's training, no download, nothing dropped in silence."""

import logging
import random
import subprocess
import sys

import pytest
import torch

from ldm.modules.encoders import clip_tokenizer as module
from ldm.modules.encoders.clip_tokenizer import CLIPTokenizer, clip_tokenizer

PROMPT = "a photograph of an astronaut riding a horse"
ASTRONAUT = [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]  # its ids in Stable Diffusion v1
PROMPTS = [
    "",
    "  A  Painting\tof\na virus MONSTER ",
    "it's I'll we've 'tis don't cat'S",
    "1234 3.14 50% $5 ½ ² ٣٤٥",
    "émile CAFÉ naïve ÀÉÎ İstanbul ß \u017f",
    "日本語 東京 한국어 привет ñ",
    "🎨🦄👩‍👩‍👧 x 😀",
    "â€œquotedâ€\x9d schÃ¶n",
    "tom &amp; jerry &lt;3",
    "ﬁne \uff26\uff35\uff2c\uff2c width — “curly” … don\u2019t",
    "a\u200bb\u00a0c\ufeff \x1b[31mred\x1b[0m",
    "___---!!!((word:1.3)), [x] {y} <html> & co </w>",
    "a" * 300,
    "trending on artstation, 8k, (masterpiece), by greg rutkowski",
]


def invented(seed: int) -> str:
    """Words of the vocabulary, letters at random, symbols at random."""
    draw = random.Random(seed)
    if seed % 3 == 0:
        return " ".join(
            token.replace("</w>", "")
            for token in draw.choices(clip_tokenizer().tokens[300:48000], k=draw.randint(1, 20))
        )
    if seed % 3 == 1:
        return "".join(draw.choices("abcdeinorst", k=draw.randint(5, 300)))
    spans = [(32, 126), (32, 126), (160, 591), (0x3000, 0x30FF), (0x1F300, 0x1F64F)]
    return "".join(chr(draw.randint(*draw.choice(spans))) for _ in range(draw.randint(1, 60)))


def test_ids_are_those_of_open_clip():
    from open_clip.tokenizer import SimpleTokenizer

    theirs, ours = SimpleTokenizer(), clip_tokenizer()
    for prompt in [*PROMPTS, *map(invented, range(150))]:
        assert ours.encode(prompt) == theirs.encode(prompt), prompt
        ids, padded = ours(prompt)[0].tolist(), theirs([prompt])[0].tolist()
        end = padded.index(49407) + 1
        assert ids[:end] == padded[:end] and set(ids[end:]) <= {49407}, prompt


def test_a_known_prompt_has_its_known_ids_and_pads_with_the_end():
    ids = clip_tokenizer()(PROMPT)
    assert ids.shape == (1, 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == ASTRONAUT + [49407] * 67


def test_open_clips_models_pad_with_zero():
    assert clip_tokenizer()(PROMPT, pad_id=0)[0].tolist() == ASTRONAUT + [0] * 67


def test_literal_begin_and_end_stay_special():
    assert clip_tokenizer().encode("a <|endoftext|> b <|startoftext|>") == [320, 49407, 321, 49406]


def test_decoding_gives_the_cleaned_text():
    tokenizer = clip_tokenizer()
    assert tokenizer.decode(tokenizer("A  naïve 🎨 horse </w>")[0].tolist()) == "a naïve 🎨 horse </ w >"


def test_what_does_not_fit_is_named_once(caplog):
    tokenizer = CLIPTokenizer()
    with caplog.at_level(logging.WARNING, "ldm"):
        for _ in range(3):
            ids = tokenizer(["one two three four five six", "short"], max_length=6)
    assert ids[0].tolist()[1:-1] == tokenizer.encode("one two three four") and ids[0, -1] == 49407
    assert [record.getMessage().count("dropped: 'five six'") for record in caplog.records] == [1]


def test_a_caption_of_ten_thousand_characters_is_cut_and_its_warning_is_short(caplog):
    with caplog.at_level(logging.WARNING, "ldm"):
        assert CLIPTokenizer()("".join(random.Random(0).choices("abcdeinorst", k=10_000))).shape == (1, 77)
    assert "more characters" in caplog.text and len(caplog.text) < 1000


def test_wrong_inputs_are_refused(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="a text to encode is a int: 3"):
        clip_tokenizer()(["a", 3])
    with pytest.raises(ValueError, match="max_length 1"):
        clip_tokenizer()("a", max_length=1)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install open-clip-torch"):
        CLIPTokenizer()


def test_tokenizing_and_building_import_neither_open_clip_nor_torchvision_nor_transformers():
    code = (
        "import sys; from ldm.modules.encoders.modules import *; heavy = {'open_clip', 'torchvision', 'transformers', 'ftfy', 'regex'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "CaptionEmbedder(8, 1, vocab_rows=16)(['a']);"
        "FrozenCLIPEmbedder(text_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))(['a']);"
        "assert not {'open_clip', 'torchvision', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
