"""Hostile weights files. Unpickling one of them without care creates a file, the canary."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ldm.checkpoint.formats import _LEGACY_START

STOP, MARK = b".", b"("
LYING_SIZE = 10**15  # bytes that no machine has


class Hostile(NamedTuple):
    """A file that `write(path, canary)` creates; `refused` is the dotted name in the error, None if there is none.

    live: torch's own loader, with its safety off, runs it. Others are also stopped by something else, e.g. damage.
    """

    write: Callable[[Path, Path], None]
    refused: str | None
    live: bool = True
    suffix: str = ".ckpt"


# ----------------------------------------------------------------------------------------------- pickles, word for word


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return b"c" + f"{module}\n{attribute}\n".encode()


def stacked(dotted: str) -> bytes:
    """The name as protocol 4 writes it."""
    module, _, attribute = dotted.rpartition(".")
    return b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, attribute)) + b"\x93"


def call(dotted: str | bytes, *args: bytes) -> bytes:
    return (name(dotted) if isinstance(dotted, str) else dotted) + MARK + b"".join(args) + b"tR"


def touch(canary: Path) -> bytes:
    """The argument that makes a shell, as `os.system` starts one, create the canary."""
    return text(f"touch '{canary}'")


def source(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w')"


def weights_and(extra: bytes, protocol: int = 2) -> bytes:
    """A pickle of {"state_dict": {}, "extra": ...}."""
    return b"\x80" + bytes([protocol]) + b"}" + MARK + text("state_dict") + b"}" + text("extra") + extra + b"u" + STOP


# ----------------------------------------------------------------------------------------------------------- containers


def zipped(body: bytes, *more: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint as torch writes it since 1.6, around any pickle; `more` are other records."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # two records of one name
        for record, content in (("archive/data.pkl", body), ("archive/version", b"3\n"), *more):
            archive.writestr(record, content)
    return file.getvalue()


def legacy(*pickles: bytes) -> bytes:
    """A checkpoint as torch wrote it before 1.6: a stream of pickles after the magic number."""
    whole = [pickle.dumps(1001, 2), pickle.dumps({"little_endian": True, "protocol_version": 1001}, 2)]
    whole += [b"\x80\x02}.", pickle.dumps([], 2)]
    return _LEGACY_START + b"".join([*pickles, *whole[len(pickles) :]])


def tar(first: str, body: bytes) -> bytes:
    """A checkpoint as torch wrote it before 0.1.10."""
    file = io.BytesIO()
    numbers = pickle.dumps(0, 2) + pickle.dumps([], 2)
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="latin1") as archive:
        for record, content in ((first, b""), ("storages", numbers), ("tensors", numbers), ("pickle", body)):
            info = tarfile.TarInfo(record)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def in_zip(make: Callable[[Path], bytes], refused: str | None, **kwargs: object) -> Hostile:
    return Hostile(lambda path, canary: path.write_bytes(zipped(make(canary))) and None, refused, **kwargs)


def whole(make: Callable[[Path], bytes], refused: str | None, **kwargs: object) -> Hostile:
    return Hostile(lambda path, canary: path.write_bytes(make(canary)) and None, refused, **kwargs)


def system(canary: Path) -> bytes:
    return call("posix.system", touch(canary))


def calling(dotted: str, *args: Callable[[Path], bytes], live: bool = True) -> Hostile:
    """A zip file that calls the dotted name, which the error must name. `live` is false for background processes."""
    return in_zip(lambda canary: weights_and(call(dotted, *(arg(canary) for arg in args))), dotted, live=live)


def code(canary: Path) -> bytes:
    return text(source(canary))


def script(canary: Path) -> bytes:
    path = canary.with_suffix(".py")
    path.write_text(source(canary))
    return text(str(path))


def words(canary: Path) -> bytes:
    return b"]" + MARK + text("touch") + text(str(canary)) + b"e"


def inner_file(canary: Path) -> bytes:
    """The path of another hostile file, for loaders within loaders."""
    path = canary.with_suffix(".inner")
    path.write_bytes(zipped(weights_and(system(canary))))
    return text(str(path))


def pickled(canary: Path) -> bytes:
    raw = legacy(b"\x80\x02" + system(canary) + STOP)
    return b"B" + struct.pack("<I", len(raw)) + raw  # bytes, protocol 3


def text_of(body: bytes) -> bytes:
    """Bytes as protocol 2 writes them."""
    return call("_codecs.encode", text(body.decode("latin1")), text("latin1"))


# ------------------------------------------------------------------------------------------------------------ the files

FILES: dict[str, Hostile] = {
    # Names that are code, called as a pickle calls (REDUCE).
    "posix.system": calling("posix.system", touch),
    "os.system": calling("os.system", touch),
    "os.popen": calling("os.popen", touch, live=False),
    "eval": calling("builtins.eval", code),
    "exec": calling("builtins.exec", code),
    "eval of Python 2": in_zip(lambda c: weights_and(call(b"c__builtin__\neval\n", code(c))), "builtins.eval"),
    "getattr of __import__": in_zip(
        lambda c: weights_and(
            call(call("builtins.getattr", call("builtins.__import__", text("os")), text("system")), touch(c))
        ),
        "builtins.getattr",
    ),
    "__import__": in_zip(
        lambda c: weights_and(call("builtins.__import__", text("os")) + b"0" + system(c)), "builtins.__import__"
    ),
    "getattr alone": in_zip(
        lambda c: weights_and(call(call("builtins.getattr", name("os.path"), text("join")), code(c))),
        "builtins.getattr",
        live=False,
    ),
    "runpy": calling("runpy.run_path", script),
    "subprocess": calling("subprocess.check_output", words),
    "Popen": calling("subprocess.Popen", words, live=False),
    "partial": in_zip(
        lambda c: weights_and(call(call("functools.partial", name("posix.system"), touch(c)))), "functools.partial"
    ),
    "attrgetter": in_zip(
        lambda c: weights_and(
            call(
                call(call("operator.attrgetter", text("system")), call("importlib.import_module", text("os"))), touch(c)
            )
        ),
        "operator.attrgetter",
    ),
    "timeit": in_zip(
        lambda c: weights_and(call("timeit.main", b"]" + MARK + text("-n1") + text("-r1") + code(c) + b"e")),
        "timeit.main",
    ),
    # Names of the libraries that a checkpoint is read with.
    "torch's storage": in_zip(
        lambda c: weights_and(call("torch.storage._load_from_bytes", pickled(c)), 3), "torch.storage._load_from_bytes"
    ),
    "torch's loader": calling("torch.serialization.load", inner_file, live=False),
    "torch's hub": in_zip(lambda c: weights_and(call("torch.hub.load", inner_file(c))), "torch.hub.load", live=False),
    "torch's rebuilding": in_zip(
        lambda c: weights_and(
            call(
                "torch._tensor._rebuild_from_type_v2",
                name("posix.system"),
                name("torch.Tensor"),
                MARK + touch(c) + b"t",
                b"N",
            )
        ),
        "posix.system",
    ),
    "numpy's array of objects": in_zip(
        lambda c: weights_and(
            call("numpy._core.multiarray._reconstruct", name("numpy.ndarray"), MARK + b"K\x00t", text("b"))
            + MARK
            + b"K\x01"
            + MARK
            + b"K\x01t"
            + call("numpy.dtype", text("O8"))
            + b"\x89]"
            + system(c)
            + b"at"
            + b"b"
        ),
        "numpy._core.multiarray._reconstruct",
    ),
    "numpy's own tests": in_zip(
        lambda c: weights_and(call("numpy.testing._private.utils.runstring", code(c), b"}")),
        "numpy.testing._private.utils.runstring",
    ),
    "omegaconf's node": in_zip(
        lambda c: weights_and(name("omegaconf.dictconfig.DictConfig") + b")\x81}" + text("x") + system(c) + b"sb"),
        "omegaconf.dictconfig.DictConfig",
    ),
    "transformers' pipeline": in_zip(
        lambda c: weights_and(call("transformers.dynamic_module_utils.get_class_in_module", text("X"), script(c))),
        "transformers.dynamic_module_utils.get_class_in_module",
    ),
    "our own configs": in_zip(
        lambda c: weights_and(call("ldm.util.allow_targets", text("os")) + b"0" + system(c)), "ldm.util.allow_targets"
    ),
    # Other words of the pickle language.
    "INST": in_zip(lambda c: b"(" + f"S'touch {c}'\n".encode() + b"iposix\nsystem\n" + STOP, "posix.system"),
    "OBJ": in_zip(
        lambda c: weights_and(MARK + name("subprocess.Popen") + words(c) + b"o" + system(c)), "subprocess.Popen"
    ),
    "NEWOBJ": in_zip(lambda c: weights_and(name("subprocess.Popen") + b")\x81" + b"0" + system(c)), "subprocess.Popen"),
    "NEWOBJ_EX": in_zip(
        lambda c: weights_and(name("subprocess.Popen") + b")}\x92" + b"0" + system(c), 4), "subprocess.Popen"
    ),
    "STACK_GLOBAL": in_zip(lambda c: weights_and(call(stacked("posix.system"), touch(c)), 4), "posix.system"),
    "STACK_GLOBAL from the memo": in_zip(
        lambda c: (
            b"\x80\x04"
            + text("posix")
            + b"\x94"
            + b"0"
            + text("system")
            + b"\x940"
            + text("harmless")
            + b"0"
            + call(b"h\x00h\x01\x93", touch(c))
            + STOP
        ),
        "posix.system",
    ),
    "STACK_GLOBAL of torch's": in_zip(
        lambda c: weights_and(call(stacked("torch.storage._load_from_bytes"), pickled(c)), 4),
        "torch.storage._load_from_bytes",
    ),
    "EXT": in_zip(lambda c: weights_and(b"\x82\x01"), None, live=False),
    "BUILD on a stub": in_zip(
        lambda c: weights_and(
            name("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
            + b")\x81}"
            + text("best")
            + system(c)
            + b"sb"
        ),
        "posix.system",
    ),
    "a stub as a key": in_zip(
        lambda c: weights_and(
            b"}" + name("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint") + system(c) + b"s"
        ),
        "posix.system",
    ),
    "a stub as a function's argument": in_zip(
        lambda c: weights_and(call("posix.system", touch(c), name("numpy.dtype")) + b"0" + system(c)),
        "posix.system",
        live=False,
    ),
    "numpy's scalar of an object": in_zip(
        lambda c: weights_and(call("numpy.core.multiarray.scalar", call("numpy.dtype", text("O8")), system(c))),
        "posix.system",
    ),
    "BUILD on a dict": in_zip(
        lambda c: weights_and(call("collections.OrderedDict") + b"}" + text("x") + system(c) + b"sb"), "posix.system"
    ),
    "an identity that is a call": in_zip(
        lambda c: weights_and(MARK + text("storage") + system(c) + b"tQ"), "posix.system"
    ),
    "an identity in text": in_zip(
        lambda c: b"\x80\x02}" + b"Pposix system\n" + system(c) + b"s" + STOP, "posix.system", live=False
    ),
    "a storage of another kind": in_zip(
        lambda c: weights_and(
            MARK + text("storage") + call("builtins.eval", code(c)) + text("0") + text("cpu") + b"K\x01tQ"
        ),
        "builtins.eval",
    ),
    "behind the state_dict": in_zip(
        lambda c: b"\x80\x02" + b"}" + text("w") + b"]" + MARK + b"N" * 5000 + b"es" + system(c) + b"0" + STOP,
        "posix.system",
    ),
    "in the state_dict": in_zip(
        lambda c: b"\x80\x02}" + text("state_dict") + b"}" + text("w") + system(c) + b"ss" + STOP, "posix.system"
    ),
    # Containers.
    "legacy, first pickle": whole(lambda c: legacy(b"\x80\x02" + system(c) + STOP), "posix.system"),
    "legacy, third pickle": whole(
        lambda c: legacy(pickle.dumps(1001, 2), pickle.dumps({}, 2), weights_and(system(c))), "posix.system"
    ),
    "legacy, last pickle": whole(
        lambda c: legacy(pickle.dumps(1001, 2), pickle.dumps({}, 2), b"\x80\x02}.", b"\x80\x02" + system(c) + STOP),
        "posix.system",
    ),
    "legacy, truncated": whole(lambda c: legacy(b"\x80\x02" + system(c) + b"0"), "posix.system"),
    "a bare pickle": whole(lambda c: b"\x80\x02" + system(c) + STOP, "posix.system"),
    "a bare pickle in text": whole(lambda c: f"cposix\nsystem\n(S'touch {c}'\ntR.".encode(), "posix.system"),
    "a bare pickle, named .safetensors": whole(
        lambda c: b"\x80\x02" + system(c) + STOP, "posix.system", suffix=".safetensors", live=False
    ),
    "a bare pickle, named .pt": whole(lambda c: b"\x80\x02" + system(c) + STOP, "posix.system", suffix=".pt"),
    "a zip file, named .safetensors": in_zip(
        lambda c: weights_and(system(c)), "posix.system", suffix=".safetensors", live=False
    ),
    "a legacy file, named .safetensors": whole(
        lambda c: legacy(b"\x80\x02" + system(c) + STOP), "posix.system", suffix=".safetensors", live=False
    ),
    "tar": whole(lambda c: tar("readme", b"\x80\x02" + system(c) + STOP), None),
    "tar, with the legacy magic number": whole(
        lambda c: tar(_LEGACY_START.decode("latin1"), b"\x80\x02" + system(c) + STOP), None
    ),
    "zip, truncated": whole(lambda c: zipped(weights_and(system(c)))[:-40], None, live=False),
    "zip, two pickles of one name": whole(
        lambda c: zipped(b"\x80\x02}.", ("archive/data.pkl", weights_and(system(c)))), "posix.system"
    ),
    "zip, two folders": whole(
        lambda c: zipped(weights_and(system(c)), ("other/data.pkl", b"\x80\x02}.")), None, live=False
    ),
    "zip in a zip": whole(
        lambda c: zipped(b"\x80\x02}.", ("archive/model.ckpt", zipped(weights_and(system(c))))), None, live=False
    ),
    "zip, records outside": whole(
        lambda c: zipped(
            b"\x80\x02}.", *((f"{up}canary", b"x") for up in ("../", "../../", "archive/../../", "/tmp/ldm-hostile-"))
        ),
        None,
        live=False,
    ),
    "zip behind a safetensors' head": whole(
        lambda c: safetensors({}) + zipped(weights_and(system(c))), None, live=False
    ),
    "zip behind the legacy magic number": whole(
        lambda c: legacy(b"\x80\x02" + system(c) + STOP) + zipped(b"\x80\x02}."), "posix.system"
    ),
    "TorchScript": whole(
        lambda c: zipped(
            weights_and(system(c)), ("archive/constants.pkl", b"\x80\x02)."), ("archive/code/__torch__.py", b"x")
        ),
        None,
        live=False,
    ),
    "zip, a bomb": whole(lambda c: zipped(bytes(24 << 20), compression=zipfile.ZIP_DEFLATED), None, live=False),
    # Heads that lie.
    "safetensors, a head longer than the file": whole(
        lambda c: safetensors({}, length=2**40), None, live=False, suffix=".safetensors"
    ),
    "safetensors, the longest head there is": whole(
        lambda c: safetensors({}, length=2**64 - 1), None, live=False, suffix=".safetensors"
    ),
    "safetensors, named .ckpt": whole(lambda c: safetensors({}, length=5), None, live=False),
    "safetensors, no JSON": whole(lambda c: safetensors(b"{" + b"[" * 100_000), None, live=False),
    "safetensors, no text": whole(lambda c: safetensors(b'{"\xff\xfe": {}}'), None, live=False),
    "safetensors, huge": whole(
        lambda c: safetensors(
            {"w": {"dtype": "F32", "shape": [LYING_SIZE], "data_offsets": [0, 4 * LYING_SIZE]}}, b"abcd"
        ),
        None,
        live=False,
    ),
    "safetensors, overflow": whole(
        lambda c: safetensors({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"abcd"),
        None,
        live=False,
    ),
    "safetensors, negative": whole(
        lambda c: safetensors({"w": {"dtype": "U8", "shape": [-4], "data_offsets": [-4, 0]}}, b"abcd"), None, live=False
    ),
    "safetensors, overlapping": whole(
        lambda c: safetensors(
            {n: {"dtype": "U8", "shape": [4], "data_offsets": [s, s + 4]} for n, s in (("a", 0), ("b", 2))}, b"abcdef"
        ),
        None,
        live=False,
    ),
    "safetensors, a shape that is none": whole(
        lambda c: safetensors({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, b"abcd"), None, live=False
    ),
    "safetensors, with a tail": whole(
        lambda c: safetensors(
            {"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"abcd" + b"\x80\x02" + system(c) + STOP
        ),
        None,
        live=False,
    ),
    "a tensor larger than its memory": whole(
        lambda c: zipped(tensor((2**40,), (1,)), ("archive/data/0", b"abcd")), None, live=False
    ),
    "a tensor beside its memory": whole(
        lambda c: zipped(tensor((1,), (1,), offset=2**40), ("archive/data/0", b"abcd")), None, live=False
    ),
    "a tensor before its memory": whole(
        lambda c: zipped(tensor((1,), (1,), offset=-8), ("archive/data/0", b"abcd")), None, live=False
    ),
    "a tensor of backward strides": whole(
        lambda c: zipped(tensor((2,), (-1,)), ("archive/data/0", b"abcdabcd")), None, live=False
    ),
}


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, numel: int = 1) -> bytes:
    """A pickle of {"w": a float32 tensor}, as torch's loader rebuilds it from the record data/0."""

    def number(value: int) -> bytes:
        raw = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def numbers(values: tuple[int, ...]) -> bytes:
        return MARK + b"".join(map(number, values)) + b"t"

    storage = MARK + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + number(numel) + b"tQ"
    rebuilt = call(
        "torch._utils._rebuild_tensor_v2",
        storage,
        number(offset),
        numbers(shape),
        numbers(stride),
        b"\x89",
        call("collections.OrderedDict"),
    )
    return b"\x80\x02}" + text("w") + rebuilt + b"s" + STOP


def unsafely(path: Path) -> None:
    """Load a file as nobody should, so that tests see what would have happened."""
    torch.load(path, map_location="cpu", weights_only=False)


def rename_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Replace a module name in the pickles of a checkpoint, as older versions of a library wrote it."""
    if not zipfile.is_zipfile(path):
        path.write_bytes(path.read_bytes().replace(old, new))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(old, new) if name.endswith(".pkl") else data)
