"""Names, copies and indices of tar shards."""

import os
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ldm.data import shards
from ldm.data.base import DataConfigError
from ldm.data.shards import ShardError, Store, build_indices, expand, index_path
from tests.data.layouts import image_bytes, save_shard, save_shards


def test_names_may_be_ranges_patterns_folders_and_lists(tmp_path):
    paths = [str(path) for path in save_shards(tmp_path, 3, 1)]
    for given in (
        f"{tmp_path}/{{00000..00002}}.tar",
        f"{tmp_path}/*.tar",
        str(tmp_path),
        paths,
        [paths[0], str(tmp_path)],
    ):
        assert expand(given) == paths
    (tmp_path / "link.tar").symlink_to(paths[2])  # one shard counts once, however its path is written
    spellings = [paths[0], f"{tmp_path}/../{tmp_path.name}/00000.tar", paths[2], f"{tmp_path}/link.tar"]
    assert expand(spellings) == [paths[0], paths[2]]
    assert expand("s3://bucket/{0..1}.tar") == ["s3://bucket/0.tar", "s3://bucket/1.tar"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no/{0..1}.tar", "shards 'no/0.tar': no such file; set shards to .tar files"),
        ("tests/data", "has no .tar files"),
        ("x/{0..", "set shards to e.g. data/{00000..00039}.tar"),
        ([], "names no shards"),
    ],
)
def test_names_of_nothing_are_refused(given, message):
    with pytest.raises(DataConfigError) as error:
        expand(given)
    assert message in str(error.value)


def test_a_config_runs_no_command_unless_the_command_line_allows_it(tmp_path, monkeypatch):
    [path] = save_shards(tmp_path, 1, 2)
    name = f"pipe:cat {path}"
    with pytest.raises(DataConfigError, match=r"a config may not run commands; .* or pass --allow-pipe"):
        expand(name)
    monkeypatch.setattr(shards, "_pipes_allowed", True)
    store = Store(tmp_path / "cache")
    assert expand(name) == [name] and store.index(name).keys == ["000", "001"]
    assert store.path(name).read_bytes() == path.read_bytes()
    with pytest.raises(ShardError, match="pipe:false: cannot be copied"):
        store.path("pipe:false")


def test_an_index_holds_places_sizes_fields_and_lengths(tmp_path):
    members = {
        "a/1.png": image_bytes(0, 5, 7),
        "a/1.txt": " word \n",
        "a/1.json": {"x": 2, "ok": True, "t": ["a", "bcd"]},
    }
    members |= {"a/2.PNG": image_bytes(1, 3, 4), "a/2.depth.png": image_bytes(2, 6, 6), "readme": "no sample"}
    path = save_shard(tmp_path / "0.tar", members)
    index = Store(tmp_path / "cache").index(str(path))
    assert index.keys == ["a/1", "a/2"] and index.problems == {} and not index.damage
    content = path.read_bytes()
    for name, (key, suffix) in {
        "a/1.png": (0, "png"),
        "a/2.PNG": (1, "png"),
        "a/2.depth.png": (1, "depth.png"),
    }.items():
        offset, size = index.members[suffix][key, :2]
        assert content[offset : offset + size] == members[name]
        assert index.members[suffix][key, 4] == shards.content_hash(members[name])
    assert index.member(["png"])[:, 2:4].tolist() == [[7, 5], [4, 3]]
    assert index.members["txt"][:, 2].tolist() == [4, -1] and index.member(["jpg"])[:, 1].tolist() == [-1, -1]
    assert index.numbers["x"][0] == 2 and index.numbers["ok"][0] == 1 and np.isnan(index.numbers["x"][1])
    assert index.texts["t"].tolist() == [3, 0]


def test_an_index_is_built_once_and_again_when_its_shard_changed(tmp_path, monkeypatch):
    [path] = save_shards(tmp_path, 1, 2)
    store, built = Store(tmp_path / "cache"), []
    build = shards._build
    monkeypatch.setattr(shards, "_build", lambda path: built.append(path) or build(path))
    for _ in range(2):
        assert len(store.index(str(path)).keys) == 2
    assert len(built) == 1 and index_path(path).name == "00000.index.npz"
    os.utime(path, ns=(0, 0))
    store.index(str(path))
    assert len(built) == 2


