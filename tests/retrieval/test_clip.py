"""CLIP vectors of prompts and of images."""

import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.retrieval.clip import RetrievalCondition, embed_folder
from ldm.retrieval.database import Database, read_array, unit
from ldm.retrieval.searcher import Searcher
from tests.reference import randn
from tests.retrieval.databases import cosines, write_database

pytest.importorskip("faiss")


class Clip:
    """Texts as unit vectors by their length, `n_repeat` times."""

    width, version = 16, "toy"

    def encode(self, texts):
        return torch.nn.functional.normalize(torch.stack([randn(len(text), 16) for text in texts]), dim=-1)[
            :, None
        ].repeat(1, 2, 1)


def test_a_context_is_the_text_then_its_neighbors_as_unit_vectors(tmp_path, caplog):
    database = Database(write_database(tmp_path, 30))
    encode = RetrievalCondition(Clip(), Searcher.train(database, 1), knn=4, scale=5.0)
    with caplog.at_level("INFO"):
        cond, uncond = encode(["a cat", "a house", "a cat"])
        encode(["a cat"])
    assert cond.shape == (3, 6, 16) and torch.equal(cond[:, :2], Clip().encode(["a cat", "a house", "a cat"]))
    order = np.argsort(-cosines(database, cond[:, 0].numpy()), axis=1)[:, :4]
    assert np.array_equal(cond[:, 2:].numpy(), unit(database.embedding(order)))
    assert torch.allclose(cond.norm(dim=-1), torch.ones(3, 6), atol=1e-5)
    assert torch.equal(uncond, torch.zeros_like(cond))
    assert caplog.text.count("'a cat'") == 1 and str(order[0, 0]) in caplog.text


def test_the_unconditional_context_is_the_negative_prompt_or_zeros(tmp_path):
    searcher = Searcher.train(Database(write_database(tmp_path, 30)), 1)
    cond, uncond = RetrievalCondition(Clip(), searcher, 4, "blurry", 5.0)(["a", "bc"])
    assert torch.equal(uncond, RetrievalCondition(Clip(), searcher, 4)(["blurry"] * 2)[0]) and not torch.equal(
        cond, uncond
    )
    assert RetrievalCondition(Clip(), searcher, 4, scale=1.0)(["a"])[1] is None
    assert RetrievalCondition(Clip(), None)(["a"])[0].shape == (1, 2, 16)
    with pytest.raises(ValueError, match="those of CLIP toy 8"):
        RetrievalCondition(SimpleNamespace(width=8, version="toy"), searcher, 4)


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    class Broken(Clip, torch.nn.Module):
        size, device = 8, torch.device("cpu")

        def encode(self, texts):
            return super().encode(texts) * float("nan")

        def forward(self, x):
            return x.mean(dim=(2, 3)) * float("inf")

    with pytest.raises(ValueError, match="vectors are not finite"):
        RetrievalCondition(Broken(), None)(["a"])
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    with pytest.raises(ValueError, match="vectors are not finite"):
        embed_folder(tmp_path / "in", tmp_path / "out", Broken())
    assert not (tmp_path / "out").exists()


def test_a_folder_of_images_becomes_a_database(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    colors = {"a.png": (255, 0, 0), "sub/b.jpg": (0, 255, 0), "sub/c.png": (0, 0, 255)}
    for name, color in colors.items():
        Image.new("RGB", (30, 20), color).save(tmp_path / "in" / name)

    class Mean(torch.nn.Module):
        size, device = 8, torch.device("cpu")

        def forward(self, x):
            assert x.shape[1:] == (3, 8, 8)
            return x.mean(dim=(2, 3))

    part = embed_folder(tmp_path / "in", tmp_path / "out", Mean(), batch_size=2)
    database = Database(tmp_path / "out")
    assert np.allclose(database.embedding(np.arange(3)), 2 * np.eye(3) - 1, atol=0.05)
    assert database.img_id(np.arange(3)) == ["a.png", "sub/b.jpg", "sub/c.png"]
    assert np.allclose(read_array(part, "patch_coords"), [5 / 30, 0, 25 / 30, 1])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["part-000.npz"] and zipfile.is_zipfile(part)
    with pytest.raises(ValueError, match="exists already"):
        embed_folder(tmp_path / "in", tmp_path / "out", Mean())
    with pytest.raises(ValueError, match="no images"):
        embed_folder(tmp_path / "out", tmp_path / "new", Mean())
