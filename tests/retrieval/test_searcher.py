"""Nearest neighbors of CLIP vectors, on databases of a few random ones."""

import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.retrieval import searcher as retrieval
from ldm.retrieval.clip import RetrievalCondition, embed_folder
from ldm.retrieval.database import DATABASES, Database, find_database, read_array, searcher_folder, unit
from ldm.retrieval.searcher import Searcher
from tests.reference import randn

pytest.importorskip("faiss")


def vectors(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim))


def write_database(folder, *sizes: int, dim: int = 16, dtype=np.float16, save=np.savez):
    """Parts of `sizes` random vectors of different lengths in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, n in enumerate(sizes):
        length = np.random.default_rng(100 + k).uniform(1, 20, (n, 1))
        place = np.zeros((n, 4), np.float32)
        embedding = (length * vectors(n, dim, k)).astype(dtype)
        save(folder / f"part_{k}.npz", embedding=embedding, img_id=np.arange(n) + 1000 * k, patch_coords=place)
    return folder


def cosines(database: Database, queries: np.ndarray) -> np.ndarray:
    return unit(queries) @ unit(database.embedding(np.arange(len(database)))).T


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_vectors_are_numbered_through_all_parts(tmp_path, save):
    database = Database(write_database(tmp_path, 5, 1, 7, save=save))
    stored = np.concatenate([np.load(file)["embedding"] for file in sorted(tmp_path.iterdir())])
    assert (len(database), database.dim) == (13, 16)
    ids = np.array([[12, 0, 5], [6, 4, 12]])
    assert np.array_equal(database.embedding(ids), stored[ids].astype(np.float32))
    assert database.img_id(np.array([0, 4, 5, 12])) == [0, 4, 1000, 2006]
    assert np.allclose(np.concatenate(list(database.units(3))), unit(stored))
    assert isinstance(database.parts[0], np.memmap) == (save is np.savez)  # a part that is not compressed stays on disk


def test_a_zero_vector_stays_zero():
    assert np.array_equal(unit(np.zeros((1, 4), np.float16)), np.zeros((1, 4), np.float32))


def broken(folder, **arrays):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "part.npz", **arrays)
    return folder


def test_what_is_no_database_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no .npz parts"):
        Database(tmp_path)
    for name, value in (("one", np.zeros(3)), ("whole", np.zeros((2, 3), int)), ("empty", np.zeros((0, 3)))):
        with pytest.raises(ValueError, match=r"part.npz: embedding has shape"):
            Database(broken(tmp_path / name, embedding=value))
    with pytest.raises(ValueError, match="no array 'embedding'"):
        Database(broken(tmp_path / "other", embeddings=np.zeros((2, 3))))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text.npz"):
        Database(tmp_path)
    write_database(tmp_path / "two", 3)
    np.savez(tmp_path / "two" / "z.npz", embedding=np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"z.npz: .*expected \(N, 16\)"):
        Database(tmp_path / "two")
    nan = Database(broken(tmp_path / "nan", embedding=np.full((2, 3), np.nan)))
    with pytest.raises(ValueError, match="non-finite"):
        Searcher.train(nan, 1)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_part_runs_no_code(tmp_path, save):
    save(tmp_path / "part.npz", embedding=vectors(2), img_id=np.array([print, 1], dtype=object))
    with pytest.raises(ValueError, match=r"part.npz: img_id"):
        read_array(tmp_path / "part.npz", "img_id")
    assert Database(tmp_path).img_id(np.array([1])) == [1]  # its own number


def test_the_nearest_come_first_whatever_their_length(tmp_path):
    database, queries = Database(write_database(tmp_path, 30, 20)), 3 * vectors(4, seed=9)
    found = Searcher.train(database, 5).search(queries, 7)
    exact = cosines(database, queries)
    assert np.array_equal(found.ids, np.argsort(-exact, axis=1)[:, :7])
    assert np.allclose(found.cosine, -np.sort(-exact, axis=1)[:, :7], atol=1e-5)
    assert np.array_equal(found.embedding, database.embedding(found.ids)) and found.embedding.dtype == np.float32


def test_an_inverted_file_finds_nearly_all_of_them_and_searches_no_more_than_that_takes(tmp_path):
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


def test_what_cannot_be_searched_is_refused(tmp_path, monkeypatch):
    searcher = Searcher.train(Database(write_database(tmp_path, 5)), 1)
    for knn in (0, 6):
        with pytest.raises(ValueError, match=f"--knn {knn}: choose 1 to 5"):
            searcher.search(vectors(1), knn)
    with pytest.raises(ValueError, match="16 values"):
        searcher.search(vectors(1, 8), 1)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        searcher.train(searcher.database, 1)


class Clip:
    """Texts as unit vectors by their length, `n_repeat` times."""

    width, version = 16, "toy"

    def encode(self, texts):
        return torch.nn.functional.normalize(torch.stack([randn(len(text), 16) for text in texts]), dim=-1)[
            :, None
        ].repeat(1, 2, 1)


def test_a_context_is_the_text_and_then_its_neighbors_at_length_one(tmp_path, caplog):
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


def test_guidance_leads_away_from_the_negative_prompt_and_is_not_there_at_scale_1(tmp_path):
    searcher = Searcher.train(Database(write_database(tmp_path, 30)), 1)
    cond, uncond = RetrievalCondition(Clip(), searcher, 4, "blurry", 5.0)(["a", "bc"])
    assert torch.equal(uncond, RetrievalCondition(Clip(), searcher, 4)(["blurry"] * 2)[0]) and not torch.equal(
        cond, uncond
    )
    assert RetrievalCondition(Clip(), searcher, 4, scale=1.0)(["a"])[1] is None
    assert RetrievalCondition(Clip(), None)(["a"])[0].shape == (1, 2, 16)
    with pytest.raises(ValueError, match="those of CLIP toy 8"):
        RetrievalCondition(SimpleNamespace(width=8, version="toy"), searcher, 4)


def test_a_folder_of_pictures_becomes_a_database(tmp_path):
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


def test_databases_have_the_published_names_and_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*retrieval_databases/artbench-surrealism; unpack"):
        find_database("artbench-surrealism")
    with pytest.raises(FileNotFoundError, match="artbench-ukiyo_e"):
        find_database("artbench")
    (tmp_path / "data/rdm/retrieval_databases/openimages").mkdir(parents=True)
    assert find_database("openimages").is_dir() and find_database(str(tmp_path)) == tmp_path
    assert len(DATABASES) == 11 and searcher_folder("openimages").as_posix() == "data/rdm/searchers/openimages"


def test_a_record_says_what_the_index_was_made_of(tmp_path):
    database = Database(write_database(tmp_path / "data", 5, 3))
    _, path = Searcher.train(database, 2).save(tmp_path / "index")
    record = json.loads(path.read_text())
    assert [part[:2] for part in record["parts"]] == [["part_0.npz", 5], ["part_1.npz", 3]]
    assert (record["dim"], record["knn"], record["recall"]) == (16, 2, 1.0)
