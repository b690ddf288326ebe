"""CLIP's joint space of texts and pictures (Radford et al. 2021, arXiv 2103.00020): one vector each, from open_clip's model.

Names are those of OpenAI's files (`model.transformer.resblocks...`, `model.visual...`), which open_clip shares. Each embedder keeps only
the half that it uses. Building needs no network; open_clip, which takes seconds to import, comes with the first one that is built.
"""

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules.dtype import in_dtype, weights_dtype
from ldm.modules.encoders.base import PretrainedEncoder
from ldm.modules.encoders.clip_tokenizer import clip_tokenizer
from ldm.modules.encoders.weights import fill, from_hub

logger = logging.getLogger(__name__)

# OpenAI's names -> open_clip's config; all of these were trained with QuickGELU.
VERSIONS = {"ViT-B/32": "ViT-B-32", "ViT-B/16": "ViT-B-16", "ViT-L/14": "ViT-L-14", "ViT-L/14@336px": "ViT-L-14-336"}
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the training pictures in [0, 1], red, green, blue
STD = (0.26862954, 0.26130258, 0.27577711)
_TEXT_PARTS = ("transformer", "token_embedding", "ln_final", "positional_embedding", "text_projection")
_HUB_FILE = "open_clip_model.safetensors"


class _FrozenCLIP(PretrainedEncoder):
    """A half of CLIP that is never trained and finds its pretrained weights where no checkpoint holds them."""

    def __init__(
        self, version: str, weights: str | None, clip_config: Mapping[str, Any] | None, drop: tuple[str, ...]
    ) -> None:
        super().__init__()
        if version not in VERSIONS:
            raise ValueError(f"CLIP version {version!r}: choose one of {', '.join(VERSIONS)}")
        from open_clip import get_model_config
        from open_clip.model import CLIP

        shape = deepcopy(clip_config) if clip_config is not None else get_model_config(VERSIONS[version])
        shape = {key: dict(value) if isinstance(value, Mapping) else value for key, value in shape.items()}
        if "visual" in drop:  # built small, since it is thrown away
            shape["vision_cfg"] = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 8}
        else:
            shape["text_cfg"] = {"context_length": 2, "vocab_size": 2, "width": 64, "heads": 1, "layers": 1}
        self.model = CLIP(**{**shape, "quick_gelu": True})
        for name in drop:
            delattr(self.model, name)
        self.version, self.weights, self.finds_own_weights = (
            version,
            weights,
            clip_config is None or weights is not None,
        )
        self.width = int(shape["embed_dim"])
        self.freeze()

    def load_pretrained(self) -> None:
        """Read the weights from the file `weights`, else from the hub (its cache first). CheckpointError, in one line, where that fails."""
        path = Path(self.weights) if self.weights is not None else self._hub_file()
        fill(self.model, path, "CLIP", lambda name: name.removeprefix("model."))
        self.has_weights = True
        logger.info("CLIP %s: weights of %s", self.version, path)

    def _hub_file(self) -> Path:
        from open_clip.pretrained import get_pretrained_cfg

        repository = get_pretrained_cfg(VERSIONS[self.version], "openai")["hf_hub"].rstrip("/")
        otherwise = f"fetch {_HUB_FILE} of {repository} and name it in `weights` (--clip_weights of the scripts)"
        return from_hub(repository, _HUB_FILE, f"the weights of CLIP {self.version}", otherwise)


class FrozenCLIPTextEmbedder(_FrozenCLIP):
    """A text as CLIP's vector in the space that it shares with pictures, `n_repeat` times; retrieval-augmented models attend to it.

    version: one of VERSIONS; weights: a local file with them, else the hub's. device: where to start. normalize: to length 1.
    clip_config: another shape (embed_dim, text_cfg), for tiny models.
    """

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: str | None = None,
        max_length: int = 77,
        n_repeat: int = 1,
        normalize: bool = True,
        weights: str | None = None,
        clip_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(version, weights, clip_config, drop=("visual",))
        positions = self.model.positional_embedding.shape[0]
        if max_length != positions:
            raise ValueError(f"max_length {max_length}: CLIP {version} reads exactly {positions} tokens")
        self.max_length, self.n_repeat, self.normalize = max_length, n_repeat, normalize
        if device is not None and self.device.type != "meta":
            self.to(device)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """text: B texts -> (B, D)."""
        tokens = clip_tokenizer()(text, self.max_length, pad_id=0).to(
            self.device
        )  # 0: the vector is read at the largest id, the end token
        if (
            self.model.attn_mask.is_meta
        ):  # not in the weights' file: it stays behind when these replace a model built on meta
            size = self.max_length
            self.model.attn_mask = torch.full((size, size), float("-inf"), device=self.device).triu_(1)
        return self.model.encode_text(tokens, normalize=self.normalize)

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """text: B texts -> (B, n_repeat, D)."""
        return self(text)[:, None].repeat(1, self.n_repeat, 1)

    def unconditional_input(self, batch_size: int) -> list[str]:
        return [""] * batch_size


class FrozenClipImageEmbedder(_FrozenCLIP):
    """A picture as CLIP's vector in the space that it shares with texts.

    model: one of VERSIONS; antialias: smooth before shrinking; normalize: to length 1; other parameters as in FrozenCLIPTextEmbedder.
    """

    def __init__(
        self,
        model: str = "ViT-L/14",
        jit: bool = False,
        device: str | None = None,
        antialias: bool = False,
        normalize: bool = False,
        weights: str | None = None,
        clip_config: Mapping[str, Any] | None = None,
    ) -> None:
        if jit:
            raise ValueError(
                "jit: OpenAI's compiled files are programs, not weights, and are never run; leave it false"
            )
        super().__init__(model, weights, clip_config, drop=_TEXT_PARTS)
        self.antialias, self.normalize = antialias, normalize
        self.size = int(self.model.visual.image_size[0])
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values, device="cpu")[:, None, None], persistent=False)
        if device is not None and self.device.type != "meta":
            self.to(device)

    def preprocess(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, 3, size, size) as CLIP was trained with."""
        size = (self.size, self.size)
        x = F.interpolate(x, size, mode="bicubic", align_corners=True, antialias=self.antialias)
        return ((x + 1.0) / 2.0 - self.mean.to(x)) / self.std.to(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [-1, 1] -> (B, D)."""
        return in_dtype(
            weights_dtype(self), lambda x: self.model.encode_image(x, normalize=self.normalize), self.preprocess(x)
        )

    def encode(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [-1, 1] -> (B, 1, D)."""
        return self(x)[:, None]

    def unconditional_input(self, batch_size: int) -> Tensor:
        """Grey pictures."""
        return torch.zeros(batch_size, 3, self.size, self.size, device=self.device)
