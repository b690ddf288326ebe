"""Parts of the published modules that nothing here needs, for research code that imports them; see ldm.published."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.instantiate import instantiate_from_config
from ldm.modules.attention import CrossAttention, SpatialSelfAttention
from ldm.modules.diffusionmodules.openaimodel import qkv_attention
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.base import AbstractEncoder

XFORMERS_IS_AVAILBLE = False  # not needed: all attention here is memory-efficient
MemoryEfficientCrossAttention = CrossAttention
MemoryEfficientAttnBlock = SpatialSelfAttention
AbstractDistribution = DiagonalGaussianDistribution
AbstractEncModel = AbstractEncoder
SiLU = nn.SiLU
nonlinearity = F.silu


class QKVAttentionLegacy(nn.Module):
    """Self-attention of qkv (B, 3C, N) in the channel order (head, qkv, c) -> (B, C, N)."""

    by_head = True

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        return qkv_attention(qkv, self.n_heads, self.by_head)


class QKVAttention(QKVAttentionLegacy):
    """The same in the channel order (qkv, head, c)."""

    by_head = False


class DiracDistribution:
    """A distribution with one value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def sample(self) -> Any:
        return self.value

    def mode(self) -> Any:
        return self.value


class IdentityEncoder(AbstractEncoder):
    """An encoder that returns its input."""

    def forward(self, x: Any) -> Any:
        return x


class HybridConditioner(nn.Module):
    """Two encoders: (concat, crossattn) -> {"c_concat": [...], "c_crossattn": [...]}."""

    def __init__(self, c_concat_config: Mapping[str, Any], c_crossattn_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.concat_conditioner: nn.Module = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner: nn.Module = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list[Tensor]]:
        return {
            "c_concat": [self.concat_conditioner(c_concat)],
            "c_crossattn": [self.crossattn_conditioner(c_crossattn)],
        }


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Return the betas (T,) of a function of time in [0, 1] that is the product of (1 - beta) until then."""
    levels = np.array([alpha_bar(t) for t in np.linspace(0.0, 1.0, num_diffusion_timesteps + 1)])
    return np.minimum(1.0 - levels[1:] / levels[:-1], max_beta)


def max_neg_value(t: Tensor) -> float:
    """Return the lowest value of a tensor's dtype."""
    return -torch.finfo(t.dtype).max


def uniq(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values in their first order."""
    return list(dict.fromkeys(values))
