"""Reading the formats that weights come in (.ckpt zip and legacy, .safetensors), always as data: nothing that a file says is ever run.

Internal to `ldm.checkpoint.load`, which is what to import from.
"""

import _compat_pickle
import contextlib
import io
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled: files of torch < 1.6
_SLACK = 16 << 20  # bytes that a compressed file of any size may unpack to
_NOT_WEIGHTS = (  # (how a file begins that is no weights, what it is and what to do)
    (b"version https://git-lfs", "a git-lfs pointer, not the weights: run `git lfs pull` where it came from"),
    (b"<", "a web page, not the weights: the download failed or asked for a login"),
)


class CheckpointError(ValueError):
    """A weights file that cannot be used, in one line that names it."""


class UnsafeCheckpointError(CheckpointError):
    """A file that asks for code to be run on loading; `refused` is the dotted name that it asks for."""

    def __init__(self, path: str | os.PathLike, refused: str) -> None:
        self.refused = refused
        super().__init__(
            f"{path}: refused, because it names {refused}, which is code and no weight; get it as .safetensors from a source you trust"
        )


def verify_checkpoint(path: str | os.PathLike) -> None:
    """Raise CheckpointError unless the file reads as a whole: a zip file's checksums, and every entry; its tensors stay on the disk."""
    path = existing_file(path)
    with open(path, "rb") as file:
        start = file.read(16)
    if _is_safetensors(start, path.stat().st_size):
        _read_safetensors(path)
        return
    check_archive(path)
    load_pickle(path, map_location="cpu", mmap=start.startswith(b"PK"))


def check_archive(path: Path) -> None:
    """Raise CheckpointError where a zip file's records do not agree with their checksums; other formats carry none."""
    if not zipfile.is_zipfile(path):
        return
    _check_no_bomb(path)
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        struct.error,
        NotImplementedError,
    ) as error:
        raise CheckpointError(f"{path}: corrupt: {error}") from error
    if bad is not None:
        raise CheckpointError(f"{path}: corrupt: the checksum of {bad} is wrong")


def _check_no_bomb(path: Path) -> None:
    """Raise CheckpointError for a zip file whose records unpack to far more than it takes itself: torch stores them as they are."""
    unpacked, size = 0, path.stat().st_size
    with contextlib.suppress(zipfile.BadZipFile, OSError, ValueError, struct.error), zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > 4 * size + _SLACK:
        raise CheckpointError(
            f"{path}: refused, because its {size:,} bytes unpack to {unpacked:,}, and weights are never so compressed"
        )


def existing_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, where a .ckpt or .safetensors file is needed")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: empty (0 bytes): the download or the save did not finish")
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file's state_dict, under the file's own names."""
    with open(path, "rb") as file:
        start = file.read(16)
    if _is_safetensors(start, path.stat().st_size):
        return _read_safetensors(path)
    content = load_pickle(path, map_location="cpu", mmap=start.startswith(b"PK"))
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, where a state_dict was expected")
    weights = {
        name: value.detach() for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not weights:
        raise CheckpointError(f"{path}: holds no tensors; its entries are {some(map(str, content))}")
    return weights


def read_shards(index: Path) -> dict[str, Tensor]:
    """Every tensor of a sharded file, given its index (`*.index.json`): the names, and which file beside it holds each."""
    import json

    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) and isinstance(file, str) for name, file in weight_map.items()):
            raise TypeError("names and files must be text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no index of shards ({type(error).__name__}: {error})") from error
    shards = {}
    for file in dict.fromkeys(weight_map.values()):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: names the shard {file!r}: shards lie beside their index")
        shards[file] = read_tensors(existing_file(index.with_name(file)))
    absent = [name for name, file in weight_map.items() if name not in shards[file]]
    if absent:
        raise CheckpointError(f"{index}: its shards lack {len(absent)} of {len(weight_map)} tensors ({some(absent)})")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _is_safetensors(start: bytes, size: int) -> bool:
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete .safetensors file: {error}") from error


def load_pickle(path: Path, map_location: Any, mmap: bool) -> Any:
    """torch.load with weights_only, under stubs for what old Lightning files hold beside their weights. There is no other way in."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start.startswith((b"PK\x03\x04", _LEGACY_START)):
        raise _no_weights(path, start)
    _check_no_bomb(path)
    try:
        with torch.serialization.safe_globals(list(_STUBS)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (
                path.suffix == ".safetensors"
            ):  # a misnamed file: by its path torch would take it for what its ending says
                with open(path, "rb") as file:
                    return torch.load(file, map_location=map_location, weights_only=True)
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (
        Exception
    ) as error:  # torch reports a damaged file by a dozen types, and every one of them means the same to the user
        if isinstance(error, pickle.UnpicklingError) and (refused := _refused_global(path, str(error))):
            raise UnsafeCheckpointError(path, refused) from error
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path}: a TorchScript program, and no weights alone: save its state_dict() with torch.save"
            ) from error
        if _is_other_archive(path):
            raise CheckpointError(
                f"{path}: an archive without weights of its own: unpack it and give the .ckpt file inside"
            ) from error
        raise CheckpointError(f"{path}: cannot be read, it is truncated or corrupt ({_first_line(error)})") from error


