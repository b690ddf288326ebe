"""Images of any size in bounded memory: overlapping tiles through first stage and network, blended without seams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.models.diffusion.conditioning import Conditioning, normalize_condition
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class Span(NamedTuple):
    """Position of a tile along one axis, in latent cells: [start, stop) of `length`."""

    start: int
    stop: int
    length: int

    def slice(self, scale: int, rest: bool = False) -> slice:
        """The tile at `scale` values per cell; with `rest` the last tile includes values beyond the last whole cell."""
        return slice(self.start * scale, None if rest and self.stop == self.length else self.stop * scale)


class Tile(NamedTuple):
    """Position of a tile. Called with x (B, C, H, W) of `scale` values per cell, it cuts the tile out."""

    rows: Span
    columns: Span

    def __call__(self, x: Tensor, scale: int = 1) -> Tensor:
        return x[..., self.rows.slice(scale, rest=True), self.columns.slice(scale, rest=True)]


@dataclass(frozen=True)
class Tiling:
    """Tiles of latents: (height, width) of a tile and the stride between tiles, in latent cells.

    Neighbors overlap by `size - stride` cells. The outer `margin` cells of the overlap, at each inner edge, only
    provide context and are discarded; between the margins one tile fades linearly into the next. A network with a
    receptive field of at most `margin` cells returns the same as without tiles. Default: a quarter of the overlap.
    """

    size: tuple[int, int] = (128, 128)
    stride: tuple[int, int] = (64, 64)
    margin: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "stride"):
            value = getattr(self, name)
            sides = (value, value) if isinstance(value, int) else tuple(int(side) for side in value)
            if len(sides) != 2:
                raise ValueError(f"{name} {value}: expected height and width in latent cells")
            object.__setattr__(self, name, sides)
        if any(not 1 <= step < side for side, step in zip(self.size, self.stride)):
            most = tuple(side - 1 for side in self.size)
            raise ValueError(f"stride {self.stride}: tiles of {self.size} cells must overlap; choose 1 to {most}")
        if not 0 <= 2 * self.margin_cells < self.overlap:
            raise ValueError(
                f"margin {self.margin}: with an overlap of {self.overlap} cells choose 0 to {(self.overlap - 1) // 2}"
            )

    @property
    def overlap(self) -> int:
        return min(side - step for side, step in zip(self.size, self.stride))

    @property
    def margin_cells(self) -> int:
        return self.overlap // 4 if self.margin is None else self.margin

    def spans(self, length: int, axis: int) -> Iterator[Span]:
        """The tiles along an axis (0 height, 1 width) of `length` cells; the last one ends where the axis ends."""
        side, step = min(self.size[axis], length), self.stride[axis]
        for start in [*range(0, length - side, step), length - side]:
            yield Span(start, start + side, length)

    def weight(self, span: Span, axis: int, scale: int = 1) -> Tensor:
        """Blending weights of a tile's values along an axis: 0 in inner margins, 1 outside the overlap, else linear."""
        ramp = (self.size[axis] - self.stride[axis] - 2 * self.margin_cells) * scale
        position = torch.arange((span.stop - span.start) * scale, dtype=torch.float32, device="cpu") + 0.5
        rising = ((position - self.margin_cells * scale) / ramp).clamp(0.0, 1.0)
        weight = torch.ones_like(rising)
        if span.start > 0:
            weight = torch.minimum(weight, rising)
        if span.stop < span.length:
            weight = torch.minimum(weight, rising.flip(0))
        return weight

    def apply(self, f: Callable[[Tile], Tensor], height: int, width: int, scale: int = 1) -> Tensor:
        """Blend `f` of every tile of `height` x `width` cells -> (B, C, height * scale, width * scale).

        f(tile): the tile's values (B, C, h * scale, w * scale). Each output value is the weighted mean of the tiles
        that cover it; where they agree it is exactly theirs.
        """
        out = total = torch.empty(0)
        for tile in (Tile(rows, columns) for rows in self.spans(height, 0) for columns in self.spans(width, 1)):
            values = f(tile)
            expected = tuple((span.stop - span.start) * scale for span in tile)
            if tuple(values.shape[-2:]) != expected:
                raise ValueError(f"a tile has {tuple(values.shape[-2:])} values, expected {expected}, {scale} per cell")
            if not total.numel():
                out = values.new_zeros(*values.shape[:-2], height * scale, width * scale)
                total = torch.zeros(height * scale, width * scale, device=values.device)
            place = (..., tile.rows.slice(scale), tile.columns.slice(scale))
            weight = self.weight(tile.rows, 0, scale)[:, None] * self.weight(tile.columns, 1, scale)
            weight = weight.to(values.device)
            total[place] += weight
            share = torch.where(weight > 0, weight / total[place], 0.0)
            out[place] = torch.lerp(out[place], values, share.to(values.dtype))  # running mean, no rounding of sums
        return out


