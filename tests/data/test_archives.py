"""Archives: whole or not at all, and never a file outside the folder."""

import io
import os
import tarfile
import zipfile

import pytest

from ldm.data import archives
from ldm.data.archives import ArchiveError, Remote, fetch, unpack


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info is not content:
                info.size = len(content)
            archive.addfile(info, None if info is content else io.BytesIO(content))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def link(kind, target):
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, target
    return info


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


CONTENT = {"a.txt": b"a", "sub/b.txt": b"b" * 5000}


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_what_was_packed_comes_out(tmp_path, name):
    archive = tmp_path / name
    write_zip(archive, CONTENT) if name.endswith("zip") else write_tar(
        archive, CONTENT, "w:gz" if "gz" in name else "w"
    )
    unpack(archive, tmp_path / "new/out")
    assert (
        files(tmp_path / "new/out") == set(CONTENT)
        and (tmp_path / "new/out/sub/b.txt").read_bytes() == CONTENT["sub/b.txt"]
    )
    assert os.listdir(tmp_path / "new") == ["out"]


def test_archives_in_an_archive_become_folders(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", CONTENT).read_bytes()
    unpack(write_tar(tmp_path / "x.tar", {"n01.tar": inner, "n02.tar": inner}), tmp_path / "out", nested=True)
    assert files(tmp_path / "out") == {f"{n}/{name}" for n in ("n01", "n02") for name in CONTENT}


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/ldm-outside.txt", "a/../../out.txt", "..\\out.txt"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_that_leave_the_folder_are_refused_before_anything_is_written(tmp_path, name, kind):
    write = write_tar if kind == "tar" else write_zip
    archive = write(tmp_path / f"x.{kind}", {"good.txt": b"x", name: b"x"})
    with pytest.raises(ArchiveError, match="lies outside the folder"):
        unpack(archive, tmp_path / "out")
    assert os.listdir(tmp_path) == [archive.name] and not os.path.exists("/tmp/ldm-outside.txt")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    archive = write_tar(tmp_path / "x.tar", {"link": link(kind, "/etc/passwd")})
    with pytest.raises(ArchiveError, match="is a link or a device"):
        unpack(archive, tmp_path / "out")
    assert os.listdir(tmp_path) == ["x.tar"]


def test_a_link_in_a_zip_file_is_refused(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc")
    with pytest.raises(ArchiveError, match="is a link or a device"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


def test_a_bomb_is_refused_for_the_space_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 4000})())
    with pytest.raises(ArchiveError, match=r"needs 5,001 bytes or more, but .* has 4,000 free"):
        unpack(write_zip(tmp_path / "x.zip", CONTENT), tmp_path / "out")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_damaged_archive_leaves_nothing_behind(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    write_zip(path, CONTENT) if kind == "zip" else write_tar(path, CONTENT, "w:gz" if "gz" in kind else "w")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ArchiveError, match=f"x.{kind}: "):
        unpack(path, tmp_path / "out")
    assert os.listdir(tmp_path) == [path.name]


def test_a_member_that_comes_twice_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a"), io.BytesIO())
    with pytest.raises(ArchiveError, match="'a' appears twice"):
        unpack(tmp_path / "x.tar", tmp_path / "out")


def test_a_folder_that_another_process_has_finished_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    unpack(write_zip(tmp_path / "x.zip", CONTENT), tmp_path / "out")
    assert files(tmp_path) == {"x.zip", "out/mine"}


class Response(io.BytesIO):
    def __init__(self, content, length=None):
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content) if length is None else length)}


def test_a_download_is_kept_only_if_it_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "urlopen", lambda url, timeout: Response(b"x"))
    assert fetch(Remote("https://e.org/f", "f"), tmp_path).read_bytes() == b"x"
    monkeypatch.setattr(archives, "urlopen", lambda url, timeout: Response(b"x", 2))
    assert fetch(Remote("https://e.org/f", "f"), tmp_path).read_bytes() == b"x"  # exists: not downloaded again
    with pytest.raises(ArchiveError, match="received 1 of 2 bytes"):
        fetch(Remote("https://e.org/g", "g"), tmp_path)
    with pytest.raises(ArchiveError, match="only https"):
        fetch(Remote("http://e.org/g", "g"), tmp_path)
    assert os.listdir(tmp_path) == ["f"]