def test_an_index_that_is_damaged_anywhere_is_built_again(tmp_path):
    [path] = save_shards(tmp_path, 1, 2)
    store, place = Store(tmp_path / "cache"), index_path(path)
    store.index(str(path))
    whole, stat = place.read_bytes(), path.stat()
    for at in range(0, len(whole), len(whole) // 40):
        place.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        shards._read(place, stat.st_size, stat.st_mtime_ns)
    np.savez_compressed(place, head=np.frombuffer(b"[1]", np.uint8))
    assert store.index(str(path)).keys == ["000", "001"]


def test_files_of_several_tars_are_damaged_after_the_first(tmp_path):
    paths = save_shards(tmp_path, 2, 2)
    path = tmp_path / "both.tar"
    path.write_bytes(b"".join(each.read_bytes() for each in paths))
    index = Store(tmp_path / "cache").index(str(path))
    assert index.keys == ["000", "001"] and "are these several tar files in one?" in index.damage


def test_names_that_are_not_utf8_and_deeply_nested_json_are_read(tmp_path):
    members = {"caf\udce9.png": image_bytes(0), "b.png": image_bytes(1), "b.json": "[" * 100_000}
    path = save_shard(tmp_path / "caf\udce9.tar", members)
    index = Store(tmp_path / "cache").index(str(path))
    assert index.keys == ["caf\udce9", "b"] and "maximum recursion depth" in index.problems[1]
    assert Store(tmp_path / "cache").index(str(path)).keys == index.keys


def test_an_index_is_in_the_cache_if_the_folder_is_read_only(tmp_path, monkeypatch):
    [path] = save_shards(tmp_path / "data", 1, 2)
    write = shards._write

    def refuse(place, *rest):
        if place.parent == path.parent:
            raise shards.WriteError("read-only")
        write(place, *rest)

    monkeypatch.setattr(shards, "_write", refuse)
    store = Store(tmp_path / "cache")
    build_indices([str(path)], store)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_build", None)
        assert len(store.index(str(path)).keys) == 2 and not index_path(path).exists()
    with pytest.raises(
        DataConfigError, match=r"cannot take .* of .*00000.tar: read-only; set cache to a folder that can"
    ):
        Store(path.parent).index(str(path))


def test_copies_in_a_read_only_cache_are_used(tmp_path, remote, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    store = Store(tmp_path / "cache")
    copy = store.path(remote[0])
    monkeypatch.setattr(Path, "touch", refuse)
    assert store.path(remote[0]) == copy
    with pytest.raises(DataConfigError, match=r"cannot take .* of memory://shards/00001.tar: read-only; set cache to"):
        store.path(remote[1])


@pytest.fixture
def remote(tmp_path):
    """URLs of three shards in memory, without their indices."""
    files = fsspec.filesystem("memory")
    urls = []
    for path in save_shards(tmp_path / "made", 3, 2):
        urls.append(f"memory://shards/{path.name}")
        files.pipe(f"/shards/{path.name}", path.read_bytes())
    yield urls
    files.rm("/shards", recursive=True)


def test_remote_shards_are_copied_once_and_the_copies_keep_a_size(tmp_path, remote):
    assert expand("memory://shards/{00000..00002}.tar") == remote
    assert [Path(url).name for url in expand("memory://shards/*.tar")] == [Path(url).name for url in remote]
    size = Path(tmp_path / "made/00000.tar").stat().st_size
    store = Store(tmp_path / "cache", 2.5 * size)
    first, second = (store.path(url) for url in remote[:2])
    assert first.read_bytes() == (tmp_path / "made/00000.tar").read_bytes()
    os.utime(first, (1, 1))
    assert store.path(remote[0]) == first and first.stat().st_mtime > 1  # used again
    os.utime(second, (2, 2))
    store.path(remote[2])
    assert first.exists() and not second.exists()
    with pytest.raises(ShardError, match=r"memory://shards/9.tar: cannot be copied: (?!.*written)"):
        store.path("memory://shards/9.tar")


def test_only_copies_make_room(tmp_path, remote):
    mine = tmp_path / "cache/mine.tar"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    store = Store(mine.parent, 1.0)
    copies = [store.path(url) for url in remote]
    assert mine.is_file() and [copy.exists() for copy in copies] == [False, False, True]


def test_a_pattern_leaves_out_what_is_written_beside_shards(tmp_path):
    paths = [str(path) for path in save_shards(tmp_path, 2, 1)]
    build_indices(paths, Store())
    (tmp_path / "shards.json").write_text("{}")
    assert expand(f"{tmp_path}/*") == paths


def test_any_error_of_a_protocol_names_the_shard(tmp_path, remote, monkeypatch):
    class Forbidden(Exception):
        pass

    def refuse(*_):
        raise Forbidden("403")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", refuse)
    with pytest.raises(ShardError, match=r"memory://shards/00000.tar: cannot be copied: 403"):
        Store(tmp_path / "cache").index(remote[0])


def test_an_index_next_to_a_remote_shard_spares_copying_it(tmp_path, remote):
    Store(tmp_path / "x").index(str(tmp_path / "made/00000.tar"))
    published = tmp_path / "made/00000.index.npz"
    fsspec.filesystem("memory").pipe("/shards/00000.index.npz", published.read_bytes())
    store = Store(tmp_path / "cache")
    assert store.index(remote[0]).keys == ["000", "001"] and not list((tmp_path / "cache").glob("*.tar"))
    assert store.index(remote[1]).keys == ["002", "003"] and len(list((tmp_path / "cache").glob("*.tar"))) == 1


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(ImportError, match=r"shards need webdataset: pip install -e \"\.\[streams\]\""):
        expand("x.tar")
