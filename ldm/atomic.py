"""The only writer of files: a file or folder appears under its name complete and on disk, or not at all.

A temporary file next to the target is written, flushed to disk and renamed. Its writer holds a lock, which ends with
the process, so that a later writer can tell abandoned temporary files from live ones.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":  # without advisory locks, temporary files count as abandoned by their age
    import fcntl

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.tmp", re.DOTALL)
_STALE_HOURS = 24
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)  # some network and FUSE file systems
_swept: set[Path] = set()  # folders that this process has searched for abandoned files


def is_out_of_memory(error: BaseException) -> bool:
    """True for a lack of memory: Python's, a GPU's (by its class), the CPU's in PyTorch (a RuntimeError)."""
    shown = f"{type(error).__name__} {error}"
    return isinstance(error, MemoryError) or "OutOfMemoryError" in shown or "DefaultCPUAllocator: " in shown


class WriteError(OSError):
    """A file could not be written: path, reason, bytes needed and free; a previous file of that name is unchanged."""


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike, size: int = 0, replace: bool = True, in_folder: bool = False
) -> Iterator[Path]:
    """A temporary file to write into, renamed to `path` at the end and deleted after an error.

    size: bytes to be written, for messages; 0 if unknown. replace: False raises FileExistsError if the name is taken.
    in_folder: the file is in a temporary folder, for writers that leave temporary files themselves.
    Raises WriteError if writing fails.
    """
    path = Path(path)
    if not replace and os.path.lexists(path):
        raise _taken(path)
    with write_errors(path, size):
        if path.exists() and not path.is_file():  # never a device such as /dev/full
            raise OSError("it is a folder" if path.is_dir() else "it is not a regular file")
        with temporary_next_to(path, in_folder) as temporary:
            file = temporary / "file" if in_folder else temporary
            yield file
            publish(file, path, replace)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder to write into, renamed to `path` at the end and deleted after an error.

    Raises FileExistsError if the name is taken by then, WriteError if writing fails.
    """
    path = Path(path)
    with write_errors(path), temporary_next_to(path, folder=True) as temporary:
        yield temporary
        for part in temporary.rglob("*"):
            sync(part)
        publish(temporary, path)


def save_bytes(path: str | os.PathLike, content: bytes, replace: bool = True) -> Path:
    """Write a file -> its path; errors as in `atomic_file`."""
    with atomic_file(path, len(content), replace) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def save_text(path: str | os.PathLike, text: str, replace: bool = True) -> Path:
    """Write a UTF-8 file with the line ends of `text` -> its path; errors as in `atomic_file`.

    Bytes of file names that are not UTF-8 (surrogates in Python's strings) are written as they are.
    """
    return save_bytes(path, text.encode(errors="surrogateescape"), replace)


def append_text(path: str | os.PathLike, text: str) -> None:
    """Add UTF-8 text to a file; an error leaves the file as it was. Raises WriteError if writing fails."""
    rest = text.encode(errors="surrogateescape")
    with write_errors(Path(path), len(rest)), open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # a device has no length
                file.truncate(end)
            raise


@contextlib.contextmanager
def write_errors(path: Path, size: int = 0) -> Iterator[None]:
    """Turn errors of the system, torch and faiss into a WriteError that names `path`, bytes needed and bytes free.

    What is written may be made meanwhile: a lack of memory for it is no error of writing.
    """
    try:
        yield
    except (WriteError, FileExistsError):
        raise
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        named = Path(str(getattr(error, "filename", None) or path))
        if named != path and not any(map(_TEMPORARY.fullmatch, named.parts)):  # another file, e.g. one to copy from
            reason += f" ({named})"
        if getattr(error, "errno", None) == errno.EFBIG:
            reason += " (over the limit of `ulimit -f` or of the file system)"
        parent = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
        with contextlib.suppress(OSError):
            needed = f"about {size:,} bytes are needed and " if size else ""
            reason += f"; {needed}{shutil.disk_usage(parent).free:,} bytes are free"
        kept = "the previous file is intact" if os.path.lexists(path) else "nothing was left behind"
        failure = WriteError(f"{path}: could not be written: {reason}; {kept}")
        failure.errno = getattr(error, "errno", None)
        raise failure from error


@contextlib.contextmanager
def temporary_next_to(path: Path, folder: bool = False) -> Iterator[Path]:
    """An empty, locked file or folder next to `path`; deleted at the end unless it was renamed.

    The parent folder is created. The first time, the process deletes what killed writers left there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, f"{path.parent} is not a folder") from error
    if (parent := path.parent.absolute()) not in _swept:
        sweep_temporaries(parent)
        _swept.add(parent)
    with contextlib.ExitStack() as stack:
        while True:
            temporary = path.parent / f".{path.name[:40]}.{uuid.uuid4().hex[:12]}.tmp"  # names have at most 255 bytes
            temporary.mkdir() if folder else temporary.touch(exist_ok=False)
            stack.callback(_delete, temporary)
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(locked(temporary))
            if temporary.exists():  # else another process has swept it before it was locked
                break
        yield temporary


def publish(temporary: Path, path: Path, replace: bool = True) -> None:
    """Flush a temporary file or folder to disk and give it its name; without `replace`, FileExistsError if taken."""
    sync(temporary)
    if temporary.is_dir():
        if os.path.lexists(path):  # renaming would replace an empty folder
            raise _taken(path)
        temporary.rename(path)
    elif replace:
        os.replace(temporary, path)
    else:
        try:
            os.link(temporary, path)  # fails if the name is taken, even by another run in this moment
        except FileExistsError as error:
            raise _taken(path) from error
        except OSError:  # a file system without hard links: reserve the name
            path.touch(exist_ok=False)
            os.replace(temporary, path)
    sync(path.parent)


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def sweep_temporaries(folder: str | os.PathLike) -> int:
    """Delete the temporary files and folders that killed writers left in `folder`; return their number."""
    swept = 0
    with contextlib.suppress(OSError), os.scandir(os.fspath(Path(folder))) as entries:
        found = [Path(entry.path) for entry in entries if _TEMPORARY.fullmatch(entry.name) and not entry.is_symlink()]
        for temporary in found:
            with contextlib.suppress(OSError):  # another process may sweep or finish it at the same time, or hold it
                if sys.platform == "win32" and time.time() - temporary.stat().st_mtime < _STALE_HOURS * 3600:
                    continue
                with locked(temporary, wait=False):
                    _delete(temporary)
                    swept += 1
    if swept:
        logger.info("removed %d unfinished temporary file(s) from %s", swept, folder)
    return swept


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file or folder; without `wait`, OSError if another process holds it or there are no locks."""
    if sys.platform == "win32":  # an open file cannot be renamed there
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait:
                raise  # a file system without locks: nothing is swept there
        yield
    finally:
        os.close(handle)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # its folder may be gone or read-only; the error that led here says more
            path.unlink(missing_ok=True)
