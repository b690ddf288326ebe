"""Archives of data sets, fetched on request and unpacked so that nothing leaves the folder they are unpacked into.

`unpack` writes into a folder beside the target and renames it when all is there: a target that exists is whole. A member that is no plain
file or folder (a link, a device), that names a place outside, or that comes twice, and an archive larger than the disk's free space, are
refused before anything is written.
"""

from __future__ import annotations

import hashlib
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

from tqdm import tqdm

from ldm.config.instantiate import ConfigError

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
BOMB_BYTES, BOMB_RATIO = (
    1 << 30,
    200,
)  # what unpacks to more than the first, and to so many times its own size, is refused
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class ArchiveError(ConfigError):
    """An archive that is not unpacked, or a download that is not kept; the message begins with its name."""


class Remote(NamedTuple):
    """A file that can be fetched: where it is, its name here, and its SHA-256 or MD5 where the publisher gives one."""

    url: str
    name: str
    digest: str = ""


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, nested: bool = False, place: Callable[[str], str] = str) -> None:
    """Unpack a tar or zip file into `folder`, which must not exist yet.

    nested: tar files in it are unpacked too, each into a folder with its name (ImageNet's training data). place: where a member goes, from
    its name; both are paths below the folder.
    Raises ArchiveError for what it refuses; then nothing is left behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-unpacking-", dir=folder.parent))
    try:
        _unpack_into(archive, staging, place)
        for inner in sorted(staging.rglob("*.tar")) if nested else ():
            _unpack_into(inner, inner.with_suffix(""))
            inner.unlink()
        staging.chmod(0o777 & ~_umask())  # mkdtemp keeps others out
        staging.rename(folder)
    except OSError as error:
        if folder.is_dir():  # another process was faster
            return
        raise ArchiveError(f"{archive}: cannot be unpacked into {folder} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("%s: unpacked into %s", archive, folder)


def fetch(remote: Remote, folder: Path) -> Path:
    """Download a file into `folder` unless it is there -> its path. Raises ArchiveError; a broken download leaves nothing."""
    from urllib.request import urlopen

    path = folder / remote.name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if not remote.url.startswith("https://"):
        raise ArchiveError(f"{remote.url}: only https:// is fetched")
    part = Path(tempfile.mkdtemp(prefix=f".{remote.name}-", dir=folder)) / remote.name
    logger.info("fetching %s", remote.url)
    try:
        with urlopen(remote.url, timeout=60) as response, part.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, unit="B", unit_scale=True, desc=remote.name, delay=3, disable=None) as bar:
                while block := response.read(CHUNK):
                    file.write(block)
                    bar.update(len(block))
        if total and part.stat().st_size != total:
            raise ArchiveError(f"{remote.url}: {part.stat().st_size:,} of {total:,} bytes came; try again")
        check_digest(part, remote.digest)
        os.replace(part, path)
    except OSError as error:
        raise ArchiveError(
            f"{remote.url}: could not be fetched ({error}); fetch it by hand and put it at {path}"
        ) from error
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)
    return path


def check_digest(path: Path, digest: str) -> None:
    """Raise ArchiveError where the file has another SHA-256 (64 digits) or MD5 (32 digits); "" is not checked."""
    if not digest:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5" if len(digest) == 32 else "sha256").hexdigest()
    if found != digest:
        raise ArchiveError(f"{path}: has the digest {found}, expected {digest}; delete it and fetch it again")


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith((*TAR_SUFFIXES, ".zip"))


def _unpack_into(archive: Path, folder: Path, place: Callable[[str], str] = str) -> None:
    folder.mkdir(exist_ok=True)
    try:
        with _members(archive) as found:
            members = [member._replace(name=place(member.name)) for member in _listed(archive, found, folder)]
            _check(archive, members)
            for member in tqdm(members, f"unpacking {archive.name}", unit="file", delay=3, leave=False, disable=None):
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with member.open() as source, target.open("xb") as file:
                    _copy(archive, member, source, file)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        RuntimeError,
        NotImplementedError,
        UnicodeError,
        zlib.error,
    ) as error:
        raise ArchiveError(f"{archive}: damaged or no archive ({error})") from error


def _listed(archive: Path, members: Iterable[Member], folder: Path) -> Iterator[Member]:
    """The members, while there is space for them; counted as they are listed, since listing a bomb unpacks it."""
    packed, free = archive.stat().st_size, shutil.disk_usage(folder).free
    needed = unpacked = 0
    for member in members:
        if member.size < 0:
            raise ArchiveError(f"{archive}: its member {member.name!r} claims {member.size} bytes")
        needed, unpacked = needed + member.size, unpacked + member.size + 512  # a tar file's header
        if needed > free:
            raise ArchiveError(
                f"{archive}: its files take {needed:,} bytes or more, and {folder.parent} has {free:,} free"
            )
        if unpacked > max(BOMB_BYTES, BOMB_RATIO * packed):
            raise ArchiveError(
                f"{archive}: refused, because its {packed:,} bytes unpack to {unpacked:,} or more; a bomb?"
            )
        yield member


def _check(archive: Path, members: list[Member]) -> None:
    seen: set[str] = set()
    for member in members:
        parts = Path(member.name).parts
        outside = os.path.isabs(member.name) or PureWindowsPath(member.name).drive or ".." in parts
        if outside or "\\" in member.name or "\0" in member.name or not parts:
            raise ArchiveError(f"{archive}: its member {member.name!r} lies outside the folder")
        if member.name in seen:
            raise ArchiveError(f"{archive}: its member {member.name!r} comes twice")
        seen.add(member.name)


def _copy(archive: Path, member: Member, source: IO[bytes], file: IO[bytes]) -> None:
    """Copy the bytes that the archive says a member has: no bomb gets further."""
    left = member.size
    while block := source.read(min(CHUNK, left + 1)):
        left -= len(block)
        if left < 0:
            raise ArchiveError(
                f"{archive}: its member {member.name!r} is larger than the {member.size:,} bytes that it claims"
            )
        file.write(block)
    if left:
        raise ArchiveError(f"{archive}: its member {member.name!r} ends {left:,} bytes early")


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """The files of an archive; ArchiveError where something in it is neither a file nor a folder."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as opened:
            yield (_zip_member(archive, opened, info) for info in opened.infolist() if not info.is_dir())
    else:
        with tarfile.open(archive) as opened:
            yield (_tar_member(archive, opened, info) for info in opened if not info.isdir())


def _zip_member(archive: Path, opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise ArchiveError(f"{archive}: its member {info.filename!r} is a link or a device, no file")
    return Member(info.filename, info.file_size, lambda: opened.open(info))


def _tar_member(archive: Path, opened: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    if not info.isreg():
        raise ArchiveError(f"{archive}: its member {info.name!r} is a link or a device, no file")
    return Member(info.name, info.size, lambda: opened.extractfile(info))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
