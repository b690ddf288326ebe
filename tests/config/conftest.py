"""The toys are allowed targets; `yaml` writes config files."""

import pytest
from omegaconf import OmegaConf


@pytest.fixture(autouse=True)
def toys_are_allowed(monkeypatch):
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", ["tests"])


@pytest.fixture
def yaml(tmp_path):
    """A function that writes a YAML file and returns its path."""

    def write(content, name="a.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else OmegaConf.to_yaml(OmegaConf.create(content)))
        return path

    return write
