"""MkDocs hook: the reference of commands, configs and the Python interface, made from the code at each build."""

import re
import runpy
import sys
from argparse import SUPPRESS, Action
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the documented code is that of this checkout

from ldm import inference
from ldm.cli import Parser
from ldm.models.diffusion.samplers.registry import SAMPLERS
from ldm.paths import ROOT
from ldm.training.flags import _parser as training_parser

_pages: dict[str, str] = {}  # below reference/, without .md -> content


def _in(package: str, *names: str) -> list[str]:
    return [f"{package}.{name}" for name in names]


_DIFFUSION = "ldm.models.diffusion"
PYTHON = {  # page -> modules, classes and functions
    "Inference": [
        name
        for module, names in {**inference._LIGHT, **inference._HEAVY}.items()
        for name in _in("ldm.inference", *names.split())
        if module != "ldm.checkpoint"  # on the page Weights
    ],
    "Samplers": [
        *_in(f"{_DIFFUSION}.samplers", "base", "registry", "guidance"),
        *(entry.target for entry in SAMPLERS.values()),
    ],
    "Diffusion models": _in(_DIFFUSION, "ddpm", "variants", "controlnet", "conditioning", "classifier"),
    "Objectives": _in(_DIFFUSION, "loss_weighting", "training_noise", "timesteps"),
    "First stages": [
        *_in("ldm.models", "autoencoder", "vq"),
        *_in("ldm.modules.losses", "contperceptual", "vqperceptual", "lpips"),
    ],
    "Networks": _in("ldm.modules", "diffusionmodules.openaimodel", "attention", "diffusionmodules.model"),
    "Encoders": ["ldm.modules.encoders.modules"],
    "Datasets": [
        *_in("ldm.data", "folder", "image_dataset", "webdataset", "superres", "inpainting", "control", "edits"),
        *_in("ldm.data", "dreambooth", "mixture", "latents", "datamodule", "base"),
    ],
    "Callbacks": ["ldm.callbacks"],
    "Weights": ["ldm.checkpoint"],
    "Evaluation": ["ldm.evaluation"],
    "Configs": ["ldm.util", "ldm.config.types"],
}


def on_config(config: MkDocsConfig) -> None:
    """Make the pages, and list them in the navigation: a group for each folder."""
    _pages.clear()
    _pages.update({**commands(), **configs(), **python()})
    groups: dict[str, list] = {"Commands": [], "Configs": [{"all": "reference/configs.md"}], "Python": []}
    for path in _pages:
        if path.startswith(("commands/", "configs/recipes/", "configs/quickstart/", "python/")):
            title = Path(path).name
            groups[path.split("/")[0].capitalize()].append({title: f"reference/{path}.md"})
    reference = next(entry for entry in config.nav or [] if "Reference" in entry)
    reference["Reference"] = [{title: entries} for title, entries in groups.items()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    for path, content in _pages.items():
        hidden = "toc" if path.startswith(("configs/", "models/")) else ""  # long lines get its place
        front_matter = f"---\nsearch: {{boost: 0.5}} # guides come first\nhide: [{hidden}]\n---\n"
        files.append(File.generated(config, f"reference/{path}.md", content=f"{front_matter}\n{content}"))


def commands() -> dict[str, str]:
    """Return a page of flags for main.py and for each script that has a parser."""
    pages = {"commands/main": _command("main.py", training_parser())}
    for path in sorted((ROOT / "scripts").glob("*.py")):
        if parser := runpy.run_path(str(path)).get("parser"):
            pages[f"commands/{path.stem}"] = _command(f"scripts/{path.name}", parser())
    return pages


def _command(path: str, parser: Parser) -> str:
    parts = [f"# {path}", f"```bash\npython {path} --help\n```", _text(parser.description or "")]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != SUPPRESS and action.option_strings]
        if actions:
            title = "flags" if group.title in (None, "options") else group.title
            parts.append(f"## {title[0].upper()}{title[1:]}")
            parts += [_flag(action, parser) for action in actions]
    if parser.epilog:
        parts.append(f"```text\n{parser.epilog}```")
    return "\n\n".join(parts)


def _flag(action: Action, parser: Parser) -> str:
    """Return an entry of a definition list: the spellings with the value's name, and the help text with the default."""
    formatter = parser._get_formatter()
    *short, long = action.option_strings
    value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    names = ", ".join(f"`{flag}`" for flag in [*short, f"{long} {value}".rstrip()])
    return f"{names}{{ #{long.lstrip('-')} }}\n:   {_text(formatter._expand_help(action)) or ' '}"


def _text(text: str) -> str:
    """Escape a help text for Markdown; single line breaks become spaces."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~^=])", r"\\\1", text)
    return re.sub(r"(?<!\n)\n(?!\n)", " ", escaped)


def configs() -> dict[str, str]:
    """Return a page for each YAML in configs/ and models/: the file, whose comments say what its keys mean."""
    paths = [path for folder in ("configs", "models") for path in sorted((ROOT / folder).rglob("*.yaml"))]
    return {path.relative_to(ROOT).with_suffix("").as_posix(): _config(path) for path in paths}


def _config(path: Path) -> str:
    """Return the YAML behind its first comment, of which commands become blocks."""
    whole = path.read_text(encoding="utf-8")
    content = re.sub(r"\A(#.*\n)*", "", whole)
    text = re.sub(r"^# ?", "", whole.removesuffix(content), flags=re.MULTILINE)
    command = r"^(?:Then: )?((?:python|bash) (?:.*\\\n)*.*)\n"
    prose = re.split(command, text, flags=re.MULTILINE)  # a command after each text but the last
    prose[::2] = [part.replace("<", "&lt;") for part in prose[::2]]
    prose[1::2] = [f"\n```bash\n{part}\n```\n\n" for part in prose[1::2]]
    text = "".join(prose)
    return f"# {path.relative_to(ROOT)}\n\n{text}\n```yaml\n{content}```\n"


def python() -> dict[str, str]:
    """Return a page for each part of the Python interface, which mkdocstrings fills from the docstrings."""
    return {
        f"python/{title}": "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])
        for title, names in PYTHON.items()
    }
