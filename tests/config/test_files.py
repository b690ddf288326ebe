"""YAML and JSON files are data, or an error of one line that names the file."""

import pytest

from ldm.config import files
from ldm.config.files import load_json, load_yaml
from ldm.config.instantiate import ConfigError


def test_a_yaml_is_plain_data_and_numbers_in_science_notation_are_numbers(yaml):
    config = load_yaml(yaml("a: 1e-4\nb: [1, x]\nc: ${a}\n"))
    assert config == {"a": 1e-4, "b": [1, "x"], "c": 1e-4}


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "a: 1\na: 2\n",
        "\x00",
        "a: !!python/object/apply:os.system [ls]",
        "a: &a [*a]",
        "a: \udc80".encode("utf-8", "surrogatepass"),
    ],
)
def test_other_content_is_refused_in_one_line_by_name(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"a\.yaml: invalid YAML: ") as error:
        load_yaml(path)
    assert "\n" not in str(error.value)


def test_aliases_may_not_multiply_without_limit(yaml, monkeypatch):
    monkeypatch.setattr(files, "MAX_NODES", 30)
    assert load_yaml(yaml("a: &a [1, 2, 3]\nb: [*a, *a]\n")).b == [[1, 2, 3], [1, 2, 3]]
    with pytest.raises(ConfigError, match="aliases expand to 32 entries; the limit is 30"):
        load_yaml(yaml("a: &a [1, 2, 3]\nb: [*a, *a, *a, *a, *a]\nc: [1, 2]\n"))


@pytest.mark.parametrize("text, problem", [("{", "invalid JSON"), ("[1]", "expected a JSON object, got list")])
def test_a_json_file_holds_an_object(tmp_path, text, problem):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: {problem}"):
        load_json(path)
    path.write_text('{"a": 1}')
    assert load_json(path) == {"a": 1}
