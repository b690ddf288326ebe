"""Readers of .ckpt (zip and legacy pickles) and .safetensors files. They are data: nothing in them ever runs."""

import _compat_pickle
import contextlib
import functools
import io
import json
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled: files of torch < 1.6
_SLACK = 16 << 20  # bytes that a compressed file of any size may unpack to
_NOT_WEIGHTS = (  # (first bytes of a file, what it is and how to get the weights)
    (b"version https://git-lfs", "a git-lfs pointer, not the weights: run `git lfs pull` where it came from"),
    (b"<", "a web page, not the weights: the download failed or asked for a login"),
)


class CheckpointError(ValueError):
    """Unusable weights; the message is one line that names the file."""


class MissingWeightsError(CheckpointError, FileNotFoundError):
    """No file or folder at the path."""


class UnsafeCheckpointError(CheckpointError):
    """A file that asks for code to run on loading; `refused` is the dotted name of that code."""

    def __init__(self, path: str | os.PathLike, refused: str) -> None:
        self.refused = refused
        super().__init__(
            f"{path}: refused, because it references {refused}, which is code, not a weight; "
            f"get the weights as .safetensors from a source you trust"
        )


def existing_file(path: str | os.PathLike) -> Path:
    """The path of a file that is not empty; CheckpointError otherwise."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder; expected a .ckpt or .safetensors file")
    if not path.is_file():
        raise MissingWeightsError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: empty (0 bytes): the download or the save did not finish")
    return path


def verify_checkpoint(path: str | os.PathLike) -> None:
    """Raise CheckpointError unless a file and the parts that it names are intact, see `verify_file`."""
    content = verify_file(path)
    for part in part_files(Path(path), content) if isinstance(content, Mapping) else ():
        verify_file(part)


def verify_file(path: str | os.PathLike) -> Any:
    """Return the content of a file; CheckpointError unless all of it can be read and a zip file's checksums match."""
    path = existing_file(path)
    if not _is_safetensors(path):
        check_archive(path)
    return _read_content(path)


def read_checkpoint(
    path: str | os.PathLike, map_location: Any = "cpu", verify: bool = True, whole: bool = True
) -> dict[str, Any]:
    """A whole Lightning checkpoint (weights, optimizers, loops); `verify` checks the checksum of every byte first.

    whole: False leaves the tensors of a sharded checkpoint in their files, as SplitTensor.
    """
    path = existing_file(path)
    if verify:
        check_archive(path)
    content = load_pickle(path, map_location=map_location, mmap=False)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    for part in part_files(path, content) if verify else ():
        check_archive(part)
    return with_parts(path, content, whole)


def read_entry(path: Path, key: str) -> Any:
    """An entry of a Lightning checkpoint, one of SMALL_ENTRIES; None for other files and without it."""
    version = path.stat()
    return _small_entries(path, version.st_ino, version.st_size, version.st_mtime_ns).get(key)


@functools.lru_cache(maxsize=16)
def _small_entries(path: Path, *version: int) -> dict[str, Any]:
    """Read once for each version of a file: unpickling takes as long for one entry as for all tensors."""
    content = load_pickle(path, map_location="cpu", mmap=True) if _is_zip(path) else None
    return {key: content[key] for key in SMALL_ENTRIES if key in content} if isinstance(content, Mapping) else {}


def global_step(path: Path) -> int | None:
    """The optimizer step at which Lightning wrote a checkpoint; None for a file that holds weights only."""
    step = read_entry(path, "global_step")
    return step if isinstance(step, int) else None


def saved_at(path: Path) -> float:
    """The time of a checkpoint's save in s since 1970: as it holds it, else the file's, which a copy may not keep."""
    try:
        time = read_entry(path, "saved_at")
    except (CheckpointError, OSError):
        time = None  # damaged, or a folder
    return time if isinstance(time, float) else path.stat().st_mtime


def is_full_state(path: Path) -> bool:
    """True if a run can resume from a checkpoint: it holds the state of the optimizers."""
    content = load_pickle(path, map_location="cpu", mmap=_is_zip(path))
    return isinstance(content, Mapping) and "optimizer_states" in content


