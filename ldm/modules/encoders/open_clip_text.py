"""OpenCLIP's text transformer (Cherti et al. 2022, arXiv 2212.07143) in the names of its files, as Stable Diffusion v2 uses it.

Written here rather than taken from open_clip, which takes seconds to import, builds the vision tower too and keeps a mask of attention that
no file holds.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import CheckpointError
from ldm.config.text_shapes import open_clip_shape
from ldm.modules.encoders.base import PretrainedEncoder
from ldm.modules.encoders.clip_tokenizer import clip_tokenizer
from ldm.modules.encoders.weights import fill, from_hub, in_folder

logger = logging.getLogger(__name__)

# open_clip's tags of pretrained weights -> where the hub has them.
HUB = {("ViT-H-14", "laion2b_s32b_b79k"): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PAD_ID = 0  # after the end token; Stable Diffusion v1 repeats the end token instead
LAYERS = ("last", "penultimate")


class FusedAttention(nn.Module):
    """Each token attends to itself and those before it; one projection makes queries, keys and values. (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3 D)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, D / heads)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class ResidualBlock(nn.Module):
    """Attention and MLP, each with a LayerNorm before it and a sum around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = FusedAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())  # exact, unlike OpenAI's models
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class OpenCLIPText(nn.Module):
    """The text tower. `text_projection` and `logit_scale` belong to the joint space: files hold them, and nothing here uses them."""

    def __init__(
        self, context_length: int, vocab_size: int, width: int, heads: int, layers: int, embed_dim: int
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"text_config: width {width} is no multiple of heads {heads}")
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim), requires_grad=False)
        self.logit_scale = nn.Parameter(torch.ones([]), requires_grad=False)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ResidualBlock(width, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, tokens: Tensor, skip_last: int = 0) -> Tensor:
        """tokens: (B, L) int64 -> the output of the last layer, or of one `skip_last` before it, after the final LayerNorm: (B, L, D)."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        blocks = self.transformer.resblocks
        for block in blocks[: len(blocks) - skip_last]:
            x = block(x)
        return self.ln_final(x)


class FrozenOpenCLIPEmbedder(PretrainedEncoder):
    """OpenCLIP's text encoder as in Stable Diffusion v2: 77 tokens padded with 0, the last or penultimate layer after the final LayerNorm.

    Building it needs no network. Its weights are those of the loaded checkpoint; where it holds none, `ensure_weights` takes them from
    `version` as a local file or folder, or from the hub.
    """

    pad_id = PAD_ID

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        text_config: Mapping[str, int] | None = None,
    ) -> None:
        """version: open_clip's name of the weights, or where they lie. device: where to start, as in published configs.

        freeze: never trained. layer: last, or penultimate as Stable Diffusion v2 was trained with. text_config: values that replace those
        of `arch` (width, heads, layers, ...), for tiny models; these have no pretrained weights, so a checkpoint must hold them.
        """
        super().__init__()
        if layer not in LAYERS:
            raise ValueError(f"layer {layer!r}: choose one of {', '.join(LAYERS)}")
        shape = open_clip_shape(arch, text_config)
        if not 2 <= max_length <= shape["context_length"]:
            raise ValueError(f"max_length {max_length}: from 2 to {shape['context_length']}, the positions of {arch}")
        self.arch, self.version, self.max_length, self.layer = arch, version, max_length, layer
        self.skip_last = LAYERS.index(layer)
        self.finds_own_weights = not text_config
        self.model = OpenCLIPText(**shape)
        self._skipped().requires_grad_(False)  # held by files and never used: DDP would wait for its gradient
        if freeze:
            self.freeze()
        if device is not None and self.device.type != "meta":
            self.to(device)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """text: B texts -> (B, max_length, D)."""
        return self.encode_tokens(clip_tokenizer()(text, self.max_length, pad_id=PAD_ID))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64, begin, text, end and padding -> (B, L, D)."""
        return self.model(tokens.to(self.device), self.skip_last)

    def unconditional_input(self, batch_size: int) -> list[str]:
        return [""] * batch_size

    def _skipped(self) -> nn.ModuleList:
        """The layers that the embedder's own layer comes before."""
        blocks = self.model.transformer.resblocks
        return blocks[len(blocks) - self.skip_last :]

    def ensure_weights(self) -> None:
        """As for every encoder. What is never used may be missing from a file, as from those made of diffusers folders: zeros will do."""
        super().ensure_weights()
        unused = [module for block in self._skipped() for module in block.modules()]
        places = [(module, name) for module in unused for name, _ in module.named_parameters(recurse=False)]
        for module, name in [*places, (self.model, "text_projection"), (self.model, "logit_scale")]:
            parameter = getattr(module, name)
            if parameter.is_meta:
                setattr(
                    module, name, nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype), requires_grad=False)
                )

    def load_pretrained(self) -> None:
        """Read the weights from `version`: a local file or folder, else the hub. CheckpointError, in one line, where that fails."""
        path = weights_file(self.arch, self.version)
        fill(self.model, path, "the text model", lambda name: name.removeprefix("model."))
        self.has_weights = True
        logger.info("text encoder: weights of %s", path)


def weights_file(arch: str, version: str) -> Path:
    """The file of pretrained weights: `version` as a file or folder, else from the hub (its cache first)."""
    place = Path(version)
    if place.is_file():
        return place
    if place.is_dir():
        return in_folder(place, FILES)
    if (arch, version) not in HUB:
        known = ", ".join(tag for of, tag in HUB if of == arch)
        raise CheckpointError(
            f"version {version!r}: neither a file or folder nor one of {known}, open_clip's weights of {arch}"
        )
    repository = HUB[arch, version]
    otherwise = "load a checkpoint that holds them, or give a local file: cond_stage_config.params.version"
    return from_hub(repository, FILES[0], f"the text encoder's weights of {repository}", otherwise)
