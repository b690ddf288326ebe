"""Stages of a model that trains on cached latents: their outputs are in the batch, so they are not built.

A cache (ldm.data.latents) keeps the weights of the stages that made it, `first_stage.safetensors` and
`cond_stage.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import CheckpointError, load_weights, weights_on_meta, write_weights
from ldm.checkpoint.formats import read_metadata, read_tensors
from ldm.config.instantiate import instantiate_from_config
from ldm.config.types import PathText
from ldm.models.training import freeze
from ldm.modules.encoders.base import AbstractEncoder

MOMENTS = "latent_moments"  # of a batch: means, then log variances, (B, 2c, h, w)
LATENT = "latent"  # of a batch: unscaled latents (B, c, h, w) of a first stage without a posterior
EMBEDDING = "cond_embedding"  # of a batch: the encoded condition (B, L, D)
_STAGE, _NULL = "stage.", "unconditional"  # keys of a stage's file


class CachedStage(nn.Module):
    """A frozen stage that is not built, given by its file in a cache.

    Its state dict is that of the stage, so that a checkpoint of the model is complete. Loading other weights raises
    CheckpointError: the cached outputs are not theirs. The stage itself is built when an image log first calls it.
    """

    def __init__(self, file: PathText | Path) -> None:
        super().__init__()
        self.file = Path(file)
        self._built: list[nn.Module] = []  # in a list: not a part of this module

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The state dict of the stage, memory-mapped."""
        tensors = read_tensors(self.file)
        return {name.removeprefix(_STAGE): tensor for name, tensor in tensors.items() if name.startswith(_STAGE)}

    def stage(self, device: torch.device) -> Any:
        """Return the stage on a device, built at the first call."""
        if not self._built:
            with weights_on_meta():
                stage = instantiate_from_config(json.loads(read_metadata(self.file)["config"]))
            load_weights(stage, self.file, weights=self.weights)
            self._built.append(freeze(stage))
        return self._built[0].to(device)

    def check(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Raise CheckpointError if these weights of the stage, of a file `where`, differ from the cache's."""
        for name, tensor in weights.items():
            own = self.weights.get(name)
            if own is not None and (own.shape != tensor.shape or not torch.equal(own.to(tensor), tensor)):
                raise CheckpointError(
                    f"{self.file.parent}: the cache was made with another {self.file.stem}, {name} differs from that "
                    f"of {where}: make a new cache with scripts/cache_latents.py, or use the weights of the cache"
                )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({f"{prefix}{name}": tensor for name, tensor in self.weights.items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        given = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
        self.check(given, "the checkpoint")


class CachedFirstStage(CachedStage):
    """First stage of a model whose latents are in the batch."""

    def encode(self, x: Tensor) -> Any:
        return self.stage(x.device).encode(x)

    def decode(self, z: Tensor, **options: Any) -> Tensor:
        return self.stage(z.device).decode(z, **options)


class CachedEncoder(CachedStage, AbstractEncoder):
    """Text encoder of a model whose embeddings are in the batch; the cache has that of the empty text."""

    def __init__(self, file: PathText | Path) -> None:
        super().__init__(file)
        self.register_buffer("null", read_tensors(self.file)[_NULL].float())  # (1, L, D)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Encode B texts -> (B, L, D)."""
        texts, null = [text] if isinstance(text, str) else list(text), self.get_buffer("null")
        if not any(texts):
            return null.expand(len(texts), *null.shape[1:])
        return encode_texts(self.stage(null.device), texts)

    def unconditional_input(self, batch_size: int) -> list[str]:
        return [""] * batch_size


def encode_texts(stage: Any, texts: Sequence[str]) -> Tensor:
    """Encode texts as LatentDiffusion does -> (B, L, D)."""
    return stage.encode(texts) if callable(getattr(stage, "encode", None)) else stage(texts)


def write_stage(file: Path, stage: nn.Module, config: Mapping[str, Any], null: Tensor | None = None) -> str:
    """Write the file of a stage and return the fingerprint of its weights.

    config: its target and params. null: the encoded empty text (1, L, D).
    """
    weights = {f"{_STAGE}{name}": tensor for name, tensor in stage.state_dict().items()}
    found = fingerprint_of(weights)
    weights |= {} if null is None else {_NULL: null}
    write_weights(weights, file, {"config": json.dumps(config), "fingerprint": found})
    return found


def fingerprint_of(weights: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits that change with the name, shape or value of any weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
