"""Downloading and unpacking dataset archives safely.

`unpack` writes into a temporary folder next to the target and renames it at the end, so an existing target is always
complete. It refuses archives larger than the free disk space and members that are not plain files or folders (links,
devices), that lie outside the target, or that appear twice.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple
from urllib.request import urlopen

from tqdm import tqdm

from ldm.config.instantiate import ConfigError

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
BOMB_BYTES, BOMB_RATIO = (
    1 << 30,
    200,
)  # refuse archives that unpack to more than BOMB_BYTES and to BOMB_RATIO times their size
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, UnicodeError, zlib.error)


class ArchiveError(ConfigError):
    """An archive or a download that cannot be used; the message begins with its name."""


class Remote(NamedTuple):
    """A file to download: its URL and its local name."""

    url: str
    name: str


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: Path, nested: bool = False, rename: Callable[[str], str] = str) -> None:
    """Unpack a tar or zip file into `folder`, which must not exist yet.

    nested: also unpack the tar files inside, each into a folder of the same name (ImageNet's training data).
    rename: maps the name of a member to its path below `folder`.
    Raises ArchiveError and leaves nothing behind if the archive is unsafe or damaged.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-unpacking-", dir=folder.parent))
    try:
        _unpack_into(archive, staging, rename)
        for inner in sorted(staging.rglob("*.tar")) if nested else ():
            _unpack_into(inner, inner.with_suffix(""))
            inner.unlink()
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o777 & ~mask)  # mkdtemp allows only the owner
        staging.rename(folder)
    except OSError as error:
        if folder.is_dir():  # another process was faster
            return
        raise ArchiveError(f"{archive}: cannot be unpacked into {folder} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("%s: unpacked into %s", archive, folder)


def fetch(remote: Remote, folder: Path) -> Path:
    """Download a file into `folder` unless it exists; return its path. Raises ArchiveError if it fails."""
    path = folder / remote.name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if not remote.url.startswith("https://"):
        raise ArchiveError(f"{remote.url}: only https:// URLs are supported")
    part = Path(tempfile.mkdtemp(prefix=f".{remote.name}-", dir=folder)) / remote.name
    logger.info("downloading %s", remote.url)
    try:
        with urlopen(remote.url, timeout=60) as response, part.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, unit="B", unit_scale=True, desc=remote.name, delay=3, disable=None) as bar:
                while block := response.read(CHUNK):
                    file.write(block)
                    bar.update(len(block))
        if total and part.stat().st_size != total:
            raise ArchiveError(f"{remote.url}: received {part.stat().st_size:,} of {total:,} bytes; try again")
        os.replace(part, path)
    except OSError as error:
        raise ArchiveError(
            f"{remote.url}: download failed ({error}); download it by hand and save it as {path}"
        ) from error
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)
    return path


def _unpack_into(archive: Path, folder: Path, rename: Callable[[str], str] = str) -> None:
    folder.mkdir(exist_ok=True)
    try:
        with _members(archive) as found:
            members = [member._replace(name=rename(member.name)) for member in _within_limits(archive, found, folder)]
            _check_names(archive, members)
            for member in tqdm(members, f"unpacking {archive.name}", unit="file", delay=3, leave=False, disable=None):
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = member.open()
                assert source is not None  # a regular file
                with source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, CHUNK)  # bounded by the declared size in both libraries
    except DAMAGED as error:
        raise ArchiveError(f"{archive}: damaged, or not an archive ({error})") from error


def _within_limits(archive: Path, members: Iterable[Member], folder: Path) -> Iterator[Member]:
    """Yield the members; raise ArchiveError once they exceed the limits, since listing a bomb already unpacks it."""
    packed, free = archive.stat().st_size, shutil.disk_usage(folder).free
    needed = unpacked = 0
    for member in members:
        if member.size < 0:
            raise ArchiveError(f"{archive}: member {member.name!r} claims {member.size} bytes")
        needed, unpacked = needed + member.size, unpacked + member.size + 512  # with the header of a tar member
        if needed > free:
            raise ArchiveError(f"{archive}: needs {needed:,} bytes or more, but {folder.parent} has {free:,} free")
        if unpacked > max(BOMB_BYTES, BOMB_RATIO * packed):
            raise ArchiveError(f"{archive}: its {packed:,} bytes unpack to {unpacked:,} or more (an archive bomb?)")
        yield member


def _check_names(archive: Path, members: list[Member]) -> None:
    seen: set[str] = set()
    for member in members:
        parts = Path(member.name).parts
        outside = os.path.isabs(member.name) or PureWindowsPath(member.name).drive or ".." in parts
        if outside or "\\" in member.name or "\0" in member.name or not parts:
            raise ArchiveError(f"{archive}: member {member.name!r} lies outside the folder")
        if member.name in seen:
            raise ArchiveError(f"{archive}: member {member.name!r} appears twice")
        seen.add(member.name)


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """Yield an iterator over the files of an archive, which raises ArchiveError at a link or a device."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as opened:
            yield (_zip_member(archive, opened, info) for info in opened.infolist() if not info.is_dir())
    else:
        with tarfile.open(archive) as opened:
            yield (_tar_member(archive, opened, info) for info in opened if not info.isdir())


def _zip_member(archive: Path, opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise ArchiveError(f"{archive}: member {info.filename!r} is a link or a device")
    return Member(info.filename, info.file_size, lambda: opened.open(info))


def _tar_member(archive: Path, opened: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    if not info.isreg():
        raise ArchiveError(f"{archive}: member {info.name!r} is a link or a device")
    return Member(info.name, info.size, lambda: opened.extractfile(info))
