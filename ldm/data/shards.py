"""Tar shards in the layout of the webdataset library: their names, copies of remote ones, an index of each.

A shard holds the files of its samples one after another: `000000017.jpg`, `000000017.txt`, `000000017.json`. Its index
lists them, so that any sample is one seek and one read away, in any order. It is kept as `00000.index.npz` next to
`00000.tar`, or in the cache if that folder cannot be written to.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ldm.atomic import WriteError, atomic_file, locked, publish, temporary_next_to
from ldm.data.base import DataConfigError
from ldm.data.image import EXTENSIONS, BadImageError, image_size
from ldm.data.order import usable_cpus
from ldm.paths import expand_user

logger = logging.getLogger(__name__)

CACHE = "~/.cache/latent-diffusion/shards"
PIPE = "pipe:"  # followed by a command that writes the shard to its standard output
TEXTS = frozenset({"txt", "text", "caption"})  # suffixes of members that hold text
_FORMAT = 2  # of the index; another one is rebuilt
_BLOCK = 512  # bytes of a tar file's header
_CHUNK = 1 << 20  # bytes of a file that are read at once

_pipes_allowed = False


def allow_pipes() -> None:
    """Allow `pipe:COMMAND` as a shard, and run the command. A config cannot allow it: it must not run commands."""
    global _pipes_allowed
    _pipes_allowed = True


class ShardError(ValueError):
    """A shard that cannot be read; the message begins with its name."""


class Index(NamedTuple):
    """The samples of a shard, N of them, in its order."""

    keys: list[str]
    members: dict[str, np.ndarray]  # by suffix: int64 (N, 5), offset and size in bytes (-1: none), then for images
    # their width and height, for texts the number of characters, and a hash of images, texts and JSON
    numbers: dict[str, np.ndarray]  # numeric fields of the JSON: float64 (N,), NaN where missing
    texts: dict[str, np.ndarray]  # text fields of the JSON: int32 (N,), characters of the longest text
    problems: dict[int, str]  # why samples cannot be used
    damage: str  # where the shard is truncated or damaged; "" if it is whole
    size: int  # of the shard in bytes

    def member(self, suffixes: Sequence[str]) -> np.ndarray:
        """Return the first of these members of each sample -> int64 (N, 5); size -1 for those that have none."""
        found = np.full((len(self.keys), 5), -1, np.int64)
        for suffix in reversed(suffixes):
            rows = self.members.get(suffix)
            if rows is not None:
                found = np.where(rows[:, 1:2] >= 0, rows, found)
        return found


def expand(shards: str | Sequence[str]) -> list[str]:
    """Return the paths and URLs that `{00000..00039}.tar`, patterns with *, folders and lists of them stand for.

    Raises DataConfigError for files that do not exist, and for commands unless they are allowed.
    """
    try:
        from webdataset.shardlists import expand_urls  # an optional library
    except ImportError as error:
        raise ImportError('shards need webdataset: pip install -e ".[streams]"') from error
    found: list[str] = []
    for given in [shards] if isinstance(shards, str) else shards:
        try:
            names = expand_urls(given.strip())
        except ValueError as error:  # of braces
            raise DataConfigError("shards", given, str(error), "set {param} to e.g. data/{00000..00039}.tar") from error
        for name in names:
            found += _pipe(name) if name.startswith(PIPE) else _remote(name) if is_remote(name) else _local(name)
    if not found:
        raise DataConfigError("shards", shards, "names no shards", "set {param} to .tar files, or to their folder")
    different: dict[str, str] = {}
    for name in found:
        different.setdefault(identity(name), name)
    return list(different.values())


def identity(shard: str) -> str:
    """Return a name of a shard that is the same for every spelling of its path."""
    return shard if is_remote(shard) else os.path.realpath(shard)


def is_remote(name: str) -> bool:
    """True for a URL or a command, False for a path."""
    return "://" in name or name.startswith(PIPE)


def _pipe(name: str) -> list[str]:
    if not _pipes_allowed:
        advice = "set {param} to URLs (https://, s3://, gs://) or files, or pass --allow-pipe on the command line"
        raise DataConfigError("shards", name, "is a command, and a config may not run commands", advice)
    return [name]


def _remote(name: str) -> list[str]:
    if "*" not in name:
        return [name]
    filesystem, path = _filesystem(name)
    return sorted(filesystem.unstrip_protocol(each) for each in filesystem.glob(path))


def _local(name: str) -> list[str]:
    path = expand_user(name)
    if path.is_dir():
        found = sorted(str(each) for each in path.glob("*.tar"))
    elif path.is_file():
        found = [str(path)]
    else:
        beside = (".index.npz", ".json")  # of shards
        found = sorted(each for each in glob.glob(str(path)) if not each.endswith(beside))
    if not found:
        problem = "has no .tar files" if path.is_dir() else "no such file"
        raise DataConfigError("shards", name, problem, "set {param} to .tar files, or to their folder")
    return found


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs  # an optional library

        return url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0]
        packages = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
        needed = f"pip install fsspec {packages.get(protocol, '')}".rstrip()
        raise ImportError(f"{url}: {needed} ({error})") from error
    except ValueError as error:
        raise DataConfigError(
            "shards", url, str(error), "set {param} to files, or to https://, s3://, gs://"
        ) from error


class Store:
    """Shards on this machine: local ones where they are, remote ones copied into a cache of a limited size.

    cache: its folder. limit: bytes of the copies; the one that was unused longest is deleted for a new one.
    """

    def __init__(self, cache: str | Path = CACHE, limit: float = math.inf) -> None:
        self.cache, self.limit = expand_user(cache), limit

    def path(self, shard: str) -> Path:
        """Return a shard's file, after copying a remote one. Raises ShardError if that fails."""
        if not is_remote(shard):
            return Path(shard)
        copy = self.cache / _file_name(shard, ".tar")
        lock = copy.with_suffix(".lock")
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
            with locked(lock):  # ranks and workers on this machine copy it once
                if copy.is_file():
                    os.utime(copy)  # the time of its last use
                else:
                    self._fetch(shard, copy)
        except OSError as error:
            if not copy.is_file():  # a copy in a read-only cache can be used
                raise self._unwritable(shard, error) from error
        return copy

    def has_index(self, shard: str) -> bool:
        """True if there is an index of a shard, up to date or not."""
        beside = [] if is_remote(shard) else [index_path(Path(shard))]
        return any(kept.is_file() for kept in (*beside, self._cached_index(shard)))

    def index(self, shard: str) -> Index:
        """Return the index of a shard, built if it is missing or of another file. Raises ShardError."""
        kept, size, modified = self._cached_index(shard), None, 0
        places = [kept]
        if not is_remote(shard):
            try:
                stat = os.stat(shard)
            except OSError as error:
                raise ShardError(f"{shard}: {error.strerror}") from error
            size, modified, places = stat.st_size, stat.st_mtime_ns, [index_path(Path(shard)), kept]
        for place in places:
            if (index := _read(place, size, modified)) is not None:
                return index
        if is_remote(shard) and (index := self._published(shard, kept)) is not None:
            return index
        index = _build(self.path(shard))
        for place in places:
            try:
                _write(place, index, modified)
                break
            except WriteError as error:  # a read-only folder
                if place == kept:
                    raise self._unwritable(shard, error) from error
        return index

    def stale(self, shard: str) -> str:
        """Return the files to delete so that a changed shard is indexed again."""
        return str(self.cache / _file_name(shard, ".*") if is_remote(shard) else index_path(Path(shard)))

    def _unwritable(self, shard: str, error: OSError) -> DataConfigError:
        problem = f"cannot take the copy or the index of {shard}: {error}"
        return DataConfigError("cache", str(self.cache), problem, "set {param} to a folder that can be written to")

    def _cached_index(self, shard: str) -> Path:
        return self.cache / _file_name(shard if is_remote(shard) else os.path.abspath(shard), ".index.npz")

    def _published(self, shard: str, kept: Path) -> Index | None:
        """Return the index that lies next to a remote shard; None if there is none."""
        if shard.startswith(PIPE):
            return None
        with suppress(Exception), atomic_file(kept) as temporary:  # each protocol has errors of its own
            filesystem, path = _filesystem(shard)
            filesystem.get_file(f"{path.removesuffix('.tar')}.index.npz", str(temporary))
        return _read(kept)

    def _fetch(self, shard: str, copy: Path) -> None:
        logger.debug("copying %s", shard)
        try:
            with temporary_next_to(copy) as temporary:
                if shard.startswith(PIPE):
                    with temporary.open("wb") as file:
                        subprocess.run(shard.removeprefix(PIPE), shell=True, stdout=file, check=True)
                else:
                    filesystem, path = _filesystem(shard)
                    filesystem.get_file(path, str(temporary))
                self._make_room(temporary.stat().st_size)
                publish(temporary, copy)
        except Exception as error:  # each protocol has errors of its own
            raise ShardError(f"{shard}: cannot be copied: {error}") from error

    def _make_room(self, needed: int) -> None:
        """Delete the copies that were unused longest, until `needed` bytes more are within the limit."""
        copies = []
        for copy in self.cache.glob(_COPIES):
            with suppress(OSError):  # another process has deleted it
                copies.append((copy.stat().st_mtime_ns, copy.stat().st_size, copy))
        total = needed + sum(size for _, size, _ in copies)
        for _, size, copy in sorted(copies):
            if total <= self.limit:
                break
            copy.unlink(missing_ok=True)  # a process that has it open reads on
            total -= size


