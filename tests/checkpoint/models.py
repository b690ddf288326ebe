"""A tiny model and weights for the tests of loading and writing."""

from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint import write_checkpoint
from ldm.checkpoint.formats import PARTS
from ldm.checkpoint.write import split_tensors
from tests.reference import randn

WEIGHTS = {
    "a.weight": randn(1, 4, 3),
    "a.bias": randn(2, 4),
    "half": randn(3, 5).half(),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 2),
}

SPLIT = {
    "state_dict": {"weight": randn(1, 5, 3), "scale": torch.tensor(0.5)},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(4.0), "exp_avg": randn(2, 5, 3)}}, "param_groups": []}],
    "global_step": 7,
    "callbacks": {"best": torch.tensor(1.0)},
}


class Stage(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, width), nn.Linear(width, 2)


class Model(nn.Module):
    """A diffusion model's children, tiny."""

    def __init__(self, ema: bool = False, width: int = 3, shared: bool = False) -> None:
        super().__init__()
        self.register_buffer("betas", torch.linspace(0.1, 0.2, 4))
        self.model = nn.ModuleDict({"diffusion_model": Stage(width)})
        self.first_stage_model = Stage()
        self.cond_stage_model = self.first_stage_model if shared else nn.Linear(3, 3)
        if ema:
            self.model_ema = nn.Module()
            self.model_ema.register_buffer("decay", torch.tensor(0.9))
            self.model_ema.register_buffer("num_updates", torch.tensor(3))
            for name, parameter in self.model.named_parameters():
                self.model_ema.register_buffer(name.replace(".", ""), parameter.detach() + 1)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


def save(path: Path, weights: dict, **extra: object) -> Path:
    torch.save({"state_dict": weights, **extra}, path)
    return path


def save_split(path: Path, ranks: int, checkpoint: dict = SPLIT, name: str = "a") -> Path:
    """Write a checkpoint as `ranks` ranks do; five rows on two of them are rows 0-2 and 3-4."""
    files = [f"{PARTS}/{name}/{rank}.ckpt" for rank in range(ranks)]
    for rank, file in enumerate(files):

        def own(tensor: torch.Tensor, rank: int = rank) -> torch.Tensor | None:
            if not tensor.ndim:
                return tensor if rank == 0 else None
            size = -(-len(tensor) // ranks)
            return tensor[rank * size : rank * size + size]

        part, index = split_tensors(checkpoint, own)
        write_checkpoint({"tensors": part}, path.parent / file)
    write_checkpoint({**index, PARTS: files}, path)
    return path
