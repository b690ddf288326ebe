"""Exponential moving average of a model's parameters, under the names of the published checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ldm.config.types import Probability

CHUNK = 64  # parameters per fused call: enough for speed, and temporaries are far smaller than the model


class LitEma(nn.Module):
    """Averages s ("shadows") of the trainable parameters p: a call after each optimizer step sets s <- d s + (1 - d) p.

    d is min(decay, (1 + n) / (10 + n)) in call n, or `decay` if `use_num_upates` (published spelling) is false. The
    shadow of `input_blocks.0.0.weight` is the buffer `input_blocks00weight`. Shadows of 16-bit models are float32:
    steps of 1 - d = 1e-4 vanish in bfloat16.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: Probability = 0.9999, use_num_upates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay={decay}: must be between 0 and 1")
        self.m_name2s_name: dict[str, str] = {}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shadow_name = name.replace(".", "")
                if hasattr(self, shadow_name):
                    raise ValueError(f"parameter {name!r}: its EMA name without dots, {shadow_name!r}, is already used")
                self.m_name2s_name[name] = shadow_name
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self.register_buffer(shadow_name, parameter.detach().to(dtype, copy=True))
        self._stored: list[list[Tensor]] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LitEma:
        """Move to another device, but keep the dtype (see the class)."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor.is_meta or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        parameters = dict(model.named_parameters())
        missing = [name for name in self.m_name2s_name if name not in parameters]
        if missing:
            raise ValueError(
                f"EMA: the model has no parameter {missing[0]!r} ({len(missing)} missing): built from another model?"
            )
        shadows = dict(self.named_buffers())
        return [shadows[s] for s in self.m_name2s_name.values()], [parameters[m].detach() for m in self.m_name2s_name]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the averages one step towards the parameters of `model`, without synchronizing with the CPU."""
        self.num_updates += (self.num_updates >= 0).to(self.num_updates.dtype)
        n = self.num_updates.float()
        warm_up = torch.where(self.num_updates >= 0, (1.0 + n) / (10.0 + n), torch.ones_like(n))
        one_minus_decay = 1.0 - torch.minimum(self.decay, warm_up)
        shadows, parameters = self._pairs(model)
        for start in range(0, len(shadows), CHUNK):
            s = shadows[start : start + CHUNK]
            p = [tensor.to(shadow.dtype) for tensor, shadow in zip(parameters[start : start + CHUNK], s)]
            step = torch._foreach_sub(s, p)
            torch._foreach_mul_(step, one_minus_decay)
            torch._foreach_sub_(s, step)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` with the averages."""
        for shadow, parameter in zip(*self._pairs(model)):
            parameter.copy_(shadow)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Save copies of the parameters for `restore`; calls nest."""
        self._stored.append([parameter.detach().clone() for parameter in parameters])

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restore the parameters of the last `store`, and forget them. Raises RuntimeError without a `store`."""
        if not self._stored:
            raise RuntimeError("EMA: restore() without a store() before it")
        for stored, parameter in zip(self._stored.pop(), parameters, strict=True):
            parameter.copy_(stored)