def index_path(shard: Path) -> Path:
    """Return the place of a local shard's index: 00000.index.npz for 00000.tar."""
    return shard.with_name(f"{shard.name.removesuffix('.tar')}.index.npz")


_COPIES = f"{'[0-9a-f]' * 16}-*.tar"  # names of copies; other tars in the folder of the cache are the user's


def _file_name(shard: str, suffix: str) -> str:
    """Return the name of a shard's file in the cache."""
    stem = Path(shard.split("?")[0]).name.removesuffix(" -").removesuffix(".tar")[:40]
    return f"{hashlib.blake2b(shard.encode(errors='surrogateescape'), digest_size=8).hexdigest()}-{stem}{suffix}"


def build_indices(shards: Sequence[str], store: Store) -> None:
    """Build the missing indices of readable shards, in parallel, with a progress bar."""
    missing = [shard for shard in shards if not store.has_index(shard)]
    bar = partial(tqdm, desc="indexing shards", total=len(missing), leave=False, delay=3, disable=None)
    processes = min(usable_cpus(), len(missing))
    if processes < 2:
        for shard in bar(missing):
            _try(store, shard)
        return
    with ProcessPoolExecutor(processes) as pool:
        for _ in bar(pool.map(partial(_try, store), missing)):
            pass


def _try(store: Store, shard: str) -> None:
    with suppress(ShardError):  # raised again when the shard is read
        store.index(shard)


