"""Values of configs as the types and ranges of annotations, read as text."""

import inspect
import math

import pytest
from omegaconf import ListConfig, OmegaConf

from ldm.config import types
from ldm.config.types import arguments_of, convert, shown

DURATION = "a duration 'DD:HH:MM:SS' (at most 23 h, 59 min, 59 s) or {hours: N}"


@pytest.mark.parametrize(
    "value, annotation, converted",
    [
        (100.0, "int", 100),
        ("1e2", "int", 100),
        ("32", "PositiveInt", 32),
        ("1e-4", "float", 1e-4),
        (1, "float", 1),
        ("false", "bool", False),
        (1, "bool", True),
        (None, "Optional[int]", None),
        ("none", "int | None", None),
        (1.0, "Union[int, float]", 1.0),  # the exact type first
        (1, "Union[int, float]", 1),
        ("1e2", "str | int", "1e2"),
        ([1, 2.0], "Sequence[int]", [1, 2]),
        ([8, 16], "Size", [8, 16]),
        ("${model.x}", "int", "${model.x}"),
        ("anything", "Callable[[int], int]", "anything"),
        ("anything", "", "anything"),
        ("anything", "not an annotation", "anything"),
        ([1, 2, 3], "torch.Size", [1, 2, 3]),
        (2, "nn.Dropout", 2),
        (-1, "Literal[-1] | PositiveInt", -1),
        ({"a": 1}, "Mapping[str, Any] | str", {"a": 1}),
        ("02:23:59:59", "Duration | None", "02:23:59:59"),
        ({"hours": 2, "minutes": 0.5}, "Duration", {"hours": 2, "minutes": 0.5}),
    ],
)
def test_a_value_becomes_what_its_annotation_says(value, annotation, converted):
    found = convert(value, annotation)
    assert found == converted and type(found) is type(converted)


@pytest.mark.parametrize(
    "value, annotation, expected",
    [
        (3.7, "int", "an integer"),
        *((bad, "Duration", DURATION) for bad in ("1:2:3", "0:24:0:0", "0:0:60:0", 60, {}, {"hour": 1}, {"days": -1})),
        (True, "int", "an integer"),
        ("many", "int", "an integer"),
        (math.inf, "int", "an integer"),
        (None, "int", "an integer"),
        (math.nan, "float", "a finite number"),
        (math.inf, "float | None", "a finite number or null"),
        ("nan", "float", "a finite number"),
        ("maybe", "bool", "true or false"),
        (2, "bool", "true or false"),
        (5, "str", "text"),
        (2, "Sequence[int]", "a list (each item: an integer)"),
        ("1,2", "Sequence[int]", "a list (each item: an integer)"),
        ([1, 2.5], "Sequence[int]", "a list (each item: an integer)"),
        ([8], "Size", "an integer >= 1 or a list of 2 (each item: an integer >= 1)"),
        (0, "PositiveInt", "an integer >= 1"),
        (-1, "Annotated[float, '(0, 1)']", "a number in (0, 1)"),
        (1.0, "Dropout", "a number in [0, 1)"),
        (0, "Literal[-1] | PositiveInt", "-1 or an integer >= 1"),
        ("l3", "Literal['l1', 'l2']", "one of l1, l2"),
        ("img", "Mapping[str, Any]", "a mapping"),
    ],
)
def test_another_value_is_refused_with_what_was_expected(value, annotation, expected):
    with pytest.raises(ValueError) as error:
        convert(value, annotation)
    assert str(error.value) == f"expected {expected}"


@pytest.mark.parametrize("annotation", ["str | Path | None", "str | os.PathLike | None", "_PATH"])
def test_a_home_directory_is_expanded_in_paths_only(annotation, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert convert("~/x", annotation) == "/home/me/x" and convert("~/x", "str") == "~/x"


def test_lists_of_a_config_stay_lists_of_a_config():
    node = OmegaConf.create({"x": [1, "2"]}).x
    assert isinstance(convert(node, "Sequence[int]"), ListConfig) and convert(node, "Sequence[int]") == [1, 2]


def test_the_aliases_in_text_are_those_of_the_module():
    """An annotation may reach `convert` as its name or as its value."""
    for name in ("PositiveInt", "NonNegativeInt", "PositiveFloat", "NonNegativeFloat", "Probability", "Dropout"):
        written = inspect.formatannotation(getattr(types, name)).removeprefix("typing.")
        assert written == types._ALIASES[name], name


def test_values_are_shown_as_yaml_writes_them_and_shortened():
    assert [shown(value) for value in (None, True, "a", 3)] == ["null", "true", "'a'", "3"]
    assert len(shown("x" * 1000)) == 80


def test_an_annotation_may_name_the_class_of_a_mapping():
    assert arguments_of('Annotated[Mapping[str, Any], "ldm.a.B"]') == "ldm.a.B" and arguments_of("int") is None