def read_state(path: Path) -> Mapping[Any, Any]:
    """Every entry of a file's state dict, also those that are not tensors; CheckpointError if the file has none."""
    content = _read_content(existing_file(path))
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        wanted = {key: content[key] for key in ("state_dict", PARTS) if key in content}
        content = with_parts(path, wanted)["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a state dict")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file's state dict under its own name, on the CPU, memory-mapped where the format allows."""
    content = read_state(path)
    weights = {
        name: value.detach() for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not weights:
        raise CheckpointError(f"{path}: holds no tensors; its entries are {preview(map(str, content))}")
    return weights


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a .safetensors file; empty for other files."""
    if not _is_safetensors(existing_file(path)):
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete .safetensors file: {error}") from error


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> the name of the file next to the index (`*.index.json`) that holds it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) and isinstance(file, str) for name, file in weight_map.items()):
            raise TypeError("names and files must be text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({type(error).__name__}: {error})") from error
    for file in weight_map.values():
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: invalid shard {file!r}: shards must be in the folder of their index")
    return weight_map


def read_shards(index: Path) -> dict[str, Tensor]:
    """Every tensor of a sharded file, given its index."""
    weight_map = read_index(index)
    shards = {file: read_tensors(index.with_name(file)) for file in dict.fromkeys(weight_map.values())}
    missing = [name for name, file in weight_map.items() if name not in shards[file]]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(weight_map)} tensors are missing from the shards ({preview(missing)})"
        )
    return {name: shards[file][name] for name, file in weight_map.items()}


def preview(names: Iterable[str], count: int = 3) -> str:
    """The first few names, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# ------------------------------------------------------------------------------------------- sharded checkpoints
# The checkpoint of a sharded run is an index: an ordinary .ckpt file whose weights and optimizer states have no values
# (they are on the meta device), and an entry with the names of the files that do: one of each rank, in a new folder for
# each save. The rows of a tensor (its first axis) are divided among the ranks in their order. Parts never change.

PARTS = "parts"  # the entry, and the folder next to the index
SPLIT_ENTRIES = ("state_dict", "optimizer_states")  # of a checkpoint
SMALL_ENTRIES = ("alpha", "base", "global_step", PARTS, "saved_at", "tokens")


class SplitTensor:
    """A tensor whose rows are in several files, memory-mapped and in their order."""

    def __init__(self, shape: torch.Size, parts: Iterable[Tensor]) -> None:
        self.shape, self.parts = shape, tuple(parts)

    def __getitem__(self, rows: slice) -> Tensor:
        pieces, first = [self.parts[0][:0]], 0
        for part in self.parts:
            start, stop = max(rows.start - first, 0), min(rows.stop - first, len(part))
            pieces += [part[start:stop]] if start < stop else []
            first += len(part)
        return torch.cat(pieces)

    def whole(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


def map_tensors(f: Callable[[str, Tensor], Any], value: Any, place: str = "") -> Any:
    """`value` with f(place, tensor) for each tensor in its dictionaries, lists and tuples; place: "['x'][0]"."""
    if isinstance(value, Tensor):
        return f(place, value)
    if isinstance(value, Mapping):
        return {key: map_tensors(f, item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(f, item, f"{place}[{i}]") for i, item in enumerate(value))
    return value


def part_files(path: Path, content: Any = None) -> list[Path]:
    """The files of an index (`content`, if it is read already), which exist; none for other checkpoints."""
    files = named_parts(path, read_entry(path, PARTS) if content is None else content.get(PARTS))
    if missing := [file for file in files if not file.is_file()]:
        raise CheckpointError(f"{path}: its part {missing[0]} is missing: an index needs the folder {PARTS} next to it")
    return files


def named_parts(path: Path, names: Any) -> list[Path]:
    """The files that the entry `parts` of an index names, also missing ones."""
    if names is None:
        return []
    if not (isinstance(names, list) and names and all(map(_is_part, names))):
        raise CheckpointError(f"{path}: invalid names of its parts: {names!r:.80}")
    return [path.parent / name for name in names]


def _is_part(name: Any) -> bool:
    where = PurePosixPath(name).parts if isinstance(name, str) else ()
    return len(where) == 3 and where[0] == PARTS and ".." not in where


def with_parts(path: Path, content: dict[str, Any], whole: bool = True) -> dict[str, Any]:
    """An index with the tensors of its parts in their places; other checkpoints as they are."""
    if not (files := part_files(path, content)):
        return content
    parts = [load_pickle(file, map_location="cpu", mmap=True) for file in files]
    tensors = [each.get("tensors") if isinstance(each, Mapping) else None for each in parts]

    def find(place: str, empty: Tensor) -> Any:
        own = [each[place] for each in tensors if isinstance(each, Mapping) and place in each]
        fine = bool(own) and all(isinstance(each, Tensor) and each.shape[1:] == empty.shape[1:] for each in own)
        if not fine or (sum(map(len, own)) != len(empty) if empty.ndim else len(own) != 1):
            raise CheckpointError(f"{path}: its parts lack rows of {place}")
        split = SplitTensor(empty.shape, own)
        return split.whole() if whole else split

    filled = {key: map_tensors(find, content[key], f"[{key!r}]") for key in SPLIT_ENTRIES if key in content}
    return {**{key: value for key, value in content.items() if key != PARTS}, **filled}


# ------------------------------------------------------------------------------------------------------- formats


def check_archive(path: Path) -> None:
    """Raise CheckpointError if a record of a zip file does not match its checksum; other formats have no checksums."""
    try:
        if not zipfile.is_zipfile(path):
            return
        _check_unpacked_size(path)
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error) as error:
        raise CheckpointError(f"{path}: corrupt: {error}") from error
    if bad is not None:
        raise CheckpointError(f"{path}: corrupt: the checksum of {bad} is wrong")


def _check_unpacked_size(path: Path) -> None:
    """Raise CheckpointError for a zip bomb: torch stores its records uncompressed."""
    unpacked, size = 0, path.stat().st_size
    with contextlib.suppress(zipfile.BadZipFile, OSError, ValueError, struct.error), zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > 4 * size + _SLACK:
        raise CheckpointError(
            f"{path}: refused: its {size:,} bytes unpack to {unpacked:,}; weights are never compressed that much"
        )


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def _is_zip(path: Path) -> bool:
    return _first_bytes(path).startswith(b"PK")


def _is_safetensors(path: Path) -> bool:
    """True if the file begins with the length of a JSON header that fits into it."""
    start = _first_bytes(path)
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def _read_content(path: Path) -> Any:
    """The tensors of a .safetensors file, or whatever a .ckpt file holds."""
    if not _is_safetensors(path):
        return load_pickle(path, map_location="cpu", mmap=_is_zip(path))
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete .safetensors file: {error}") from error


def load_pickle(path: Path, map_location: Any, mmap: bool) -> Any:
    """The only call of torch.load: with weights_only, and stubs for classes that old Lightning files reference."""
    start = _first_bytes(path)
    if not start.startswith((b"PK\x03\x04", _LEGACY_START)):
        raise _not_weights(path, start)
    _check_unpacked_size(path)
    try:
        with torch.serialization.safe_globals(list(_STUBS)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":  # misnamed; given the path, torch would go by the suffix
                with open(path, "rb") as file:
                    return torch.load(file, map_location=map_location, weights_only=True)
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # torch reports a damaged file by a dozen types
        raise _load_error(path, error) from error


def _load_error(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, pickle.UnpicklingError) and (refused := _refused_global(path, str(error))):
        return UnsafeCheckpointError(path, refused)
    if "TorchScript" in str(error):
        return CheckpointError(f"{path}: a TorchScript program, not weights: save its state_dict() with torch.save")
    with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        if not any(name.endswith("data.pkl") for name in archive.namelist()):
            return CheckpointError(f"{path}: an archive around the weights: unpack it and pass the .ckpt file inside")
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip()  # the rest is advice to turn the safety off
    reason = (reason or type(error).__name__).splitlines()[0][:200]
    return CheckpointError(f"{path}: cannot be read; the file is truncated or corrupt ({reason})")


def _not_weights(path: Path, start: bytes) -> CheckpointError:
    for beginning, meaning in _NOT_WEIGHTS:
        if start.lstrip().startswith(beginning):
            return CheckpointError(f"{path}: {meaning}")
    with open(path, "rb") as file:
        unsafe = next((name for name in _globals_of(file) if not _is_harmless(name)), None)
    if unsafe:
        return UnsafeCheckpointError(path, unsafe)
    return CheckpointError(f"{path}: neither a .ckpt nor a .safetensors file (it begins with {start[:8]!r})")


# ----------------------------------------------------------------------------- what old files hold besides weights


class _Nothing:
    """Stub for a class that a checkpoint only references, as a dictionary key."""


_NUMPY_CODES = {  # numpy's code of a scalar type -> struct's
    **{"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
    **{"f2": "e", "f4": "f", "f8": "d"},
}


class _ParameterDict(dict):
    """Stub for torch.nn.ParameterDict, in which the paper's code saves textual inversion embeddings."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping) and isinstance(state.get("_parameters"), Mapping):
            self.update(state["_parameters"])


class _NumpyType:
    """Stub for numpy.dtype: keeps the type's code, e.g. "f8", and the byte order."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


def _numpy_scalar(kind: Any, raw: Any = b"") -> bool | int | float | None:
    """Stub for numpy's scalar constructor: the plain Python number, or None for anything else."""
    code = _NUMPY_CODES.get(str(getattr(kind, "code", None)))
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if code is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(f"<{code}"):
        return None
    return struct.unpack(kind.order + code, raw)[0]


_STUBS: tuple[tuple[Any, str], ...] = (
    (_Nothing, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_ParameterDict, "torch.nn.modules.container.ParameterDict"),
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
)
_PARTS_OF_TENSORS = re.compile(
    r"torch\.(\w*(Storage|Tensor)|Size|device|b?float\w*|[ug]?int\w*|complex\w*|bool|double|half|long|short"
    r"|storage\.\w+Storage|_utils\._rebuild_\w+|_tensor\._rebuild_from_type_v2|nn\.parameter\.Parameter"
    r"|serialization\._get_layout)|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|set|complex)"
)


def _refused_global(path: Path, message: str) -> str | None:
    """The dotted name at which the safe loader stopped; None if the file is damaged rather than hostile."""
    if match := re.search(r"GLOBAL (\S+)", message):
        return _python3_name(match[1] if "." in match[1] else f"builtins.{match[1]}")
    return next((name for name in _globals_in(path) if not _is_harmless(name)), None)


def _python3_name(name: str) -> str:
    """Python 3's form of a dotted name; pickles of protocol 2 and below use Python 2's."""
    module, _, attribute = name.rpartition(".")
    module, attribute = _compat_pickle.NAME_MAPPING.get(
        (module, attribute), (_compat_pickle.IMPORT_MAPPING.get(module, module), attribute)
    )
    return f"{module}.{attribute}"


def _is_harmless(name: str) -> bool:
    return bool(_PARTS_OF_TENSORS.fullmatch(name)) or name in {stub for _, stub in _STUBS}


def _globals_in(path: Path) -> Iterator[str]:
    """Every dotted name in the file's pickles, read from their instructions without running any."""
    if zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile, OSError, KeyError, RuntimeError), zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.endswith(".pkl"):
                    yield from _globals_of(io.BytesIO(archive.read(entry)))
    else:
        with open(path, "rb") as file:
            yield from _globals_of(file)


def _globals_of(file: IO[bytes]) -> Iterator[str]:
    with contextlib.suppress(ValueError, EOFError, struct.error, MemoryError, OverflowError):
        while True:
            memo: dict[Any, Any] = {}
            values: list[Any] = [None, None]  # the latest arguments pushed; only strings matter
            for operation, argument, _ in pickletools.genops(file):
                if operation.name in ("GLOBAL", "INST"):
                    yield _python3_name(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    yield _python3_name(".".join(map(str, values[-2:])))
                elif "PUT" in operation.name or operation.name == "MEMOIZE":
                    memo[len(memo) if argument is None else argument] = values[-1]
                elif "GET" in operation.name:
                    values.append(memo.get(argument))
                elif operation.stack_after:
                    values.append(argument)
