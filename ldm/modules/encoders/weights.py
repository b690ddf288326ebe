"""Where pretrained encoders find their weights, and how these come into the module: from a file, a folder or the hub, all or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import nn

from ldm.checkpoint import CheckpointError, read_weights


def fill(module: nn.Module, path: Path, what: str, inner_name: Callable[[str], str], but: Iterable[str] = ()) -> None:
    """Load all weights of `module` from a file, whose names `inner_name` turns into the module's; `but` names those that it makes itself.

    Weights on the meta device are replaced, others overwritten, both in the module's dtype. CheckpointError where one is missing or has
    another shape: then nothing was loaded, and `what` the module is tells the user.
    """
    found = {inner_name(name): tensor for name, tensor in read_weights(path).items()}
    made = frozenset(but)
    wanted = {name: tensor for name, tensor in module.state_dict().items() if name not in made}
    lacking = [name for name, tensor in wanted.items() if name not in found or found[name].shape != tensor.shape]
    if lacking:
        raise CheckpointError(
            f"{path}: {len(lacking)} of {len(wanted)} weights of {what} are missing or differ: {lacking[0]}"
        )
    on_meta = any(tensor.is_meta for tensor in wanted.values())
    state = {name: found[name].to(tensor.dtype) for name, tensor in wanted.items()}
    module.load_state_dict(state, strict=not made, assign=on_meta)


def in_folder(folder: Path, files: Sequence[str]) -> Path:
    """The first of `files` that a folder holds; CheckpointError where it holds none."""
    for name in files:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: holds none of {', '.join(files)}")


def from_hub(repository: str, file: str, what: str, otherwise: str) -> Path:
    """A file of the hub, its cache first. CheckpointError where it is not to be had: `what` is missing, and what to do `otherwise`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except (
        Exception
    ) as error:  # the hub's client fails in many ways, and all of them mean that the file is not to be had
        raise CheckpointError(
            f"{what} are in no loaded checkpoint, not in the hub's cache and not to be downloaded ({type(error).__name__}); {otherwise}"
        ) from error
