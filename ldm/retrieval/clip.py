"""CLIP vectors of images, which make a database, and of prompts, which are searched for in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.atomic import atomic_file
from ldm.data.image import RESAMPLING, crop_box, load_image, to_array
from ldm.data.listing import scan
from ldm.modules.encoders.open_clip import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.retrieval.database import unit
from ldm.retrieval.searcher import Searcher, check_knn

logger = logging.getLogger(__name__)


def clip_text_encoder(version: str, n_repeat: int = 1, weights: str | None = None) -> FrozenCLIPTextEmbedder:
    """CLIP's text half; `ensure_weights` loads its weights."""
    return FrozenCLIPTextEmbedder(version, n_repeat=n_repeat, weights=weights)


def clip_image_encoder(version: str, weights: str | None = None) -> FrozenClipImageEmbedder:
    """CLIP's image half; `ensure_weights` loads its weights."""
    return FrozenClipImageEmbedder(version, weights=weights)


class RetrievalCondition:
    """Prompts -> conditioning: the CLIP vector of the text, then those of its neighbors, all of length 1.

    searcher: None leaves the neighbors out. Used as `encode` of ldm.inference.text_to_image.
    """

    def __init__(
        self,
        clip: FrozenCLIPTextEmbedder,
        searcher: Searcher | None = None,
        knn: int = 10,
        negative_prompt: str = "",
        scale: float | None = 5.0,
    ) -> None:
        if searcher is not None:
            check_knn(knn, searcher.database)
            if searcher.database.dim != clip.width:
                raise ValueError(
                    f"{searcher.database.folder}: its vectors have {searcher.database.dim} values, those of CLIP "
                    f"{clip.version} {clip.width}; see --clip_type"
                )
        self.clip, self.searcher, self.knn = clip, searcher, knn
        self.negative_prompt, self.scale = negative_prompt, scale
        self._logged: set[str] = set()

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """B prompts -> (cond, uncond), each (B, n_repeat + knn, D).

        uncond is zeros as published, or the context of the negative prompt; None at scale 1.
        """
        context = self.context(prompts)
        if self.scale == 1.0:
            return context, None
        negative = [self.negative_prompt] * len(prompts)
        return context, self.context(negative) if self.negative_prompt else context.new_zeros(context.shape)

    def context(self, prompts: Sequence[str]) -> Tensor:
        text = self.clip.encode(list(prompts))  # (B, n_repeat, D)
        if not torch.isfinite(text).all():
            raise ValueError("CLIP's vectors are not finite: use undamaged --clip_weights")
        if self.searcher is None:
            return text
        found = self.searcher.search(text[:, 0].float().cpu().numpy(), self.knn)
        for prompt, ids, cosine in zip(prompts, found.ids, found.cosine, strict=True):
            if prompt not in self._logged:
                self._logged.add(prompt)
                names = ", ".join(str(name) for name in self.searcher.database.img_id(ids[:5]))
                more = ", ..." if len(ids) > 5 else ""
                logger.info("%r: neighbors %s%s, cosine %.3f to %.3f", prompt, names, more, cosine[0], cosine[-1])
        neighbors = torch.from_numpy(unit(found.embedding)).to(text)  # (B, knn, D)
        return torch.cat([text, neighbors], dim=1)


def embed_folder(images: str | Path, folder: str | Path, clip: FrozenClipImageEmbedder, batch_size: int = 32) -> Path:
    """Make a database of the images in a folder and its subfolders, one vector each -> the part that was written.

    CLIP sees the largest centered square, which is what `patch_coords` holds; `img_id` is the path within the folder.
    Raises ValueError if there are no images, or if a database exists already.
    """
    root, part = Path(images), Path(folder) / "part-000.npz"
    names = scan(root)
    if not names:
        raise ValueError(f"--images {root}: no images in it or its subfolders")
    if any(part.parent.glob("*.npz")):
        raise ValueError(f"--database {part.parent}: a database exists already; choose a new folder")
    vectors, places = [], []
    with tqdm(total=len(names), desc="embedding", unit="image") as bar, torch.no_grad():
        for start in range(0, len(names), batch_size):
            squares = []
            for name in names[start : start + batch_size]:
                image = load_image(root / name)
                box = crop_box(image.size, min(image.size))
                square = image.resize((clip.size, clip.size), RESAMPLING["bicubic"], box)
                squares.append(torch.from_numpy(to_array(square)).permute(2, 0, 1))
                places.append(np.divide(box, (*image.size, *image.size)))
            vectors.append(clip(torch.stack(squares).to(clip.device)).float().cpu().numpy())
            bar.update(len(squares))
    coords = np.array(places, dtype=np.float32)
    embedding = np.concatenate(vectors)
    if not np.isfinite(embedding).all():
        raise ValueError("CLIP's vectors are not finite: use undamaged --clip_weights")
    with atomic_file(part, embedding.nbytes) as new, new.open("wb") as file:
        np.savez(file, embedding=embedding, img_id=np.array(names), patch_coords=coords)
    return part