class TiledModel:
    """A latent diffusion model whose first stage and network process one tile at a time; the rest is the model's own.

    It replaces the model: a sampler over it generates latents of any size, whatever the network was trained on. Memory
    grows with the tile, time with the number of tiles. Normalization and attention see one tile, so tiles should be
    about as large as the training images. Concat channels are cut with the latent. Tokens, vectors and labels are the
    same for every tile: right if they describe the whole image, wrong for a layout of boxes.

    factor: pixels per latent cell; None reads it from the first stage. multiple: the sides of tiles must be multiples
    of it; a latent smaller than a tile is padded.
    """

    def __init__(self, model: Any, tiling: Tiling, factor: int | None = None, multiple: int = 1) -> None:
        if any(side % multiple for side in tiling.size):
            raise ValueError(f"tiles of {tiling.size} cells: this network needs multiples of {multiple}")
        self.untiled, self.tiling, self.multiple = model, tiling, multiple
        encoder = getattr(getattr(model, "first_stage_model", None), "encoder", None)
        if factor is None:  # an encoder halves the image between its levels; without one, latents are the images
            factor = 1 if encoder is None else 2 ** (encoder.num_resolutions - 1)
        self.factor = factor

    def __getattr__(self, name: str) -> Any:
        if name == "untiled":  # copy and pickle ask before __init__ ran
            raise AttributeError(name)
        return getattr(self.untiled, name)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Encode images x (B, C, H, W) in [-1, 1] to a posterior with blended moments, or to blended latents."""
        posterior = False

        def encode(tile: Tile) -> Tensor:
            nonlocal posterior
            encoded = self.untiled.encode_first_stage(tile(x, self.factor))
            posterior = isinstance(encoded, DiagonalGaussianDistribution)
            if not posterior and not torch.is_tensor(encoded):
                raise TypeError(f"the first stage must return a posterior or a tensor, got {type(encoded).__name__}")
            return encoded.parameters if posterior else encoded

        height, width = (side // self.factor for side in x.shape[-2:])
        if not height or not width:
            size = f"{x.shape[-2]}x{x.shape[-1]}"
            raise ValueError(
                f"images of {size} pixels: smaller than one latent cell, {self.factor}x{self.factor} pixels"
            )
        blended = self.tiling.apply(encode, height, width)
        return DiagonalGaussianDistribution(blended) if posterior else blended

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, **options: Any) -> Tensor:
        """Decode scaled latents z (B, c, h, w) to images (B, C, h * factor, w * factor) in about [-1, 1]."""
        height, width = z.shape[-2:]
        decode = self.untiled.decode_first_stage
        return self.tiling.apply(lambda tile: decode(tile(z), **options), height, width, self.factor)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """Return the network output (B, C, h, w) at x_noisy (B, C, h, w) and t (B,), tile by tile."""
        wrapper = getattr(self.untiled, "model", None)
        if wrapper is not None:
            cond = normalize_condition(cond, wrapper.conditioning_key)
        parts = cond if isinstance(cond, Mapping) else {}
        channels = parts.get("c_concat") or ()
        for part in channels:
            if part.shape[-2:] != x_noisy.shape[-2:]:
                sizes = f"{tuple(part.shape[-2:])}, the latent {tuple(x_noisy.shape[-2:])}"
                raise ValueError(f"c_concat must match the latent's spatial size: it has {sizes}")

        def denoise(tile: Tile) -> Tensor:
            x = tile(x_noisy)
            own = {**parts, "c_concat": [self._padded(tile(part)) for part in channels]} if channels else cond
            return self.untiled.apply_model(self._padded(x), t, own)[..., : x.shape[-2], : x.shape[-1]]

        return self.tiling.apply(denoise, *x_noisy.shape[-2:])

    def _padded(self, x: Tensor) -> Tensor:
        """Repeat the last row and column of (B, C, h, w) up to `multiple`, for latents smaller than a tile."""
        height, width = (-side % self.multiple for side in x.shape[-2:])
        return pad(x, (0, width, 0, height), mode="replicate") if height or width else x
