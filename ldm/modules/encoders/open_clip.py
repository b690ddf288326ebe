"""Encoders on open_clip's CLIP: the text tower as in Stable Diffusion v2 (Cherti et al. 2022, arXiv 2212.07143), and
the joint space of texts and images as in retrieval-augmented models (Radford et al. 2021, arXiv 2103.00020).

State-dict keys are open_clip's, which OpenAI's files share. Each embedder keeps only the tower that it uses.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import get_model_config, get_pretrained_cfg
from open_clip.model import CLIP
from torch import Tensor, nn

from ldm.checkpoint import CheckpointError
from ldm.config.text_shapes import OPEN_CLIP_ARCH, open_clip_shape
from ldm.config.types import PositiveInt
from ldm.modules.dtype import in_dtype, weights_dtype
from ldm.modules.encoders.base import CLIPTokensEncoder, PretrainedEncoder, file_from_hub, file_in_folder
from ldm.modules.encoders.tokenizers import clip_tokenizer

LAYERS = ("last", "penultimate")
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HUB = {("ViT-H-14", "laion2b_s32b_b79k"): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}  # (architecture, open_clip's tag)
# OpenAI's names -> open_clip's architectures; all were trained with QuickGELU.
VERSIONS = {"ViT-B/32": "ViT-B-32", "ViT-B/16": "ViT-B-16", "ViT-L/14": "ViT-L-14", "ViT-L/14@336px": "ViT-L-14-336"}
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images in [0, 1]; red, green, blue
STD = (0.26862954, 0.26130258, 0.27577711)
_PAD_ID = 0
_SMALL_VISION = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 8}  # of the tower that is deleted at once
_SMALL_TEXT = {"context_length": 2, "vocab_size": 2, "width": 64, "heads": 1, "layers": 1}
_TEXT_PARTS = ("transformer", "token_embedding", "ln_final", "positional_embedding", "text_projection")


def text_tower(shape: Mapping[str, Any], quick_gelu: bool = False) -> CLIP:
    """Build open_clip's CLIP without its vision tower. shape: embed_dim and text_cfg in one, as `open_clip_shape`."""
    text_cfg = {key: value for key, value in shape.items() if key != "embed_dim"}
    if text_cfg["width"] % text_cfg["heads"]:
        raise ValueError(f"text_config: width {text_cfg['width']} is not a multiple of heads {text_cfg['heads']}")
    model = CLIP(shape["embed_dim"], _SMALL_VISION, text_cfg, quick_gelu)
    del model.visual
    model.register_load_state_dict_pre_hook(_make_mask)
    return model


def _make_mask(model: CLIP, *_: Any) -> None:
    """Make the causal mask of a model built on meta; no file holds it."""
    if model.attn_mask.is_meta:
        model.attn_mask = torch.full(model.attn_mask.shape, float("-inf"), device="cpu").triu_(1)


def hidden_states(model: CLIP, tokens: Tensor, skip_last: int = 0) -> Tensor:
    """Return the output of the last layer, or of one `skip_last` earlier, after the final LayerNorm.

    tokens: (B, L) int64 -> (B, L, D). open_clip's own `encode_text` pools this to one vector.
    """
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]  # (B, L, D)
    layer = len(model.transformer.resblocks) - 1 - skip_last
    mask = model.attn_mask[:length, :length]
    _, (x,) = model.transformer.forward_intermediates(x, attn_mask=mask, indices=[layer], stop_early=True)
    return model.ln_final(x)


