"""Emphasis in prompts: parsing and errors."""

import numpy as np
import pytest

from ldm.config.model_info import model_info
from ldm.inference.emphasis import Part, parse_emphasis
from ldm.inference.requests import TextToImageRequest
from tests.tiny import text_model_config


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
def test_invalid_emphasis_is_refused_in_one_line_with_the_fix(prompt, words):
    with pytest.raises(ValueError, match=f"--emphasis: .*{words}") as error:
        TextToImageRequest(prompt=["a cat", prompt], emphasis=True).checked(model_info(text_model_config()))
    assert repr(prompt) in str(error.value) and r"write (words:1.3), and \( \)" in str(error.value)


@pytest.mark.parametrize("seed", range(20))
def test_escaped_characters_are_literal(seed):
    signs = "".join(np.random.default_rng(seed).choice(list("ab ()[]:\\1.2"), 20))
    escaped = "".join("\\" + sign if sign in "()[]:\\" else sign for sign in signs)
    assert parse_emphasis(escaped) == [Part(signs, 1.0)]
