"""Fixtures of the encoders' tests."""

import huggingface_hub
import pytest


@pytest.fixture
def no_hub(monkeypatch):
    """The Hugging Face hub, as on a machine without network and cache."""

    def fail(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
