"""Constructor arguments of classes, read from source text, so that checks need not import torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ldm.config.instantiate import ALIASES, resolve_alias
from ldm.config.types import or_none

# Bases whose constructors take no arguments.
_EMPTY_BASES = ("torch.nn.Module", "object", "torch.utils.data.Dataset")


class _Module(NamedTuple):
    name: str
    tree: ast.Module
    imports: dict[str, str]  # local name -> full dotted name, of the imports at the top


class _Class(NamedTuple):
    module: _Module
    node: ast.ClassDef


def constructor_arguments(target: str) -> dict[str, str] | None:
    """Return {argument: annotation, or ''} of `target`'s constructor, following **kwargs to its bases.

    None if the source does not show it: the class is not found, is built at run time, or takes anything.
    """
    found = _find_class(resolve_alias(target))
    return None if found is None else _accepted(found)


def class_exists(target: str) -> bool:
    """True if the source of `target`'s module defines or imports the class."""
    return _find_class(target) is not None


def argument_help(target: str) -> dict[str, str]:
    """Return the first sentence of each argument in the 'Args:' section of the docstring of `__init__` or the class."""
    found = _find_class(resolve_alias(target))
    if found is None:
        return {}
    init = _constructor(found.node)
    text = (ast.get_docstring(init) if init else None) or ast.get_docstring(found.node) or ""
    section = re.search(r"^Args:\n((?:(?: {4}.*)?\n)*)", text + "\n", re.MULTILINE)
    entries = re.findall(
        r"^ {4}(\w+)(?: \(.*?\))?: ((?:.*\n)(?:(?: {8}.*)?\n)*)", section.group(1) if section else "", re.MULTILINE
    )
    return {key: _first_sentence(words) for key, words in entries}


def class_attributes(target: str) -> dict[str, Any]:
    """Return the literal attributes in the body of class `target`, inherited ones included."""
    found = _find_class(target)
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
    """Return the public classes of this package or torch.optim that a module defines or imports; None without it."""
    found = _module(module)
    if found is None:
        return None
    names = [node.name for node in found.tree.body if isinstance(node, ast.ClassDef)]
    homes = {name: home for name, home in found.imports.items() if home.startswith(("ldm.", "torch.optim."))}
    names += [name for name, home in homes.items() if class_exists(home)]
    names += [alias.rpartition(".")[2] for alias in ALIASES if alias.startswith(f"{module}.")]
    return [name for name in dict.fromkeys(names) if name[:1].isupper()]


def _first_sentence(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split())).replace("``", "")
    return re.split(r"(?<=[.?])\s", text, maxsplit=1)[0]


def _accepted(found: _Class, depth: int = 0) -> dict[str, str] | None:
    """Arguments of the class's own constructor, and those of its bases if that takes **kwargs or if it has none."""
    init = _constructor(found.node)
    generated = any(_name(decorator).endswith("dataclass") for decorator in found.node.decorator_list)
    if depth > 20:
        return None
    own = _fields(found.node) if init is None and generated else {} if init is None else _annotations(init.args)
    if init is not None and init.args.kwarg is None:
        return own
    inherited: dict[str, str] = {}
    known = init is None  # **kwargs that go to no base's constructor may be read by the body
    for base in found.node.bases:
        target = _resolve(found.module, base)
        if target in _EMPTY_BASES or target.startswith(("typing.", "abc.")):
            continue
        parent = _find_class(target)
        arguments = None if parent is None else _accepted(parent, depth + 1)
        if arguments is None:
            return None
        inherited, known = {**arguments, **inherited}, known or bool(arguments)
    return {**inherited, **own} if known else None


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """Return {field: annotation} of a dataclass's body."""
    found = [(each.target, each.annotation) for each in node.body if isinstance(each, ast.AnnAssign)]
    named = {target.id: ast.unparse(annotation) for target, annotation in found if isinstance(target, ast.Name)}
    return {name: annotation for name, annotation in named.items() if not annotation.startswith("ClassVar")}


def _annotations(arguments: ast.arguments) -> dict[str, str]:
    """Return {argument: annotation, or ''} of a method without its `self`; a default of None is a type too."""
    positional = [*arguments.posonlyargs, *arguments.args]
    required: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = [*zip(positional, [*required, *arguments.defaults]), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
    found: dict[str, str] = {}
    for argument, default in pairs[1:]:
        text = ast.unparse(argument.annotation) if argument.annotation else ""
        is_none = isinstance(default, ast.Constant) and default.value is None
        found[argument.arg] = or_none(text) if text and is_none else text
    return found


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def _find_class(target: str, depth: int = 0) -> _Class | None:
    """Return the class of a dotted name, following re-exports to its home."""
    name, _, attribute = target.rpartition(".")
    module = _module(name)
    if module is None or depth > 10:
        return None
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return _Class(module, node)
    home = module.imports.get(attribute)
    return None if home is None else _find_class(home, depth + 1)


def _resolve(module: _Module, base: ast.expr) -> str:
    """Return the full dotted name of a base class as `module` sees it."""
    head, _, rest = _name(base).partition(".")
    if not rest and any(isinstance(node, ast.ClassDef) and node.name == head for node in module.tree.body):
        return f"{module.name}.{head}"
    full = module.imports.get(head, head)
    return f"{full}.{rest}" if rest else full


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript | ast.Call):
        return _name(node.value if isinstance(node, ast.Subscript) else node.func)
    return ast.unparse(node)


@functools.cache
def _module(name: str) -> _Module | None:
    source = _source(name)
    if source is None:
        return None
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    package = name if source.name == "__init__.py" else name.rpartition(".")[0]
    return _Module(name, tree, _imports(tree, package))


def _imports(tree: ast.Module, package: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                head = alias.name.partition(".")[0]
                names[alias.asname or head] = alias.name if alias.asname else head
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
    return names


def _source(module: str) -> Path | None:
    """Return a module's file without importing anything (importing `a.b` would run `a`)."""
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