# ------------------------------------------------------------------------------------------------- building an index


def _build(path: Path) -> Index:
    """Read all of a shard but its images' pixels -> its index. Raises ShardError if it is not an uncompressed tar."""
    from webdataset.tariterators import base_plus_ext  # an optional library, see `expand`

    samples: dict[str, dict[str, tuple[int, ...]]] = {}
    values: dict[str, Mapping[str, Any]] = {}
    problems: dict[str, str] = {}
    size = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            damage = ""
            try:
                for member in _members(tar, size):
                    key, suffix = base_plus_ext(member.name)
                    if key is None:
                        continue
                    suffix = suffix.lower()
                    sample = samples.setdefault(key, {})
                    if suffix in sample:
                        problems[key] = f"the shard holds {key}.{suffix} twice"
                    place = member.offset_data, member.size
                    try:
                        sample[suffix] = (*place, *_measured(file, key, suffix, *place, values))
                    except (BadImageError, ValueError, RecursionError) as error:
                        sample[suffix] = (*place, 0, 0, 0)
                        reason = error.reason if isinstance(error, BadImageError) else str(error)
                        problems.setdefault(key, f".{suffix}: {reason}")
            except tarfile.TarError as error:
                damage = str(error)
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{path}: not an uncompressed tar file ({error})") from error
    return _tabulated(samples, values, problems, damage, size)


