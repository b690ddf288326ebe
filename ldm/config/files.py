"""YAML files as configs. They are data: tags that would make objects are errors, and so are aliases that unfold without end."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.instantiate import ConfigError

MAX_NODES = 100_000  # of a config, each counted as often as aliases repeat it; the largest published one has 200


def load_yaml(path: str | os.PathLike) -> DictConfig | ListConfig:
    """A YAML file as a config; ConfigError, in one line that names the file, where it is none, OSError where it cannot be opened."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            nodes = _unfolded(yaml.compose(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), {})
        if nodes > MAX_NODES:
            raise ConfigError(
                f"{path}: refused, because its aliases unfold to {nodes:,} entries; a config has at most {MAX_NODES:,}"
            )
        return OmegaConf.load(path)
    except ConfigError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a YAML file that can be read: {' '.join(str(error).split())[:300]}") from error


def _unfolded(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """How many entries a node has once every alias in it is a copy; endless for one that holds itself (RecursionError)."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_unfolded(child, sizes) for child in children)
    return sizes[id(node)]
