"""Writing of files: whole or absent, at every fault."""

import ast
import errno
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from ldm import atomic
from ldm.atomic import WriteError, atomic_file, atomic_folder, save_bytes, save_text, sweep_temporaries
from ldm.paths import ROOT
from tests.full.kills import WRITERS, run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def file_size_limit():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("before", [b"old", None])
def test_a_file_that_does_not_fit_is_absent_and_the_error_has_path_reason_and_bytes(tmp_path, file_size_limit, before):
    path = tmp_path / "a.yaml"
    if before:
        path.write_bytes(before)
    file_size_limit(1000)
    with pytest.raises(WriteError) as caught:
        save_bytes(path, bytes(5000))
    message = str(caught.value)
    assert message.startswith(f"{path}: could not be written: File too large") and caught.value.errno == errno.EFBIG
    assert "about 5,000 bytes are needed and " in message and " bytes are free; " in message and "\n" not in message
    assert message.endswith("the previous file is intact" if before else "nothing was left behind")
    assert names(tmp_path) == (["a.yaml"] if before else []) and (not before or path.read_bytes() == before)


def test_names_that_are_not_utf8_are_written_byte_for_byte(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    assert save_text(tmp_path / "classes.txt", f"{name}\r\n").read_bytes() == b"caf\xe9\r\n"


def test_text_that_cannot_be_appended_leaves_the_file_as_it_was(tmp_path, file_size_limit):
    path = save_text(tmp_path / "metrics.csv", "step\n")
    atomic.append_text(path, "1\n")
    file_size_limit(10)
    with pytest.raises(WriteError, match=r"metrics.csv: could not be written: File too large"):
        atomic.append_text(path, "2\n" * 100)
    atomic.append_text(path, "3\n")
    assert path.read_text() == "step\n1\n3\n"


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["file", "new file", "folder"])
@pytest.mark.parametrize("point", ["while writing", "before fsync", "before rename", "after rename"])
def test_kill_9_at_every_point_leaves_old_or_new_and_the_next_start_sweeps(tmp_path, kind, point):
    path = tmp_path / "result"
    if kind == "file":
        path.write_bytes(b"old")

    def write() -> None:
        if kind == "folder":
            with atomic_folder(path) as folder:
                (folder / "part").write_bytes(b"new")
                if point == "while writing":
                    die()
        else:
            with atomic_file(path, replace=kind == "file") as temporary:
                temporary.write_bytes(b"new")
                if point == "while writing":
                    die()

    def child() -> None:
        sync = atomic.sync
        if point == "before fsync":
            atomic.sync = die
        elif point == "before rename":
            os.replace = os.link = Path.rename = die
        elif point == "after rename":
            atomic.sync = lambda target: die() if target == tmp_path else sync(target)
        write()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    sweep_temporaries(tmp_path)
    new = point == "after rename"
    assert names(tmp_path) == (["result"] if new or kind == "file" else [])
    if new or kind == "file":
        written = path / "part" if kind == "folder" else path
        assert written.read_bytes() == (b"new" if new else b"old")


@pytest.mark.parametrize("kind", WRITERS)
def test_kill_9_at_random_moments_leaves_whole_files_of_every_kind(kind):
    (line,) = run([kind], kills=2)
    assert line.startswith(f"{kind}: 2 kills, ") and line.endswith("all whole")


def test_the_first_write_into_a_folder_sweeps_it_but_spares_living_writers_and_foreign_files(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_swept", set())
    abandoned, foreign = tmp_path / ".last.ckpt.0123456789ab.tmp", tmp_path / ".notes.tmp"
    abandoned.write_bytes(b"x")
    foreign.write_bytes(b"x")
    (tmp_path / ".out.0123456789ab.tmp" / "unet").mkdir(parents=True)
    with atomic.temporary_next_to(tmp_path / "a") as alive, atomic.temporary_next_to(tmp_path / "b", True) as folder:
        assert not abandoned.exists() and sweep_temporaries(tmp_path) == 0
        assert names(tmp_path) == sorted([alive.name, folder.name, foreign.name])
    assert names(tmp_path) == [foreign.name]


def test_a_taken_name_is_never_overwritten_without_replace(tmp_path, monkeypatch):
    path = save_text(tmp_path / "a.txt", "first")
    taken_later = save_text(tmp_path / "b.txt", "first")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # another run takes the name in this moment
    for target in (path, taken_later):
        with pytest.raises(FileExistsError):
            save_text(target, "second", replace=False)
        assert target.read_text() == "first"
    monkeypatch.undo()
    with pytest.raises(FileExistsError), atomic_folder(path):
        pass
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_a_file_system_without_hard_links_gets_new_files_too(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert save_text(tmp_path / "a.txt", "x", replace=False).read_text() == "x" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["ä" * 120, "日" * 80, "x" * 250])
def test_every_name_that_the_file_system_takes_can_be_written(tmp_path, name):
    assert save_text(tmp_path / name, "x").is_file()


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("pipe", "it is not a regular file"),  # as /dev/full
        ("folder", "it is a folder"),
        ("file/a.txt", "file is not a folder"),
        ("x" * 256, "File name too long"),
    ],
)
def test_places_that_hold_no_file_are_refused_by_name(tmp_path, place, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteError, match=f"{place}: could not be written: .*{reason}"):
        save_text(tmp_path / place, "x")
    assert names(tmp_path) == ["file", "folder", "pipe"]