def _members(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a shard; TarError where it is damaged, which tarfile itself takes for its end."""
    while (member := tar.next()) is not None:
        if member.offset_data + member.size > size:
            raise tarfile.ReadError(f"breaks off within {member.name}")
        if member.isreg():
            yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(_BLOCK)
    if end != bytes(_BLOCK):
        raise tarfile.ReadError(f"{'is damaged' if end else 'breaks off'} at byte {tar.offset:,}")
    while rest := tar.fileobj.read(_CHUNK):
        if rest.strip(b"\0"):
            problem = f"holds more after its end at byte {tar.offset:,}"
            raise tarfile.ReadError(f"{problem}: are these several tar files in one?")


def _measured(
    file: Any, key: str, suffix: str, offset: int, size: int, values: dict[str, Mapping[str, Any]]
) -> tuple[int, int, int]:
    """Return (width, height, hash) of an image, (characters, 0, hash) of a text; keep the fields of a JSON in `values`.

    Raises BadImageError, ValueError or RecursionError for a member that is none.
    """
    last = suffix.rpartition(".")[2]
    image = f".{last}" in EXTENSIONS
    if not image and suffix != "json" and last not in TEXTS:
        return 0, 0, 0
    file.seek(offset)  # tarfile itself seeks the next member
    content = file.read(size)
    if image:
        return *image_size(f"{key}.{suffix}", content), content_hash(content)
    if suffix != "json":
        return len(_text(content)), 0, content_hash(content)
    fields = json.loads(content)
    if not isinstance(fields, dict):
        raise ValueError(f"holds {type(fields).__name__}, expected an object")
    values[key] = fields
    return 0, 0, content_hash(content)


def content_hash(content: bytes | str) -> int:
    """Return a hash of 64 bits, signed."""
    content = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig").strip()


def _tabulated(
    samples: dict[str, dict[str, tuple[int, ...]]],
    values: dict[str, Mapping[str, Any]],
    problems: dict[str, str],
    damage: str,
    size: int,
) -> Index:
    keys = list(samples)
    number = {key: row for row, key in enumerate(keys)}
    members: dict[str, np.ndarray] = {}
    numbers: dict[str, np.ndarray] = {}
    texts: dict[str, np.ndarray] = {}
    for key, sample in samples.items():
        for suffix, place in sample.items():
            members.setdefault(suffix, np.full((len(keys), 5), -1, np.int64))[number[key]] = place
    for key, fields in values.items():
        for name, value in fields.items():
            if isinstance(value, int | float):
                with suppress(OverflowError):  # an integer over 1e308
                    numbers.setdefault(name, np.full(len(keys), np.nan))[number[key]] = value
            elif (several := captions_of(value)) is not None:
                longest = max(map(len, several), default=0)
                texts.setdefault(name, np.zeros(len(keys), np.int32))[number[key]] = longest
    return Index(keys, members, numbers, texts, {number[key]: why for key, why in problems.items()}, damage, size)


def captions_of(value: object) -> list[str] | None:
    """Return the texts of a JSON field that holds a text or a list of texts, without blank ones; None for others."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(each, str) for each in several):
        return None
    return [each.strip() for each in several if each.strip()]


def read_captions(content: bytes, field: str | None) -> list[str]:
    """Return the captions in a member: all of a text, or a field of a JSON; none if it is blank."""
    if field is not None:
        return captions_of(json.loads(content).get(field)) or []
    text = _text(content)
    return [text] if text else []


# ------------------------------------------------------------------------------------------- the file of an index


def _write(path: Path, index: Index, modified: int) -> None:
    """Write an index. modified: the shard's time of modification in ns; 0 for a remote one."""
    head = {
        "format": _FORMAT,
        "size": index.size,
        "modified": modified,
        "keys": index.keys,
        "members": list(index.members),
        "numbers": list(index.numbers),
        "texts": list(index.texts),
        "problems": list(index.problems.items()),
        "damage": index.damage,
    }
    count = len(index.keys)
    arrays: dict[str, Any] = {
        "head": np.frombuffer(json.dumps(head).encode(), np.uint8),
        "members": np.array([*index.members.values()], np.int64).reshape(len(index.members), count, 5),
        "numbers": np.array([*index.numbers.values()], np.float64).reshape(len(index.numbers), count),
        "texts": np.array([*index.texts.values()], np.int32).reshape(len(index.texts), count),
    }
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _read(path: Path, size: int | None = None, modified: int = 0) -> Index | None:
    """Return the index in a file; None if it is missing, unreadable, or of a shard of another size or time."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes())
            if head["format"] != _FORMAT or (size is not None and (head["size"], head["modified"]) != (size, modified)):
                return None
            return Index(
                head["keys"],
                dict(zip(head["members"], arrays["members"])),
                dict(zip(head["numbers"], arrays["numbers"])),
                dict(zip(head["texts"], arrays["texts"])),
                dict(head["problems"]),
                head["damage"],
                head["size"],
            )
    except Exception:  # a damaged file can raise nearly anything
        return None
