"""Base classes of the condition encoders, and the loading of pretrained weights."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn

from ldm.checkpoint import CheckpointError, read_weights
from ldm.modules.adapters.token_embeddings import TokenEmbeddings
from ldm.modules.encoders.tokenizers import VOCAB_SIZE, clip_tokenizer

logger = logging.getLogger(__name__)


class AbstractEncoder(nn.Module):
    """Encoder of a condition; LatentDiffusion calls `encode`."""

    def encode(self, inputs: Any) -> Tensor:
        """Encode a batch of inputs -> (B, L, D), or (B, C, h, w) for a spatial condition."""
        return self(inputs)

    def unconditional_input(self, batch_size: int) -> Any:
        """Return inputs that mean "unconditional", for condition dropout and guidance."""
        raise ValueError(
            f"{type(self).__name__} has no unconditional input: set cond_dropout to 0 and sample with guidance scale 1"
        )

    def warn_of_long_texts(self, texts: Iterable[str]) -> None:
        """Log one warning for those of `texts` that the encoder truncates; encoders of other inputs do nothing."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @device.setter
    def device(self, device: Any) -> None:
        """Do nothing: research code sets this attribute. Move the module with `.to`."""

    def _start_on(self, device: str | None) -> None:
        """Move a new encoder to the `device` of its config, unless it was built on meta."""
        if device is not None and self.device.type != "meta":
            self.to(device)


class CLIPTokensEncoder(AbstractEncoder):
    """Text encoder with CLIP's tokens and one vector per token, as prompt weighting and long prompts need."""

    max_length: int  # tokens, begin and end included
    pad_id: int | None = None  # token id of the padding; None is the end token

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.token_embeddings = TokenEmbeddings()

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """text: B texts, or their token ids -> (B, max_length, D)."""
        return self.encode_tokens(text if isinstance(text, Tensor) else self.tokenize(text))

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Return the token ids of B texts, (B, max_length) int64, those of added tokens included."""
        return clip_tokenizer()(texts, self.max_length, self.pad_id, self.token_embeddings.ids)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64, begin, text, end and padding -> (B, L, D)."""
        raise NotImplementedError

    def token_table(self) -> nn.Module:
        """Return the table of the tokens' embeddings: (...) int64 -> (..., width), with a `weight` (rows, width)."""
        raise NotImplementedError

    @property
    def token_width(self) -> int:
        """Width of the embeddings of tokens."""
        return self.token_table().get_parameter("weight").shape[1]

    def add_token(self, names: Sequence[str], vectors: Tensor) -> None:
        """Add a token of N vectors (N, width) that prompts call by `names`. Raises ValueError if it does not fit."""
        table, room = self.token_table(), self.max_length - 2
        if vectors.shape[1] != self.token_width:
            raise ValueError(
                f"token {names[0]!r}: its vectors have width {vectors.shape[1]}, those of the text encoder "
                f"{self.token_width}; it was made for another model"
            )
        if len(vectors) > room:
            raise ValueError(f"token {names[0]!r}: {len(vectors)} vectors, but a prompt has room for {room} tokens")
        self.token_embeddings.add(names, vectors.to(table.get_parameter("weight")).contiguous())
        self.token_embeddings.attach(table)

    def has_added_tokens(self, texts: Sequence[str]) -> bool:
        """Return whether a text has an added token within the encoder's length."""
        return bool((self.tokenize(texts) >= VOCAB_SIZE).any())

    @torch.no_grad()
    def embed_words(self, text: str) -> Tensor:
        """Return the embeddings of a text's tokens from the table, (M, width). Raises ValueError for an empty text."""
        ids = clip_tokenizer().encode(text)
        if not ids:
            raise ValueError(f"init {text!r}: expected one or several words")
        return self.token_table()(torch.tensor(ids, device=self.device))

    def warn_of_long_texts(self, texts: Iterable[str]) -> None:
        self.tokenize(list(dict.fromkeys(texts)))

    def unconditional_input(self, batch_size: int) -> list[str]:
        return [""] * batch_size


class PretrainedEncoder(AbstractEncoder):
    """Encoder with weights from the checkpoint, else from `load_pretrained`."""

    finds_own_weights = True  # a checkpoint may omit them

    def __init__(self) -> None:
        super().__init__()
        self.has_weights, self.frozen = False, False
        self.register_load_state_dict_pre_hook(_note_weights)

    def load_pretrained(self) -> None:
        """Load the weights from a local path, or from the hub or its cache. Raises CheckpointError."""
        raise NotImplementedError

    def ensure_weights(self) -> None:
        """Load the pretrained weights unless a checkpoint held them. Call it before the first use."""
        if not self.has_weights:
            self.load_pretrained()

    def freeze(self) -> None:
        """Disable gradients, and stay in evaluation mode whatever the mode of the parent."""
        self.requires_grad_(False)
        self.frozen = True
        self.eval()

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        return super().train(mode and not self.frozen)

    def _load(self, module: nn.Module, path: Path, rename_key: Callable[[str], str]) -> None:
        """Load every parameter of `module` from a file; `rename_key` maps the file's keys to the module's.

        Keeps the module's dtype. Raises CheckpointError, before loading, for a missing parameter or another shape.
        """
        found = {rename_key(key): tensor for key, tensor in read_weights(path).items()}
        wanted = dict(module.named_parameters())
        missing = [name for name, tensor in wanted.items() if name not in found or found[name].shape != tensor.shape]
        if missing:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(wanted)} weights of the encoder are missing or differ in shape: "
                f"{missing[0]}"
            )
        state = {name: found[name].to(tensor.dtype) for name, tensor in wanted.items()}
        module.load_state_dict(state, strict=False, assign=any(tensor.is_meta for tensor in wanted.values()))
        self.has_weights = True
        logger.info("%s: loaded the weights of %s", type(self).__name__, path)


def _note_weights(module: PretrainedEncoder, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    module.has_weights |= any(key.startswith(prefix) and key.endswith(".weight") for key in state)


def file_in_folder(folder: Path, files: Sequence[str]) -> Path:
    """Return the path of the first of `files` in the folder. Raises CheckpointError if all are missing."""
    for name in files:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: contains none of {', '.join(files)}")


def file_from_hub(repository: str, file: str, advice: str) -> Path:
    """Return the path of a file of the Hugging Face hub, downloaded if not cached.

    Raises CheckpointError, which ends in `advice`.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # many types: no network, no such repository, a broken cache
        raise CheckpointError(
            f"the weights of {repository} are not in the checkpoint or the hub cache, and the download failed "
            f"({type(error).__name__}); {advice}"
        ) from error
