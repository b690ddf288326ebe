"""Load untrusted YAML and JSON files: the result is plain data, or the error is one line."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.instantiate import ConfigError

_FIRST, _LAST = "# complete if it ends with: # end of file", "# end of file"
MAX_NODES = 100_000  # entries of a config after alias expansion; the largest published config has 200


def load_yaml(path: str | os.PathLike) -> DictConfig | ListConfig:
    """Load a YAML file as a config.

    Raises ConfigError for invalid YAML, for tags that would build Python objects and for alias bombs; OSError if the
    file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.startswith(_FIRST) and f"\n{_LAST}" not in text:  # lines may be added after it
            raise ConfigError(f"{path}: damaged: its end is missing")
        nodes = _count_nodes(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), {})
        if nodes <= MAX_NODES:
            return OmegaConf.load(io.StringIO(text))
    except ConfigError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: invalid YAML: {' '.join(str(error).split())[:300]}") from error
    raise ConfigError(f"{path}: its aliases expand to {nodes:,} entries; the limit is {MAX_NODES:,}")


def config_text(config: DictConfig) -> str:
    """Return a config as YAML; `load_yaml` refuses a file with a part of this text."""
    return f"{_FIRST}\n{OmegaConf.to_yaml(config)}{_LAST}\n"


def load_json(path: str | os.PathLike) -> dict[str, Any]:
    """Load the JSON object in a file; raise ValueError for other content, OSError if the file cannot be read."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _count_nodes(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Count the entries of a node with every alias expanded; a node that contains itself raises RecursionError."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_count_nodes(child, sizes) for child in children)
    return sizes[id(node)]
