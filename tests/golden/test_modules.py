"""Modules reproduce the published implementation's outputs for seeded weights and inputs (see README.md)."""

import importlib
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config
from tests.reference import GOLDEN, TOLERANCE, make, rel_error, seed_weights

CASES = json.loads((GOLDEN / "modules" / "cases.json").read_text())


def run(case: dict) -> object:
    args = [make(spec) for spec in case["args"]]
    kwargs = {name: make(spec) for name, spec in case.get("kwargs", {}).items()}
    if "function" in case:
        module, name = case["function"].rsplit(".", 1)
        return getattr(importlib.import_module(module), name)(*args, **kwargs)
    built = instantiate_from_config(OmegaConf.create({"target": case["target"], "params": case["params"]}))
    return getattr(seed_weights(built), case["method"])(*args, **kwargs)


def tensors(out: object) -> list[torch.Tensor]:
    """Return the tensors of an output in order; those of a posterior are its parameters."""
    if torch.is_tensor(out):
        return [out]
    if isinstance(out, (list, tuple)):
        return [tensor for part in out for tensor in tensors(part)]
    return [out.parameters] if torch.is_tensor(getattr(out, "parameters", None)) else []


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_output_is_the_published_one(name):
    outs = tensors(run(CASES[name]))
    with np.load(GOLDEN / "modules" / f"{name}.npz") as reference:
        errors = [rel_error(outs[i], reference[f"out{i}"]) for i in range(len(reference.files))]
        shapes = [tuple(out.shape) == reference[f"out{i}"].shape for i, out in enumerate(outs[: len(errors)])]
    assert errors and max(errors) < TOLERANCE and all(shapes), (errors, shapes)
