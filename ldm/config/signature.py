"""What a class's constructor accepts, read from its source text, so that a misspelt name is refused before torch is imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.instantiate import resolve_alias


@dataclass(frozen=True)
class Argument:
    """One constructor argument: its name, its annotation as written ('' if none) and whether it has a default."""

    name: str
    annotation: str
    required: bool


@dataclass(frozen=True)
class _Class:
    module: str
    node: ast.ClassDef


def constructor_arguments(target: str) -> dict[str, Argument] | None:
    """The arguments that `target`'s constructor accepts, following **kwargs up to its bases.

    None where the text does not tell: the class is not found, is built at run time, or takes anything.
    """
    module, _, name = resolve_alias(target).rpartition(".")
    found = _find_class(module, name)
    return None if found is None else _accepted(found, depth=0)


def class_attributes(target: str) -> dict[str, Any]:
    """Return the literal attributes in the body of class `target`, inherited ones included."""
    module, _, name = target.rpartition(".")
    found = _find_class(module, name)
    attributes: dict[str, Any] = {}
    if found is None:
        return attributes
    for base in reversed(found.node.bases):
        attributes |= class_attributes(_resolve(found.module, base))
    for node in found.node.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=key)], value=value)
                | ast.AnnAssign(target=ast.Name(id=key), value=ast.expr() as value)
            ):
                with suppress(ValueError):  # not a literal
                    attributes[key] = ast.literal_eval(value)
    return attributes


def classes_of_module(module: str) -> list[str] | None:
    """The public classes that a module's text defines or re-exports; None if there is no such module."""
    tree, source = _tree(module), _source(module)
    if tree is None or source is None:
        return None
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    names += [name for name in _re_exports(module) if name[:1].isupper()]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def may_hold(module: str, name: str) -> bool:
    """Whether a module's text gives `name` a meaning anywhere, or might do so as it runs."""
    tree = _tree(module)
    if tree is None:
        return False
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return bool(names & {name, "*", "__getattr__"})


def argument_help(target: str) -> dict[str, str]:
    """The first sentence that a class's own docstring or its constructor's says of each argument ('Args:' section)."""
    module, _, name = resolve_alias(target).rpartition(".")
    found = _find_class(module, name)
    if found is None:
        return {}
    init = _constructor(found.node)
    text = (ast.get_docstring(init) if init else None) or ast.get_docstring(found.node) or ""
    section = re.search(r"^Args:\n((?:(?: {4}.*)?\n)*)", text + "\n", re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^ {4}(\w+)(?: \(.*?\))?: ((?:.*\n)(?:(?: {8}.*)?\n)*)", section.group(1), re.MULTILINE)
    return {key: _first_sentence(words) for key, words in entries}


def _first_sentence(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split())).replace("``", "")
    return re.split(r"(?<=[.?])\s", text, maxsplit=1)[0]


def _accepted(found: _Class, depth: int) -> dict[str, Argument] | None:
    if depth > 20:
        return None
    init = _constructor(found.node)
    if init is None:
        if any(_name(d).rpartition(".")[2] == "dataclass" for d in found.node.decorator_list):
            return None
        return _accepted_by_bases(found, depth)
    a = init.args
    plain = [*a.posonlyargs, *a.args]
    first_default = len(plain) - len(a.defaults)
    arguments = {
        arg.arg: _argument(arg, position < first_default) for position, arg in enumerate(plain) if position > 0
    }
    arguments |= {arg.arg: _argument(arg, value is None) for arg, value in zip(a.kwonlyargs, a.kw_defaults)}
    if a.kwarg is None:
        return arguments
    inherited = _accepted_by_bases(found, depth)
    return None if inherited is None else {**inherited, **arguments}


def _accepted_by_bases(found: _Class, depth: int) -> dict[str, Argument] | None:
    accepted: dict[str, Argument] = {}
    known = False
    for base in found.node.bases:
        target = _resolve(found.module, base)
        if target in ("torch.nn.Module", "object", "torch.utils.data.Dataset") or target.startswith(
            ("typing.", "abc.")
        ):
            continue
        parent = _find_class(*target.rpartition(".")[::2]) if target else None
        arguments = None if parent is None else _accepted(parent, depth + 1)
        if arguments is None:
            return None
        accepted, known = {**arguments, **accepted}, True
    # A class without an own constructor and without a base that has one takes nothing, but **kwargs to nobody may be read by the body.
    return accepted if known or _constructor(found.node) is None else None


def _argument(arg: ast.arg, required: bool) -> Argument:
    return Argument(arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", required)


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def _find_class(module: str, name: str, depth: int = 0) -> _Class | None:
    tree = _tree(module)
    if tree is None or depth > 10:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Class(module, node)
    home = _imports(module).get(name)
    return None if home is None else _find_class(*home.rpartition(".")[::2], depth + 1)


def _resolve(module: str, base: ast.expr) -> str:
    """The full dotted name of a base class as `module` sees it."""
    name = _name(base)
    head, _, rest = name.partition(".")
    tree = _tree(module)
    if tree is not None and not rest and any(isinstance(n, ast.ClassDef) and n.name == head for n in tree.body):
        return f"{module}.{head}"
    full = _imports(module).get(head, head)
    return f"{full}.{rest}" if rest else full


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript | ast.Call):
        return _name(node.value if isinstance(node, ast.Subscript) else node.func)
    return ast.unparse(node)


def _re_exports(module: str) -> list[str]:
    """Names that a module imports for others: in `__all__`, `from x import Y as Y`, or a package's from its own modules."""
    tree, source = _tree(module), _source(module)
    if tree is None or source is None:
        return []
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            names += [item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)]
        elif isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name]
    if source.name == "__init__.py":
        names += [name for name, home in _imports(module).items() if home.startswith(f"{module}.")]
    return names


@functools.cache
def _imports(module: str) -> dict[str, str]:
    """Local name -> full dotted name, for the imports at the top of a module."""
    tree, source = _tree(module), _source(module)
    names: dict[str, str] = {}
    if tree is None or source is None:
        return names
    package = module if source.name == "__init__.py" else module.rpartition(".")[0]
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            origin = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (origin, node.module or "") if part)
            for alias in node.names:
                names[alias.asname or alias.name] = f"{origin}.{alias.name}"
    return names


@functools.cache
def _tree(module: str) -> ast.Module | None:
    source = _source(module)
    if source is None:
        return None
    try:
        return ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


@functools.cache
def _source(module: str) -> Path | None:
    """A module's file, found without importing anything (importing `a.b` would run `a`)."""
    head, *rest = module.split(".")
    try:
        spec = sys.modules[head].__spec__ if head in sys.modules else importlib.util.find_spec(head)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        stem = Path(folder).joinpath(*rest)
        for candidate in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None