def test_a_folder_that_vanished_is_made_again(tmp_path):
    save_text(tmp_path / "a" / "1.txt", "x").unlink()
    (tmp_path / "a").rmdir()
    assert save_text(tmp_path / "a" / "2.txt", "x").is_file()


def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    assert save_text(tmp_path / "a", "x").stat().st_mode == (tmp_path / "usual").stat().st_mode


FILES = sorted((*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "main.py"))
WRITES = {
    "write_text",
    "write_bytes",
    "savez",
    "savez_compressed",
    "tofile",
    "save_file",
    "write_index",
    "savefig",
    "touch",
}
WRITES |= {"open_memmap", "TemporaryDirectory", "NamedTemporaryFile", "mkstemp", "mkdtemp", "to_csv", "to_parquet"}
WRITES |= {"copyfile", "copy2", "copytree", "symlink", "link", "hardlink_to", "symlink_to"}
OF = {"save": {"torch", "np", "numpy", "OmegaConf", "image", "figure", "plt"}, "replace": {"os"}, "rename": {"os"}}
OF |= {"copy": {"shutil"}, "move": {"shutil"}}
INSIDE = {  # a file -> its calls that write to memory, or to a temporary file of `ldm.atomic`
    "ldm/callbacks/checkpoints.py": {"open(temporary, 'wb')"},
    "ldm/checkpoint/write.py": {"torch.save(content, file)", "save_file(tensors, target, dict(metadata or {}))"},
    "ldm/training/launch.py": {"open(file, 'a+')"},  # the lock of a run directory
    "ldm/training/class_images.py": {"open(folder / '.lock', 'a+')"},  # the lock of a folder
    "ldm/data/archives.py": {"part.open('wb')", "target.open('xb')"},
    "ldm/data/shard_writer.py": {"temporary.open('wb')", "image.save(file, 'JPEG', quality=layout.quality)"},
    "ldm/data/shards.py": {
        "lock.touch()",
        "temporary.open('wb')",
        "np.savez_compressed(file, **arrays)",
    },
    "ldm/training/cache_latents.py": {"lock.touch()"},
    "ldm/evaluation/features.py": {"temporary.open('wb')", "np.savez(file, key=np.array(text), **arrays)"},
    "ldm/evaluation/sampling.py": {
        "temporary.open('wb')",
        "np.savez(file, arr_0=images, seconds=np.float64(seconds))",
    },
    "ldm/output/images.py": {"image.save(data, 'PNG', pnginfo=info)"},
    "ldm/web/server.py": {"tempfile.TemporaryDirectory(prefix='ldm-app-', ignore_cleanup_errors=True)"},
    "ldm/web/page.py": {"shutil.copyfile(file, copy)"},  # of the browser, in a temporary folder
    "ldm/output/sample_array.py": {
        "self._temporary.open('wb')",
        "zipfile.ZipFile(self._file, 'w', zipfile.ZIP_STORED)",
        "self._archive.open('arr_0.npy', 'w', force_zip64=True)",
        "self._archive.open('arr_1.npy', 'w')",
    },
    "ldm/retrieval/searcher.py": {"import_faiss().write_index(self.index, str(new))"},
    "ldm/retrieval/clip.py": {
        "new.open('wb')",
        "np.savez(file, embedding=embedding, img_id=np.array(names), patch_coords=coords)",
    },
}


def direct_writes(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        owner, constants = owner.rpartition(".")[2], [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
        modes = [x for x in constants if isinstance(x, str) and 0 < len(x) <= 3 and set(x) <= set("rwaxbt+")]
        direct = name in WRITES or owner in OF.get(name, ())
        direct |= name in ("open", "FileIO", "ZipFile") and any(set(mode) & set("wax+") for mode in modes)
        direct |= name in ("dump", "safe_dump") and (
            len(node.args) > 1 or any(k.arg == "stream" for k in node.keywords)
        )
        if direct:
            found.append(ast.unparse(node))
    return found


def test_nothing_but_the_writer_writes_files():
    for file in FILES:
        place = file.relative_to(ROOT).as_posix()
        if place != "ldm/atomic.py":
            others = set(direct_writes(file.read_text(encoding="utf-8"))) - INSIDE.get(place, set())
            assert not others, f"{place}: {others}: write files with ldm.atomic"


@pytest.mark.parametrize(
    "line",
    [
        *("open(path, 'w')", "path.open(mode='wb')", "open(path, 'a', encoding='utf-8')", "path.write_text(x)"),
        *(
            "image.save(path)",
            "OmegaConf.save(x, path)",
            "torch.save(x, path)",
            "np.savez(path, x)",
            "np.save(path, x)",
        ),
        *("json.dump(x, file)", "yaml.safe_dump(x, stream=file)", "array.tofile(path)", "ZipFile(path, 'x')"),
        *("os.replace(a, path)", "shutil.copyfile(a, path)", "tempfile.mkstemp()"),
    ],
)
def test_every_kind_of_direct_write_is_seen(line):
    assert direct_writes(line)


def test_a_lack_of_memory_while_writing_is_no_write_error(tmp_path):
    class OutOfMemoryError(RuntimeError):
        """As torch's."""

    for error in (
        OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: no memory"),
        MemoryError(),
    ):
        with pytest.raises(type(error)), atomic_file(tmp_path / "a") as temporary:
            temporary.write_bytes(b"half")
            raise error
    with pytest.raises(WriteError, match="could not be written: failed"), atomic_file(tmp_path / "a"):
        raise RuntimeError("failed")
    assert not list(tmp_path.iterdir())
