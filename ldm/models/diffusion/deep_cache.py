"""DeepCache: the deep blocks of the UNet run in some calls only, the others reuse their output (arXiv 2312.00858)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ldm.modules.diffusionmodules.openaimodel import Context, UNetModel


@contextmanager
def deep_cache(unet: UNetModel, every: int, depth: int = 1) -> Iterator[None]:
    """Context in which `unet` runs its deep blocks in every `every`-th call alone; 1 is the full network.

    depth: number of blocks at either end that always run (the paper's branch of the skip connection, section 3.2).
    Consecutive calls must be the steps of one run: enter it once for each batch. Calls of the network's parts (under a
    ControlNet) are not changed. Raises ValueError for a compiled network.
    """
    if every == 1:
        yield
        return
    if unet._compiled_call_impl is not None:
        raise ValueError(
            "deep cache: not supported by a compiled network, whose outputs may share memory between calls"
        )
    vars(unet)["forward"] = _CachedForward(unet, every, depth)
    try:
        yield
    finally:
        del vars(unet)["forward"]


class _CachedForward:
    """`UNetModel.forward` with the features that the deep blocks gave in one of the last calls."""

    def __init__(self, unet: UNetModel, every: int, depth: int) -> None:
        self.unet, self.every, self.depth = unet, every, depth
        self.age, self.sizes = 0, tuple[Any, ...]()
        self.deep: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Context = None,
        y: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        unet, depth = self.unet, self.depth
        emb, context = unet.prepare(x, timesteps, context, y)
        skips = unet.encode(x, emb, context, slice(depth))
        contexts = [context] if context is None or isinstance(context, Tensor) else context
        sizes = x.shape, *(len(each) for each in contexts if each is not None)
        if self.deep is None or self.age == self.every or self.sizes != sizes:
            below = unet.encode(skips[-1], emb, context, slice(depth, None))
            self.deep = unet.decode(unet.middle(below[-1], emb, context), below, emb, context, slice(-depth))
            self.age, self.sizes = 0, sizes
        self.age += 1
        return unet.head(unet.decode(self.deep, skips, emb, context, slice(-depth, None))).to(x.dtype)
