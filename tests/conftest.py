"""Settings for every test: no network, a frozen heap. Fixtures of the tiny text-to-image model that several files
share.
"""

import gc
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: the networks are tiny, and every core has a process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish():
    """Exclude the imported libraries from garbage collection: Lightning collects all of it after each fit."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from tests.tiny import save_text_model

    return save_text_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipeline(saved):
    from ldm.inference import load_model

    return load_model(saved.config, saved.ckpt, device="cpu", precision="full")


@pytest.fixture(scope="module")
def image():
    """Noise, 24x16 pixels."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
