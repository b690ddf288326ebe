"""Downloading and unpacking dataset archives safely.

`unpack` writes into a temporary folder next to the target and renames it at the end, so an existing target is always
complete. It refuses archives larger than the free disk space and members that are not plain files or folders (links,
devices), that lie outside the target, or that appear twice. tarfile's own filter does not: it strips a leading "/" and
keeps links.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple
from urllib.request import urlopen

from tqdm import tqdm

from ldm.atomic import atomic_folder, publish, temporary_next_to, write_errors
from ldm.config.instantiate import ConfigError

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
# Refuse archives that unpack to more than BOMB_BYTES and to more than BOMB_RATIO times their size.
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, UnicodeError, zlib.error)


class ArchiveError(ConfigError):
    """An archive or a download that cannot be used; the message begins with its name."""


class Remote(NamedTuple):
    """A file to download: its URL and its local name."""

    url: str
    name: str


class Member(NamedTuple):
    """A member of an archive that is not a folder; `is_file` is false for links and devices."""

    name: str
    size: int
    is_file: bool
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: Path, nested: bool = False, rename: Callable[[str], str] = str) -> None:
    """Unpack a tar or zip file into `folder`, which must not exist yet.

    nested: also unpack the tar files inside, each into a folder of the same name (ImageNet's training data).
    rename: maps the name of a member to its path below `folder`.
    Raises ArchiveError and leaves nothing behind if the archive is unsafe or damaged.
    """
    try:
        with atomic_folder(folder) as staging:
            _unpack_into(archive, staging, rename)
            for inner in sorted(staging.rglob("*.tar")) if nested else ():
                _unpack_into(inner, inner.with_suffix(""))
                inner.unlink()
    except OSError as error:
        if folder.is_dir() and isinstance(error, FileExistsError):  # another process was faster
            return
        raise ArchiveError(f"{archive}: cannot be unpacked: {error}") from error
    logger.info("%s: unpacked into %s", archive, folder)


def fetch(remote: Remote, folder: Path) -> Path:
    """Download a file into `folder` unless it exists; return its path. Raises ArchiveError if it fails."""
    path = folder / remote.name
    if path.is_file():
        return path
    if not remote.url.startswith("https://"):
        raise ArchiveError(f"{remote.url}: only https:// URLs are supported")
    logger.info("downloading %s", remote.url)
    try:
        with urlopen(remote.url, timeout=60) as response:
            total = int(response.headers.get("Content-Length") or 0)
            bar = tqdm(total=total or None, unit="B", unit_scale=True, desc=remote.name, delay=3, disable=None)
            with temporary_next_to(path) as part, bar:
                with part.open("wb") as file:
                    while block := response.read(CHUNK):
                        with write_errors(path, total):
                            file.write(block)
                            file.flush()
                        bar.update(len(block))
                if total and part.stat().st_size != total:
                    raise ArchiveError(f"{remote.url}: received {part.stat().st_size:,} of {total:,} bytes; try again")
                publish(part, path)
    except OSError as error:
        advice = f"download it by hand and save it as {path}"
        raise ArchiveError(f"{remote.url}: download failed ({error}); {advice}") from error
    return path


def _unpack_into(archive: Path, folder: Path, rename: Callable[[str], str] = str) -> None:
    folder.mkdir(exist_ok=True)
    try:
        with _members(archive) as found:
            members = _checked(archive, found, folder, rename)
            for member in tqdm(members, f"unpacking {archive.name}", unit="file", delay=3, leave=False, disable=None):
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = member.open()
                assert source is not None  # a regular file
                with source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, CHUNK)  # both libraries stop at the declared size
    except DAMAGED as error:
        raise ArchiveError(f"{archive}: damaged, or not an archive ({error})") from error


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """Open an archive and yield an iterator over its members, which lists them as it goes."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped:
            yield (
                Member(info.filename, info.file_size, _is_zip_file(info), partial(zipped.open, info))
                for info in zipped.infolist()
                if not info.is_dir()
            )
    else:
        with tarfile.open(archive) as tar:
            yield (
                Member(info.name, info.size, info.isreg(), partial(tar.extractfile, info))
                for info in tar
                if not info.isdir()
            )


def _is_zip_file(info: zipfile.ZipInfo) -> bool:
    return stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)  # 0: the archive was made without Unix modes


def _checked(archive: Path, members: Iterable[Member], folder: Path, rename: Callable[[str], str]) -> list[Member]:
    """Return the renamed members; raise ArchiveError at the first unsafe one: even listing a bomb unpacks it."""
    packed, free = archive.stat().st_size, shutil.disk_usage(folder).free
    needed = unpacked = 0
    checked: dict[str, Member] = {}
    for member in members:
        if not member.is_file:
            raise ArchiveError(f"{archive}: member {member.name!r} is a link or a device")
        if member.size < 0:
            raise ArchiveError(f"{archive}: member {member.name!r} claims {member.size} bytes")
        needed, unpacked = needed + member.size, unpacked + member.size + 512  # with the header of a tar member
        if needed > free:
            raise ArchiveError(f"{archive}: needs {needed:,} bytes or more, but the disk has {free:,} free")
        if unpacked > max(BOMB_BYTES, BOMB_RATIO * packed):
            raise ArchiveError(f"{archive}: its {packed:,} bytes unpack to {unpacked:,} or more (an archive bomb?)")
        name = rename(member.name)
        parts = Path(name).parts
        outside = os.path.isabs(name) or PureWindowsPath(name).drive or ".." in parts
        if outside or "\\" in name or "\0" in name or not parts:
            raise ArchiveError(f"{archive}: member {name!r} lies outside the folder")
        if name in checked:
            raise ArchiveError(f"{archive}: member {name!r} appears twice")
        checked[name] = member._replace(name=name)
    return list(checked.values())
