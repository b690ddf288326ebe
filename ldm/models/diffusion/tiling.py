"""Pictures of any size in bounded memory: overlapping tiles through the first stage and the network, blended without seams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.models.diffusion.conditioning import Conditioning, normalize_condition
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

logger = logging.getLogger(__name__)

# Entries of the published `split_input_params` that shape its weights or switch its parts on; blending is our own here.
_WITHOUT_MEANING = (
    "clip_max_weight",
    "clip_min_weight",
    "clip_max_tie_weight",
    "clip_min_tie_weight",
    "tie_braker",
    "patch_distributed_vq",
)


class Span(NamedTuple):
    """Where a tile lies along one axis, in latent cells: [start, stop) of `length`."""

    start: int
    stop: int
    length: int


class Cut(NamedTuple):
    """Takes one tile out of a tensor."""

    rows: Span
    columns: Span

    def __call__(self, x: Tensor, scale: int = 1) -> Tensor:
        """The tile of x (B, C, H, W), `scale` values per cell; values beyond the last whole cell go with the last tile."""
        rows, columns = (slice(at.start * scale, None if at.stop == at.length else at.stop * scale) for at in self)
        return x[..., rows, columns]


@dataclass(frozen=True)
class Tiling:
    """How latents are cut: (height, width) of a tile and the steps between tiles, all in latent cells.

    Neighbors share `size - stride` cells. The outer `margin` of them, at each inner edge, only gives a tile its surroundings and is thrown
    away; between the margins one tile fades linearly into the next. A network whose output depends on no more than `margin` cells around
    gives what it gives for the whole picture. `margin` None is a quarter of what neighbors share.
    """

    size: tuple[int, int] = (128, 128)
    stride: tuple[int, int] = (64, 64)
    margin: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "stride"):
            value = getattr(self, name)
            object.__setattr__(
                self, name, (value, value) if isinstance(value, int) else tuple(int(side) for side in value)
            )
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} {value}: give height and width in latent cells")
        if any(not 1 <= step < side for side, step in zip(self.size, self.stride)):
            most = tuple(side - 1 for side in self.size)
            raise ValueError(f"stride {self.stride}: tiles of {self.size} cells have to overlap; choose 1 to {most}")
        shared = min(side - step for side, step in zip(self.size, self.stride))
        if self.margin is None:
            object.__setattr__(self, "margin", shared // 4)
        if not 0 <= 2 * self.margin < shared:
            raise ValueError(
                f"margin {self.margin}: neighbors share {shared} cells and fade between them; choose 0 to {(shared - 1) // 2}"
            )

    @classmethod
    def from_split_input_params(cls, params: Mapping[str, Any]) -> Tiling:
        """The tiles of a published `split_input_params`, whose `ks` and `stride` are in latent cells.

        Its `vqf`, pixels per cell, is the first stage's own; what shapes its weights has no meaning here, and a log line says so.
        """
        unknown = set(params) - {"ks", "stride", "vqf", *_WITHOUT_MEANING}
        if unknown or not {"ks", "stride"} <= set(params):
            wrong = f"unknown {', '.join(sorted(unknown))}" if unknown else "ks and stride are needed"
            raise ValueError(f"split_input_params: {wrong}; known are ks, stride, vqf, {', '.join(_WITHOUT_MEANING)}")
        without = sorted(set(params) & set(_WITHOUT_MEANING))
        if without:
            logger.info("split_input_params: tiles are blended linearly; without meaning: %s", ", ".join(without))
        return cls(tuple(params["ks"]), tuple(params["stride"]))

    def spans(self, length: int, axis: int) -> Iterator[Span]:
        """The tiles along an axis (0 height, 1 width) of `length` cells; the last is moved back to end where the axis ends."""
        side, step = min(self.size[axis], length), self.stride[axis]
        for start in [*range(0, length - side, step), length - side]:
            yield Span(start, start + side, length)

    def weight(self, span: Span, axis: int, scale: int = 1) -> Tensor:
        """How much each of a tile's `scale` values per cell counts along an axis: 0 in inner margins, 1 away from them, linear between."""
        ramp = (self.size[axis] - self.stride[axis] - 2 * self.margin) * scale
        at = (
            torch.arange((span.stop - span.start) * scale, dtype=torch.float32, device="cpu")
            + 0.5
            - self.margin * scale
        )
        rising = (at / ramp).clamp(0.0, 1.0)
        weight = torch.ones_like(rising)
        if span.start > 0:
            weight = torch.minimum(weight, rising)
        if span.stop < span.length:
            weight = torch.minimum(weight, rising.flip(0))
        return weight

    def apply(self, f: Callable[[Cut], Tensor], height: int, width: int, scale: int = 1) -> Tensor:
        """Blend `f` of every tile of `height` x `width` cells -> (B, C, height * scale, width * scale).

        f(cut): the tile's values (B, C, h * scale, w * scale).
        Every value is the mean, weighted by `weight`, of the tiles that cover it: where they agree it is theirs to the last bit.
        """
        out = total = None
        for rows in self.spans(height, 0):
            for columns in self.spans(width, 1):
                tile = f(Cut(rows, columns))
                expected = ((rows.stop - rows.start) * scale, (columns.stop - columns.start) * scale)
                if tuple(tile.shape[-2:]) != expected:
                    raise ValueError(
                        f"a tile came back with {tuple(tile.shape[-2:])} values, expected {expected}: {scale} a cell"
                    )
                if out is None:
                    out = tile.new_zeros(*tile.shape[:-2], height * scale, width * scale)
                    total = torch.zeros(height * scale, width * scale, device=tile.device)
                place = (
                    ...,
                    slice(rows.start * scale, rows.stop * scale),
                    slice(columns.start * scale, columns.stop * scale),
                )
                weight = (self.weight(rows, 0, scale)[:, None] * self.weight(columns, 1, scale)).to(tile.device)
                total[place] += weight
                share = torch.where(weight > 0, weight / total[place], 0.0)
                out[place] = torch.lerp(out[place], tile, share.to(tile.dtype))  # a running mean: no sum that rounds
        return out


