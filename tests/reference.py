"""Seeded weights and inputs, and the relative error for comparisons with reference outputs."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4  # maximum relative error in float32


def randn(seed: int, *shape: int) -> Tensor:
    """Return standard normal numbers that depend on `seed` and `shape` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seed_weights(module: nn.Module) -> nn.Module:
    """Fill every parameter from a generator seeded by the CRC-32 of its name, whatever the order of initialisation."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            r = randn(zlib.crc32(name.encode()), *parameter.shape)
            if parameter.ndim >= 2:
                parameter.copy_(r / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * r)
            else:
                parameter.copy_(0.1 * r)
    return module.eval()


def make(spec: dict) -> object:
    """Return the input {"shape", "seed"[, "kind": "normal"|"int"|"const", "low", "high", "scale", "value"]}."""
    kind = spec.get("kind", "normal")
    if kind == "const":
        return torch.tensor(spec["value"]) if isinstance(spec["value"], list) else spec["value"]
    if kind == "int":
        return torch.randint(
            spec["low"], spec["high"], spec["shape"], generator=torch.Generator().manual_seed(spec["seed"])
        )
    return randn(spec["seed"], *spec["shape"]) * spec.get("scale", 1.0)


def rel_error(out: object, ref: object) -> float:
    """Return |out - ref| / |ref| (Frobenius norm); infinite if `out` is not finite or has another size."""
    out = np.asarray(out.detach().cpu() if torch.is_tensor(out) else out, dtype=np.float64).ravel()
    ref = np.asarray(ref, dtype=np.float64).ravel()
    if out.size != ref.size or not np.isfinite(out).all():
        return float("inf")
    return float(np.linalg.norm(out - ref) / max(np.linalg.norm(ref), 1e-12))


def transformers_model(embedder: Any, copied: bool = True) -> Any:
    """Return transformers' CLIPTextModel in the shape of a FrozenCLIPEmbedder, and with its weights if `copied`."""
    import transformers

    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**vars(embedder.transformer.config))).eval()
    weights = embedder.transformer.state_dict()
    del weights["text_model.embeddings.position_ids"]
    if not hasattr(theirs, "text_model"):  # its keys begin with text_model up to transformers 5.5
        weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
    if copied:
        theirs.load_state_dict(weights)
    return theirs
