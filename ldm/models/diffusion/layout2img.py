"""Latent diffusion conditioned on layouts of bounding boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.layout_tokens import LayoutTokens
from ldm.visualize import palette

LAYOUT_KEY = "coordinates_bbox"


class Layout2ImgDiffusion(LatentDiffusion):
    """Latent diffusion conditioned on layouts of bounding boxes, shown by the image log (`bbox_image`).

    Tokens are those of `ldm.modules.encoders.layout_tokens.LayoutTokens`. For the image log, their meaning comes from
    the dataset if it has `conditional_builders` and `get_textual_label_for_category_no`, else from `class_names`;
    without both, objects show the number of their token.
    """

    def __init__(
        self, *, cond_stage_key: str = LAYOUT_KEY, class_names: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if cond_stage_key != LAYOUT_KEY:
            raise ValueError(
                f"cond_stage_key {cond_stage_key!r}: Layout2ImgDiffusion requires {LAYOUT_KEY!r}; use LatentDiffusion"
            )
        super().__init__(cond_stage_key=cond_stage_key, **kwargs)
        self.class_names = None if class_names is None else list(class_names)

    def layout_reader(self) -> tuple[LayoutTokens, Callable[[int], str]]:
        """Return the decoder of this model's tokens, and the function from an object's class to its name."""
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        for dataset in (getattr(datamodule, "datasets", None) or {}).values():
            dataset = getattr(dataset, "data", dataset)  # `wrap: true` wraps the dataset
            builder = (getattr(dataset, "conditional_builders", None) or {}).get(LAYOUT_KEY)
            if builder is not None:
                return builder, getattr(dataset, "get_textual_label_for_category_no", str)
        stage = self.cond_stage_model
        max_objects = (stage.max_seq_len - 2) // 3
        if self.class_names is not None:
            layout = LayoutTokens(len(self.class_names), max_objects=max_objects, vocab_size=stage.vocab_size)
            return layout, self.class_names.__getitem__
        classes = stage.vocab_size - 1
        return LayoutTokens(classes, max_objects=max_objects, vocab_size=stage.vocab_size, group_flag=False), str

    def further_images(self, batch: Mapping[str, Any], inputs: Tensor, cond: Any) -> dict[str, Tensor]:
        layout, name = self.layout_reader()
        height, width = (max(side, 128) for side in inputs.shape[2:])
        rows = self.batch_value(batch, LAYOUT_KEY)[: len(inputs)].tolist()
        images = torch.stack([draw_layout(row, layout, (width, height), name) for row in rows])
        return {"bbox_image": images.to(inputs)}


def draw_layout(
    tokens: Sequence[int], layout: LayoutTokens, size: tuple[int, int], name: Callable[[int], str] = str
) -> Tensor:
    """Draw a layout's boxes with the names of their classes, (3, height, width) in [-1, 1]; size: (width, height)."""
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(max(9, size[0] // 25))
    colors = palette(layout.num_classes + 1)[1:]
    scale = np.array([size[0] - 1, size[1] - 1])
    for box in layout.decode(tokens).boxes:
        # Sampled layouts may have negative extents.
        corner, extent = np.array(box.region[:2]), np.array(box.region[2:]).clip(min=0.0)
        color = tuple(int(value) for value in colors[box.category])
        draw.rectangle((*(corner * scale), *((corner + extent) * scale)), outline=color, width=2)
        label = name(box.category) + (" (group)" if box.is_group else "")
        draw.text(tuple(corner * scale + 3), label.encode("ascii", "replace").decode(), fill=color, font=font)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1).contiguous()
