"""Latent diffusion conditioned on layouts of bounding boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.models.diffusion.latent import LatentDiffusion
from ldm.modules.encoders.layout_tokens import LayoutTokens
from ldm.visualize import palette

LAYOUT_KEY = "coordinates_bbox"


class Layout2ImgDiffusion(LatentDiffusion):
    """Latent diffusion conditioned on layouts of bounding boxes, which its image log draws (`bbox_image`).

    The tokens are those of `ldm.modules.encoders.layout_tokens.LayoutTokens`. How they are read for a picture comes from the dataset where it says so
    (`conditional_builders`, `get_textual_label_for_category_no`), else from `class_names`, else objects show the number of their token.
    """

    def __init__(
        self, *args: Any, cond_stage_key: str = LAYOUT_KEY, class_names: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if cond_stage_key != LAYOUT_KEY:
            raise ValueError(
                f"cond_stage_key {cond_stage_key!r}: Layout2ImgDiffusion takes {LAYOUT_KEY!r}; for others use LatentDiffusion"
            )
        super().__init__(*args, cond_stage_key=cond_stage_key, **kwargs)
        self.class_names = None if class_names is None else list(class_names)

    def layout_reader(self) -> tuple[LayoutTokens, Callable[[int], str]]:
        """How this model's tokens are read, and the name of each object class."""
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        for dataset in (getattr(datamodule, "datasets", None) or {}).values():
            dataset = getattr(dataset, "data", dataset)  # out of the wrapper that `wrap: true` puts around it
            builder = (getattr(dataset, "conditional_builders", None) or {}).get(LAYOUT_KEY)
            if builder is not None:
                return builder, getattr(dataset, "get_textual_label_for_category_no", str)
        length, vocab_size = self.cond_stage_model.max_seq_len, self.cond_stage_model.vocab_size
        sizes = {"max_objects": (length - 2) // 3, "vocab_size": vocab_size}
        if self.class_names is not None:
            return LayoutTokens(len(self.class_names), **sizes), self.class_names.__getitem__
        return LayoutTokens(vocab_size - 1, group_flag=False, **sizes), str

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, **kwargs: Any) -> dict[str, Tensor]:
        log = super().log_images(batch, N, n_row, **kwargs)
        if kwargs.get("return_keys") is None:
            layout, name = self.layout_reader()
            height, width = (max(side, 128) for side in log["inputs"].shape[2:])
            rows = self.batch_value(batch, LAYOUT_KEY)[:N].tolist()
            log["bbox_image"] = torch.stack([draw_layout(row, layout, (width, height), name) for row in rows]).to(
                log["inputs"]
            )
        return log


def draw_layout(
    tokens: Sequence[int], layout: LayoutTokens, size: tuple[int, int], name: Callable[[int], str] = str
) -> Tensor:
    """A layout's boxes with the names of their classes, (3, height, width) in [-1, 1]; size: (width, height)."""
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(9, size[0] // 25))
    colors = palette(layout.num_classes + 1)[1:]
    scale = np.array([size[0] - 1, size[1] - 1])
    for box in layout.decode(tokens).boxes:
        corner, extent = (
            np.array(box.region[:2]),
            np.array(box.region[2:]).clip(min=0.0),
        )  # a sampled layout may be upside down
        color = tuple(int(value) for value in colors[box.category])
        draw.rectangle((*(corner * scale), *((corner + extent) * scale)), outline=color, width=2)
        label = name(box.category) + (" (group)" if box.is_group else "")
        draw.text(tuple(corner * scale + 3), label.encode("ascii", "replace").decode(), fill=color, font=font)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1).contiguous()
