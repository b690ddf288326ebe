"""Nearest neighbors of CLIP vectors, on databases of a few random ones."""

import json

import numpy as np
import pytest

from ldm.retrieval import searcher as retrieval
from ldm.retrieval.database import Database
from ldm.retrieval.searcher import Searcher
from tests.retrieval.databases import cosines, vectors, write_database

pytest.importorskip("faiss")


def test_the_nearest_come_first_whatever_their_length(tmp_path):
    database, queries = Database(write_database(tmp_path, 30, 20)), 3 * vectors(4, seed=9)
    found = Searcher.train(database, 5).search(queries, 7)
    exact = cosines(database, queries)
    assert np.array_equal(found.ids, np.argsort(-exact, axis=1)[:, :7])
    assert np.allclose(found.cosine, -np.sort(-exact, axis=1)[:, :7], atol=1e-5)
    assert np.array_equal(found.embedding, database.embedding(found.ids)) and found.embedding.dtype == np.float32


def test_an_inverted_file_finds_nearly_all_with_few_lists(tmp_path):
    database, queries = Database(write_database(tmp_path, 4000, 2000, dim=32)), vectors(50, 32, seed=9)
    searcher = Searcher.train(database, 10, exact_up_to=100)
    found, exact = searcher.search(queries, 10), cosines(database, queries)
    truth = np.argsort(-exact, axis=1)[:, :10]
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found.ids, truth)])
    assert recall > 0.9 and searcher.record["recall"] >= 0.95 and 1 < searcher.index.nprobe < searcher.index.nlist
    assert np.allclose(
        found.cosine, np.take_along_axis(exact, found.ids, 1), atol=1e-5
    )  # those of the vectors, not of their bytes
    assert (np.diff(found.cosine) <= 0).all()
    searcher.index.nprobe = 1  # a list holds about 20 vectors: more than are asked for, fewer than are proposed
    few = searcher.search(queries, 8)
    assert (few.ids >= 0).all() and np.allclose(few.cosine, np.take_along_axis(exact, few.ids, 1), atol=1e-5)
    everything = searcher.search(queries[:2], 3000)  # more than a list holds
    assert (everything.ids >= 0).all() and len(np.unique(everything.ids[0])) == 3000


@pytest.mark.parametrize("exact_up_to", [100, 1000])
def test_a_saved_searcher_finds_the_same(tmp_path, exact_up_to):
    database, queries = Database(write_database(tmp_path / "data", 500)), vectors(3, seed=5)
    searcher = Searcher.train(database, 10, exact_up_to=exact_up_to)
    for _ in range(2):  # a second one replaces the first
        searcher.save(tmp_path / "index")
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == ["index.faiss", "searcher.json"]
    loaded = Searcher.of(database, tmp_path / "index")
    assert getattr(loaded.index, "nprobe", None) == getattr(searcher.index, "nprobe", None)
    for a, b in zip(searcher.search(queries, 10), loaded.search(queries, 10), strict=True):
        assert np.array_equal(a, b)


def test_a_searcher_of_another_database_is_refused(tmp_path, monkeypatch):
    database = Database(write_database(tmp_path / "data", 20))
    Searcher.train(database, 3).save(tmp_path / "index")
    other = Database(write_database(tmp_path / "data", 20, 3))
    with pytest.raises(ValueError, match=r"another state .*train_searcher.py -d"):
        Searcher.of(other, tmp_path / "index")
    (tmp_path / "index" / "index.faiss").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"index.faiss: cannot be read"):
        Searcher.load(database, tmp_path / "index")
    (tmp_path / "index" / "searcher.json").write_text("[]")
    with pytest.raises(ValueError, match="not a searcher's record"):
        Searcher.load(database, tmp_path / "index")
    assert len(Searcher.of(other, tmp_path / "none").search(vectors(1), 23).ids[0]) == 23  # small: indexed on the spot
    monkeypatch.setattr(retrieval, "EXACT_UP_TO", 10)
    with pytest.raises(ValueError, match=r"train_searcher.py -d"):
        Searcher.of(other, tmp_path / "none")


def test_invalid_searches_are_refused(tmp_path, monkeypatch):
    searcher = Searcher.train(Database(write_database(tmp_path, 5)), 1)
    for knn in (0, 6):
        with pytest.raises(ValueError, match=f"--knn {knn}: choose 1 to 5"):
            searcher.search(vectors(1), knn)
    with pytest.raises(ValueError, match="16 values"):
        searcher.search(vectors(1, 8), 1)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        searcher.train(searcher.database, 1)


def test_the_record_identifies_the_database_of_an_index(tmp_path):
    database = Database(write_database(tmp_path / "data", 5, 3))
    _, path = Searcher.train(database, 2).save(tmp_path / "index")
    record = json.loads(path.read_text())
    assert [part[:2] for part in record["parts"]] == [["part_0.npz", 5], ["part_1.npz", 3]]
    assert (record["dim"], record["knn"], record["recall"]) == (16, 2, 1.0)
