"""Databases of CLIP vectors: layout, refusals, published names."""

import numpy as np
import pytest

from ldm.retrieval.database import DATABASES, Database, find_database, read_array, searcher_folder, unit
from ldm.retrieval.searcher import Searcher
from tests.retrieval.databases import vectors, write_database

pytest.importorskip("faiss")


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


def test_an_invalid_database_is_refused_in_one_line(tmp_path):
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


def test_databases_have_the_published_names_and_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*retrieval_databases/artbench-surrealism; unpack"):
        find_database("artbench-surrealism")
    with pytest.raises(FileNotFoundError, match="artbench-ukiyo_e"):
        find_database("artbench")
    (tmp_path / "data/rdm/retrieval_databases/openimages").mkdir(parents=True)
    assert find_database("openimages").is_dir() and find_database(str(tmp_path)) == tmp_path
    assert len(DATABASES) == 11 and searcher_folder("openimages").as_posix() == "data/rdm/searchers/openimages"
