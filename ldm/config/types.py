"""Values of configs against the annotations of the arguments that they are for.

An annotation is read as text, so nothing is imported: the check comes before torch. It may state a range, as in
`linear_start: Annotated[float, "(0, 1)"]`, or the class whose arguments a mapping holds, as in
`ddconfig: Annotated[Mapping[str, Any], "ldm.modules.diffusionmodules.model.Encoder"]`, or an example for the error
message, as in `Annotated[Sequence[Mapping[str, Any]], "e.g. [{decay: 0.9999}]"]`.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from typing import Annotated, Any, NamedTuple, cast, get_origin

PositiveInt = Annotated[int, ">= 1"]
NonNegativeInt = Annotated[int, ">= 0"]
PositiveFloat = Annotated[float, "> 0"]
NonNegativeFloat = Annotated[float, ">= 0"]
Probability = Annotated[float, "[0, 1]"]
Dropout = Annotated[float, "[0, 1)"]
PathText = str  # `~` is expanded
Duration = str  # DD:HH:MM:SS, or the arguments of datetime.timedelta

_RANGES: dict[str, Any] = {name: value for name, value in globals().items() if get_origin(value) is Annotated}
_ALIASES = {
    **{name: f"Annotated[{of.__origin__.__name__}, {of.__metadata__[0]!r}]" for name, of in _RANGES.items()},
    "Size": "PositiveInt | tuple[PositiveInt, PositiveInt]",
    "Multiplier": "Annotated[float, '>= 0']",  # of ldm.lr_scheduler
    "PathText": "Path",
    "PathLike": "Path",
    "PathType": "Path",
    "_PATH": "Path",
    "_size_2_t": "int | tuple[int, int]",
}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_PLAIN = (bool, int, float, str, list, tuple, Mapping, MutableSequence, type(None))


class _Type(NamedTuple):
    expected: str  # "an integer >= 1"
    read: Callable[[Any, bool], Any]  # (value, leniently) -> value; raises ValueError


def convert(value: Any, annotation: str) -> Any:
    """Return a value of a config as its annotation's type; raise ValueError with what was expected.

    Numbers may be written as text (1e-4) and integers as 1.0e2; `~` in a path is expanded. The value is returned as it
    is if the annotation is not one of plain types.
    """
    types = _types(annotation)
    is_open = isinstance(value, str) and ("${" in value or value == "???")  # an interpolation, a missing value
    if not isinstance(value, _PLAIN) or not types or is_open:
        return value
    for leniently in (False, True):  # 1.0 is a float if the annotation has both int and float
        for each in types:
            try:
                return each.read(value, leniently)
            except ValueError:
                pass
    if any(not each.expected for each in types):
        return value
    raise ValueError("expected " + " or ".join(dict.fromkeys(each.expected for each in types)))


def or_none(annotation: str) -> str:
    """Return the annotation with None allowed: the type of an argument whose default is None."""
    return annotation if re.search(r"\b(None|Optional|Any)\b", annotation) else f"Optional[{annotation}]"


def shown(value: Any) -> str:
    """Return a value as YAML writes it, shortened."""
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, Mapping | MutableSequence) and not isinstance(value, dict | list):
        from omegaconf import OmegaConf  # kept out of --help and of the checks of flags

        value = OmegaConf.to_container(value)
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def arguments_of(annotation: str) -> str | None:
    """Return the class whose arguments a mapping of this annotation holds."""
    found = re.search(r"Annotated\[Mapping\[str, Any\], ['\"]([\w.]+)['\"]\]", annotation)
    return found.group(1) if found else None


@functools.cache
def _types(annotation: str) -> tuple[_Type, ...]:
    try:
        members = _members(ast.parse(annotation, mode="eval").body) if annotation else []
    except SyntaxError:
        return ()
    return tuple(sorted(members, key=lambda each: each.expected != "a path"))  # str | Path is a path


def _members(node: ast.expr) -> list[_Type]:
    """Return the alternatives of an annotation; a type that cannot be checked expects nothing."""
    match node:
        case ast.BinOp(left=left, right=right):
            return _members(left) + _members(right)
        case ast.Constant(value=None):
            return [_Type("null", _none)]
        case ast.Constant(value=str(text)):
            return list(_types(text))
        case ast.Subscript(value=head, slice=inner):
            arguments = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
            return _generic(ast.unparse(head).rpartition(".")[2], arguments)
    name = ast.unparse(node).rpartition(".")[2]
    if name in _ALIASES and (isinstance(node, ast.Name) or name == "PathLike"):  # not nn.Dropout, torch.Size
        return list(_types(_ALIASES[name]))
    if name in ("list", "tuple", "List", "Tuple", "Sequence"):
        return [_list(())]
    known = {
        "None": _Type("null", _none),
        "NoneType": _Type("null", _none),
        "bool": _Type("true or false", _bool),
        "int": _Type("an integer", _int),
        "float": _Type("a finite number", _float),
        "str": _Type("text", _str),
        "Path": _Type("a path", _path),
        "dict": _Type("a mapping", _mapping),
        "Mapping": _Type("a mapping", _mapping),
        "DictConfig": _Type("a mapping", _mapping),
        "Duration": _Type("a duration 'DD:HH:MM:SS' (at most 23 h, 59 min, 59 s) or {hours: N}", _duration),
    }
    return [known.get(name, _Type("", _nothing))]


def _generic(name: str, arguments: list[ast.expr]) -> list[_Type]:
    match name:
        case "Union":
            return [each for argument in arguments for each in _members(argument)]
        case "Optional":
            return [*_members(arguments[0]), _Type("null", _none)]
        case "Literal":
            return [_literal([ast.literal_eval(argument) for argument in arguments])]
        case "Annotated":
            limits = str(arguments[1].value) if isinstance(arguments[1], ast.Constant) else ""
            interval = _interval(limits)
            members = _members(arguments[0])
            if limits.startswith("e.g. "):
                return [each._replace(expected=f"{each.expected}, {limits}") for each in members]
            return [_within(each, limits, interval) for each in members] if interval else members
        case "list" | "List" | "Sequence" | "Iterable" | "Collection":
            return [_list((), ast.unparse(arguments[0]))]
        case "tuple" | "Tuple":
            if len(arguments) == 2 and ast.unparse(arguments[1]) == "...":
                return [_list((), ast.unparse(arguments[0]))]
            return [_list([ast.unparse(argument) for argument in arguments])]
        case "dict" | "Dict" | "Mapping":
            return [_Type("a mapping", _mapping)]
    return [_Type("", _nothing)]


def _none(value: Any, leniently: bool) -> None:
    if value is not None and not (leniently and value in ("None", "none", "null")):
        raise ValueError


def _bool(value: Any, leniently: bool) -> bool:
    if isinstance(value, bool):
        return value
    if leniently and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if leniently and isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    raise ValueError


def _int(value: Any, leniently: bool) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if leniently and isinstance(value, float | str):
        try:
            return int(value) if isinstance(value, str) else _whole(value)
        except ValueError:
            return _whole(float(value))
    raise ValueError


def _whole(value: float) -> int:
    if not value.is_integer():
        raise ValueError
    return int(value)


def _float(value: Any, leniently: bool) -> float:
    if leniently and isinstance(value, str):
        value = float(value)
    number = isinstance(value, float) or (leniently and isinstance(value, int) and not isinstance(value, bool))
    if not number or not math.isfinite(value):
        raise ValueError
    return value


def _str(value: Any, leniently: bool) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _path(value: Any, leniently: bool) -> str:
    return os.path.expanduser(_str(value, leniently))


def _mapping(value: Any, leniently: bool) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError
    return value


def _duration(value: Any, leniently: bool) -> Any:
    if isinstance(value, Mapping):
        if set(value) - {"weeks", "days", "hours", "minutes", "seconds"} or not value:
            raise ValueError
        for each in value.values():
            if _float(each, True) < 0:
                raise ValueError
    elif not re.fullmatch(r"\s*\d+:(2[0-3]|[01]?\d):[0-5]?\d:[0-5]?\d\s*", _str(value, leniently)):
        raise ValueError
    return value


def _nothing(value: Any, leniently: bool) -> Any:
    raise ValueError


def _literal(choices: list[Any]) -> _Type:
    def read(value: Any, leniently: bool) -> Any:
        if value not in choices or (isinstance(value, bool) and not any(value is choice for choice in choices)):
            raise ValueError
        return value

    if len(choices) == 1:
        return _Type(shown(choices[0]), read)
    return _Type(f"one of {', '.join(str(choice) for choice in choices)}", read)


def _list(lengths: Sequence[str], item: str = "") -> _Type:
    """A list whose items have the annotation `item`, or as many items as `lengths` has, with these annotations."""

    def read(value: Any, leniently: bool) -> Any:
        if not isinstance(value, tuple | MutableSequence) or (lengths and len(value) != len(lengths)):
            raise ValueError
        items = list(value)
        types = lengths or [item] * len(items)
        converted = [convert(each, annotation) for each, annotation in zip(items, types)]
        same = all(new is old for new, old in zip(converted, items))
        return value if same else cast(Callable[[list], Any], type(value))(converted)

    types = _types(item or (lengths[0] if lengths else ""))
    each = " or ".join(dict.fromkeys(one.expected for one in types)) if all(one.expected for one in types) else ""
    size = f" of {len(lengths)}" if lengths else ""
    return _Type(f"a list{size}{f' (each item: {each})' if each else ''}", read)


def _within(of: _Type, limits: str, inside: Callable[[float], bool]) -> _Type:
    def read(value: Any, leniently: bool) -> Any:
        number = of.read(value, leniently)
        if not inside(number):
            raise ValueError
        return number

    return _Type(f"{of.expected.replace('finite ', '')} {'' if limits[0] in '<>' else 'in '}{limits}", read)


def _interval(limits: str) -> Callable[[float], bool] | None:
    """Read "[0, 1)", "> 0" or ">= 1"."""
    if found := re.fullmatch(r"(>=?) (\S+)", limits):
        low = float(found.group(2))
        return (lambda x: x >= low) if found.group(1) == ">=" else (lambda x: x > low)
    if found := re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", limits):
        opening, low, high, closing = found.group(1), float(found.group(2)), float(found.group(3)), found.group(4)
        return lambda x: (low <= x if opening == "[" else low < x) and (x <= high if closing == "]" else x < high)
    return None