class FrozenOpenCLIPEmbedder(CLIPTokensEncoder, PretrainedEncoder):
    """OpenCLIP's text encoder as in Stable Diffusion v2: 77 tokens padded with 0, the last or the penultimate layer.

    Building it needs no network. If the checkpoint does not hold its weights, `ensure_weights` loads them from
    `version`, a local file or folder or open_clip's tag of weights on the hub.
    """

    pad_id = _PAD_ID

    def __init__(
        self,
        arch: str = OPEN_CLIP_ARCH,
        version: str = "laion2b_s32b_b79k",
        device: str | None = None,
        max_length: PositiveInt = 77,
        freeze: bool = True,
        layer: str = "last",
        text_config: Mapping[str, int] | None = None,
    ) -> None:
        """layer: "last", or "penultimate" as in Stable Diffusion v2.

        text_config: overrides of the shape (width, heads, ...), for tiny models whose weights a checkpoint must hold.
        """
        super().__init__()
        if layer not in LAYERS:
            raise ValueError(f"layer {layer!r}: choose one of {', '.join(LAYERS)}")
        shape = open_clip_shape(arch, text_config)
        if not 2 <= max_length <= shape["context_length"]:
            raise ValueError(f"max_length {max_length}: choose 2 to {shape['context_length']}, the positions of {arch}")
        self.arch, self.version, self.max_length, self.layer = arch, version, max_length, layer
        self.skip_last = LAYERS.index(layer)
        self.finds_own_weights = not text_config
        self.model = text_tower(shape)
        for parameter in self.unused_parameters():  # in the published files; DDP would wait for their gradients
            parameter.requires_grad_(False)
        if freeze:
            self.freeze()
        self._start_on(device)

    def token_table(self) -> nn.Module:
        return self.model.token_embedding

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return hidden_states(self.model, tokens.to(self.device), self.skip_last)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that the output does not depend on."""
        blocks = self.model.transformer.resblocks
        skipped = blocks[len(blocks) - self.skip_last :]
        return [self.model.text_projection, self.model.logit_scale, *skipped.parameters()]

    def ensure_weights(self) -> None:
        """As the base class; unused parameters that the file omits, as diffusers folders do, become zeros."""
        super().ensure_weights()
        zeros = {
            name: torch.zeros(parameter.shape, dtype=parameter.dtype)
            for name, parameter in self.model.named_parameters()
            if parameter.is_meta and any(parameter is unused for unused in self.unused_parameters())
        }
        self.model.load_state_dict(zeros, strict=False, assign=True)

    def load_pretrained(self) -> None:
        self._load(self.model, self._find_weights(), _published_name)

    def _find_weights(self) -> Path:
        path = Path(self.version)
        if path.is_file():
            return path
        if path.is_dir():
            return file_in_folder(path, FILES)
        if (self.arch, self.version) not in HUB:
            tags = ", ".join(tag for arch, tag in HUB if arch == self.arch)
            raise CheckpointError(
                f"version {self.version!r}: not a file or folder, nor one of open_clip's tags of {self.arch}: {tags}"
            )
        advice = "use a checkpoint that holds them, or set cond_stage_config.params.version to a local file"
        return file_from_hub(HUB[self.arch, self.version], FILES[0], advice)


def _published_name(key: str) -> str:
    """Return a key of a CLIP file without the `model.` of a checkpoint."""
    return key.removeprefix("model.")


class _JointEmbedder(PretrainedEncoder):
    """A frozen tower of OpenAI's CLIP.

    version: one of VERSIONS. weights: local file of pretrained weights; None loads those of the hub. clip_config: other
    shape (embed_dim, text_cfg, vision_cfg), for tiny models.
    """

    model: CLIP

    def __init__(self, version: str, weights: str | Path | None, clip_config: Mapping[str, Any] | None) -> None:
        super().__init__()
        if version not in VERSIONS:
            raise ValueError(f"CLIP version {version!r}: choose one of {', '.join(VERSIONS)}")
        self.version, self.weights = version, weights
        self.finds_own_weights = clip_config is None or weights is not None
        self.config = dict(clip_config if clip_config is not None else get_model_config(VERSIONS[version]))
        self.width = int(self.config["embed_dim"])

    def load_pretrained(self) -> None:
        if self.weights is not None:
            path = Path(self.weights)
        else:
            advice = f"download {FILES[0]} and pass its path as `weights` (--clip_weights of the scripts)"
            repository = get_pretrained_cfg(VERSIONS[self.version], "openai")["hf_hub"].rstrip("/")
            path = file_from_hub(repository, FILES[0], advice)
        self._load(self.model, path, _published_name)


class FrozenCLIPTextEmbedder(_JointEmbedder):
    """A text as one vector of CLIP's joint space, repeated `n_repeat` times; context of retrieval-augmented models."""

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: str | None = None,
        max_length: PositiveInt = 77,
        n_repeat: PositiveInt = 1,
        normalize: bool = True,
        weights: str | Path | None = None,
        clip_config: Mapping[str, Any] | None = None,
    ) -> None:
        """normalize: scale to length 1. version, weights, clip_config: see _JointEmbedder."""
        super().__init__(version, weights, clip_config)
        self.model = text_tower({"embed_dim": self.width, **self.config["text_cfg"]}, quick_gelu=True)
        if max_length != self.model.context_length:
            raise ValueError(
                f"max_length {max_length}: CLIP {version} encodes exactly {self.model.context_length} tokens"
            )
        self.max_length, self.n_repeat, self.normalize = max_length, n_repeat, normalize
        self.freeze()
        self._start_on(device)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """text: B texts -> (B, D)."""
        # Padded with 0, because open_clip returns the vector at the largest id, the end token.
        tokens = clip_tokenizer()(text, self.max_length, _PAD_ID).to(self.device)
        return self.model.encode_text(tokens, normalize=self.normalize)

    def warn_of_long_texts(self, texts: Iterable[str]) -> None:
        clip_tokenizer()(list(dict.fromkeys(texts)), self.max_length, _PAD_ID)

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """text: B texts -> (B, n_repeat, D)."""
        return self(text)[:, None].repeat(1, self.n_repeat, 1)

    def unconditional_input(self, batch_size: int) -> list[str]:
        return [""] * batch_size


class FrozenClipImageEmbedder(_JointEmbedder):
    """An image as one vector of CLIP's joint space."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str = "ViT-L/14",
        jit: bool = False,
        device: str | None = None,
        antialias: bool = False,
        normalize: bool = False,
        weights: str | Path | None = None,
        clip_config: Mapping[str, Any] | None = None,
    ) -> None:
        """model: one of VERSIONS. antialias: smooth before downscaling. normalize: scale to length 1."""
        if jit:
            raise ValueError(
                "jit: OpenAI's TorchScript files run code from the file and are not supported; set jit false"
            )
        super().__init__(model, weights, clip_config)
        self.model = CLIP(self.width, dict(self.config["vision_cfg"]), _SMALL_TEXT, quick_gelu=True)
        for name in _TEXT_PARTS:
            delattr(self.model, name)
        self.antialias, self.normalize = antialias, normalize
        self.size = int(self.model.visual.image_size[0])
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values, device="cpu")[:, None, None], persistent=False)
        self.freeze()
        self._start_on(device)

    def preprocess(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, 3, size, size), normalized as in CLIP's training."""
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", align_corners=True, antialias=self.antialias)
        return ((x + 1.0) / 2.0 - self.mean.to(x)) / self.std.to(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [-1, 1] -> (B, D)."""

        def encode(x: Tensor) -> Tensor:
            return self.model.encode_image(x, normalize=self.normalize)

        return in_dtype(weights_dtype(self), encode, self.preprocess(x))

    def encode(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [-1, 1] -> (B, 1, D)."""
        return self(x)[:, None]

    def unconditional_input(self, batch_size: int) -> Tensor:
        """Return gray images."""
        return torch.zeros(batch_size, 3, self.size, self.size, device=self.device)
