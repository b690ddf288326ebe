"""BERT's uncased WordPiece tokenizer, from a vocab.txt that no package ships: a file, a folder that holds one, or the model hub."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.modules.encoders.truncation import CutTexts

_REPOSITORIES = (
    "google-bert/bert-base-uncased",
    "bert-base-uncased",
)  # the hub's present name, and the one in older caches


class BERTTokenizer:
    """Text -> ids of BERT's 30,522 tokens. The vocabulary is read at the first call, so that building a model needs no file."""

    def __init__(self, vocab_path: str | Path | None = None, max_length: int = 77) -> None:
        self.vocab_path, self.max_length = vocab_path, max_length
        self._tokenizer = None
        self._cut = CutTexts()

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """[CLS], the text, [SEP], padding with [PAD] (0) -> (B, max_length) int64. What does not fit is dropped with a warning."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self._tokenizer is None:
            self._tokenizer = self._load()
        encoded = self._tokenizer.encode_batch(texts)
        for text, one in zip(texts, encoded):
            if one.overflowing:
                self._cut.tell(text, self.max_length - 2, functools.partial(_dropped, text, one))
        return torch.tensor([one.ids for one in encoded], dtype=torch.int64)

    def _load(self) -> object:
        from tokenizers import BertWordPieceTokenizer

        tokenizer = BertWordPieceTokenizer(str(self._vocabulary()), lowercase=True)
        tokenizer.enable_truncation(self.max_length)
        tokenizer.enable_padding(length=self.max_length)
        return tokenizer

    def _vocabulary(self) -> Path:
        if self.vocab_path is not None:
            path = Path(self.vocab_path)
            path = path / "vocab.txt" if path.is_dir() else path
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: no such file; BERT's tokenizer needs the vocab.txt of bert-base-uncased"
                )
            return path
        from huggingface_hub import hf_hub_download

        reason: Exception | None = None
        for repository in _REPOSITORIES:
            try:
                return Path(hf_hub_download(repository, "vocab.txt"))
            except (
                Exception
            ) as error:  # the hub's client fails in many ways, and all of them mean that the file is not to be had
                reason = reason or error
        raise FileNotFoundError(
            f"BERT's tokenizer needs the vocab.txt of {_REPOSITORIES[0]}, which is neither in the hub's cache nor to be downloaded "
            f"({type(reason).__name__}); put it on this machine and name it in the config: cond_stage_config.params.tokenizer_path"
        ) from reason


def _dropped(text: str, encoded: Any) -> str:
    """The end of a text that is not in its encoding."""
    kept = max(
        (end for (_, end), special in zip(encoded.offsets, encoded.special_tokens_mask) if not special), default=0
    )
    return text[kept:].strip()