def _is_other_archive(path: Path) -> bool:
    with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        return not any(name.endswith("data.pkl") for name in archive.namelist())
    return False


def _no_weights(path: Path, start: bytes) -> CheckpointError:
    for beginning, meaning in _NOT_WEIGHTS:
        if start.lstrip().startswith(beginning):
            return CheckpointError(f"{path}: {meaning}")
    with open(path, "rb") as file:
        named = [name for name in _globals_of(file) if not _harmless(name)]
    if named:
        return UnsafeCheckpointError(path, named[0])
    return CheckpointError(f"{path}: neither a .ckpt nor a .safetensors file (it begins with {start[:8]!r})")


# ------------------------------------------------------------------------------------- what old files hold beside weights


class _Nothing:
    """Stands for a class that a checkpoint only mentions, as a dictionary key."""


_NUMPY_CODES = {  # numpy's name of a kind of number -> struct's
    **{"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
    **{"f2": "e", "f4": "f", "f8": "d"},
}


class _NumpyType:
    """Stands for numpy.dtype: remembers the type's code, e.g. "f8", and its byte order."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


def _numpy_scalar(kind: Any, raw: Any = b"") -> bool | int | float | None:
    """Stands for numpy's scalar constructor: the plain Python number, or None for what is no number."""
    code = _NUMPY_CODES.get(getattr(kind, "code", None))
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if code is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(f"<{code}"):
        return None
    return struct.unpack(kind.order + code, raw)[0]


_STUBS: tuple[tuple[Any, str], ...] = (
    (_Nothing, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
)


_PARTS_OF_TENSORS = re.compile(
    r"torch\.(\w*(Storage|Tensor)|Size|device|b?float\w*|[ug]?int\w*|complex\w*|bool|double|half|long|short|storage\.\w+Storage|_utils\._rebuild_\w+"
    r"|_tensor\._rebuild_from_type_v2|nn\.parameter\.Parameter|serialization\._get_layout)|collections\.(OrderedDict|Counter)|_codecs\.encode"
    r"|builtins\.(bytearray|set|complex)"
)


def _refused_global(path: Path, message: str) -> str | None:
    """The dotted name that the safe loader stopped at; None where the file is damaged rather than hostile."""
    if match := re.search(r"GLOBAL (\S+)", message):
        return _present_name(match[1] if "." in match[1] else f"builtins.{match[1]}")
    return next((name for name in _globals_in(path) if not _harmless(name)), None)


def _present_name(name: str) -> str:
    """A dotted name of Python 3, where pickles of protocol 2 and below use Python 2's."""
    module, _, attribute = name.rpartition(".")
    module, attribute = _compat_pickle.NAME_MAPPING.get(
        (module, attribute), (_compat_pickle.IMPORT_MAPPING.get(module, module), attribute)
    )
    return f"{module}.{attribute}"


def _harmless(name: str) -> bool:
    return bool(_PARTS_OF_TENSORS.fullmatch(name)) or name in {stub for _, stub in _STUBS}


def _globals_in(path: Path) -> Iterator[str]:
    """Every dotted name in the file's pickles, found by reading their instructions without following any."""
    if zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile, OSError, KeyError, RuntimeError), zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.endswith(".pkl"):
                    yield from _globals_of(io.BytesIO(archive.read(entry)))
    else:
        with open(path, "rb") as file:
            yield from _globals_of(file)


def _globals_of(file: io.BufferedIOBase) -> Iterator[str]:
    with contextlib.suppress(ValueError, EOFError, struct.error, MemoryError, OverflowError):
        while True:
            memo: dict[int, Any] = {}
            values: list[Any] = [None, None]  # what was put on the stack last; texts alone matter
            for operation, argument, _ in pickletools.genops(file):
                if operation.name in ("GLOBAL", "INST"):
                    yield _present_name(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    yield _present_name(".".join(map(str, values[-2:])))
                elif "PUT" in operation.name or operation.name == "MEMOIZE":
                    memo[len(memo) if argument is None else argument] = values[-1]
                elif "GET" in operation.name:
                    values.append(memo.get(argument))
                elif operation.stack_after:
                    values.append(argument)


def some(names: Iterable[str], count: int = 3) -> str:
    """The first few names, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _first_line(error: Exception) -> str:
    text = str(error).rpartition("WeightsUnpickler error: ")[
        2
    ]  # torch wraps the reason in advice to turn the safety off
    return (text.strip() or type(error).__name__).splitlines()[0][:200]