class TiledModel:
    """A latent diffusion model whose first stage and network see one tile at a time; all else is the model's own.

    It stands wherever the model does: a sampler that is given one draws latents of any size, whatever the network was trained on. Memory
    grows with the tile, time with the number of tiles. Normalization and attention see a tile only, so that tiles should be about as
    large as the training pictures. Parts of a condition that are concatenated are cut with the latent; tokens, vectors and labels are
    the same for every tile, which is right for what describes the whole picture, and wrong for a layout of boxes.

    factor: pixels per latent cell; None reads it off the first stage. multiple: height and width that the network takes are multiples of
    it; tiles have to be, and a latent smaller than a tile is padded to the next one.
    """

    def __init__(self, model: Any, tiling: Tiling, factor: int | None = None, multiple: int = 1) -> None:
        if any(side % multiple for side in tiling.size):
            raise ValueError(f"tiles of {tiling.size} cells: this network needs multiples of {multiple}")
        self.model_in_tiles, self.tiling, self.multiple = model, tiling, multiple
        self.factor = _factor_of(getattr(model, "first_stage_model", None)) if factor is None else factor

    def __getattr__(self, name: str) -> Any:
        if name == "model_in_tiles":  # not there yet: copy and pickle ask before __init__ ran
            raise AttributeError(name)
        return getattr(self.model_in_tiles, name)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Pictures x (B, C, H, W) in [-1, 1] -> a posterior with blended moments, or blended latents, as the first stage gives them."""
        posterior = False

        def encode(cut: Cut) -> Tensor:
            nonlocal posterior
            encoded = self.model_in_tiles.encode_first_stage(cut(x, self.factor))
            posterior = isinstance(encoded, DiagonalGaussianDistribution)
            if not posterior and not torch.is_tensor(encoded):
                raise TypeError(f"a first stage gives a posterior or a tensor, got {type(encoded).__name__}")
            return encoded.parameters if posterior else encoded

        height, width = (side // self.factor for side in x.shape[-2:])
        if not height or not width:
            raise ValueError(
                f"pictures of {x.shape[-2]}x{x.shape[-1]} pixels: a latent cell has {self.factor}x{self.factor}"
            )
        blended = self.tiling.apply(encode, height, width)
        return DiagonalGaussianDistribution(blended) if posterior else blended

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, **options: Any) -> Tensor:
        """Scaled latents z (B, c, h, w) -> pictures (B, C, h * factor, w * factor) in about [-1, 1]; options as the model's own."""
        return self.tiling.apply(
            lambda cut: self.model_in_tiles.decode_first_stage(cut(z), **options), *z.shape[-2:], scale=self.factor
        )

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """Network output (B, C, h, w) at x_noisy (B, C, h, w) and t (B,), tile by tile."""
        wrapper = getattr(self.model_in_tiles, "model", None)
        if wrapper is not None:
            cond = normalize_condition(cond, wrapper.conditioning_key)
        beside = cond.get("c_concat") if isinstance(cond, Mapping) else None
        for part in beside or ():
            if part.shape[-2:] != x_noisy.shape[-2:]:
                sizes = f"{tuple(part.shape[-2:])} cells beside a latent of {tuple(x_noisy.shape[-2:])}"
                raise ValueError(f"c_concat has {sizes}: they must be alike")

        def denoise(cut: Cut) -> Tensor:
            tile = cut(x_noisy)
            own = {**cond, "c_concat": [self._padded(cut(part)) for part in beside]} if beside else cond
            return self.model_in_tiles.apply_model(self._padded(tile), t, own)[..., : tile.shape[-2], : tile.shape[-1]]

        return self.tiling.apply(denoise, *x_noisy.shape[-2:])

    def _padded(self, x: Tensor) -> Tensor:
        """(B, C, h, w) with its last row and column repeated up to a multiple; only what is smaller than a tile needs it."""
        height, width = (-side % self.multiple for side in x.shape[-2:])
        return pad(x, (0, width, 0, height), mode="replicate") if height or width else x


def _factor_of(first_stage: Any) -> int:
    """Pixels per latent cell: an encoder halves a picture between its levels; without one, latents are the pictures."""
    encoder = getattr(first_stage, "encoder", None)
    return 2 ** (encoder.num_resolutions - 1) if encoder is not None else 1
