"""Tokenizers of the text encoders: CLIP's byte pairs and BERT's WordPiece, both read on first use."""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib.util
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import ftfy
import huggingface_hub
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)

AddedTokens = Mapping[str, Sequence[int]]
"""Clean name of a token that the vocabulary does not have -> its ids, from VOCAB_SIZE on."""

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
VOCAB_SIZE = 49408
_MERGES = VOCAB_SIZE - 2 * 256 - 2  # vocabulary: 256 bytes, the same at a word's end, one token per merge, begin, end
# Words as CLIP splits texts: contractions, letters, single digits, other signs.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
_NONE: AddedTokens = MappingProxyType({})
_BERT_REPOSITORIES = ("google-bert/bert-base-uncased", "bert-base-uncased")  # the current name, and that of old caches


class TruncationWarnings:
    """Log one warning for the truncated texts of a batch, with their number and an example; each text counts once."""

    SHOWN = 500  # characters of the dropped text
    LIMIT = 10_000  # number of texts that are remembered; later ones are not reported

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._batch: list[tuple[int, str]] | None = None  # tokens that fit, dropped text (of the first only)

    @contextlib.contextmanager
    def batch(self, count: int) -> Iterator[None]:
        """Report the truncated texts among `count` together, also those of batches inside."""
        if self._batch is not None:
            yield
            return
        self._batch = []
        try:
            yield
        finally:
            found, self._batch = self._batch, None
        if found:
            kept, lost = found[0]
            texts = f"{len(found):,} of {count:,} texts" if count > 1 else "text"
            more = f"... and {len(lost) - self.SHOWN:,} more characters" if len(lost) > self.SHOWN else ""
            example = " from the first" if len(found) > 1 else ""
            logger.warning("%s truncated to %d tokens; dropped%s: %r%s", texts, kept, example, lost[: self.SHOWN], more)

    def add(self, text: str, kept: int, dropped: Callable[[], str]) -> None:
        """kept: number of tokens that fit. dropped: returns the cut end of the text."""
        if self._batch is None:
            with self.batch(1):
                self.add(text, kept, dropped)
        elif text not in self._seen and len(self._seen) < self.LIMIT:
            self._seen.add(text)
            self._batch.append((kept, "" if self._batch else dropped()))


class CLIPTokenizer:
    """CLIP's byte pairs with the vocabulary that open-clip-torch ships: begin 49406, end 49407, no download.

    Text is cleaned as in the training of Stable Diffusion v1, see `clean`.
    """

    def __init__(self) -> None:
        self.token_ids, self.merges = read_clip_vocabulary(find_clip_vocabulary())
        self.begin_id, self.end_id = self.token_ids[BEGIN], self.token_ids[END]
        self.truncation = TruncationWarnings()
        model = models.BPE(self.token_ids, self.merges, unk_token=END, end_of_word_suffix="</w>")
        self._pairs = tokenizers.Tokenizer(model)
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        self._pairs.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
        self._pairs.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self._pairs.decoder = decoders.ByteLevel()
        self._pairs.add_special_tokens([AddedToken(name, normalized=False) for name in (BEGIN, END)])

    @functools.cached_property
    def tokenizer(self) -> transformers.CLIPTokenizer:
        """transformers' tokenizer of the same vocabulary, for research code."""
        import transformers  # takes a second, and few programs need it

        # It annotates merges as strings, but its backend takes pairs.
        return transformers.CLIPTokenizer(vocab=self.token_ids, merges=self.merges)  # type: ignore[arg-type]

    def encode(self, text: str, added: AddedTokens = _NONE) -> list[int]:
        """Return the token ids of a text of any length; begin and end are not added, but recognized in the text."""
        pieces = _split(clean(text), added)
        return [i for piece in pieces for i in added.get(piece) or self._encode(piece)]

    def _encode(self, text: str) -> list[int]:
        return self._pairs.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], added: AddedTokens = _NONE) -> str:
        """Return the cleaned text of token ids, without begin and end."""
        names = {i: "" for name in added for i in added[name]} | {each[0]: name for name, each in added.items()}
        parts = []
        for new, group in itertools.groupby(ids, names.__contains__):
            tokens = list(group)
            parts += [names[i] for i in tokens if names[i]] if new else [self._decode(tokens)]
        return " ".join(parts)

    def _decode(self, ids: list[int]) -> str:
        return self._pairs.decode(ids, skip_special_tokens=True).replace("</w>", " ").strip()

    def __call__(
        self,
        texts: str | Sequence[str],
        max_length: int = 77,
        pad_id: int | None = None,
        added: AddedTokens = _NONE,
    ) -> Tensor:
        """Return begin, the text, end and padding, (B, max_length) int64. Longer texts are truncated with a warning.

        pad_id: by default the end token, as in Stable Diffusion v1; OpenCLIP's models use 0.
        added: tokens that only the encoder of these texts has.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if max_length < 2:
            raise ValueError(f"max_length {max_length}: must be at least 2, for the begin and end tokens")
        room, pad = max_length - 2, self.end_id if pad_id is None else pad_id
        rows = []
        with self.truncation.batch(len(texts)):
            for text in texts:
                if not isinstance(text, str):
                    raise TypeError(f"expected texts, got {type(text).__name__}: {text!r}")
                tokens = self.encode(text, added)
                if len(tokens) > room:
                    self.truncation.add(text, room, functools.partial(self.decode, tokens[room:], added))
                tokens = [self.begin_id, *tokens[:room], self.end_id]
                rows.append(tokens + [pad] * (max_length - len(tokens)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, max_length)


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """Return this process's tokenizer, built on first use."""
    return CLIPTokenizer()


def is_word(text: str) -> bool:
    """Return whether a text is one token of CLIP's vocabulary, at the end of a word."""
    return f"{clean(text)}</w>" in clip_tokenizer().token_ids


def clean(text: str) -> str:
    """Return the text with repaired Unicode and HTML entities, single spaces and lower case."""
    if not (text.isascii() and text.isprintable()) or "&" in text:  # ftfy leaves plain ASCII as it is
        text = ftfy.fix_text(text)
    return " ".join(text.split()).lower()


def _split(text: str, added: AddedTokens) -> list[str]:
    """Split a clean text at the names of added tokens, longer names first; inside a word there is no name."""
    if not added:
        return [text]
    names = (re.escape(name) for name in sorted(added, key=len, reverse=True))
    edges = ((r"\b" if re.match(r"\w", name) else "", name, r"\b" if re.search(r"\w$", name) else "") for name in names)
    return re.split(f"({'|'.join(map(''.join, edges))})", text)


def find_clip_vocabulary() -> Path:
    """Return the path of the merges inside open-clip-torch, without importing it (which takes seconds)."""
    package = importlib.util.find_spec("open_clip")
    path = Path(package.origin).with_name(_CLIP_FILE) if package and package.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"CLIP's tokenizer needs {_CLIP_FILE} of open-clip-torch: pip install open-clip-torch")
    return path


def read_clip_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (token -> id, merges in the order of training) from bpe_simple_vocab_16e6.txt.gz."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = itertools.islice(file, 1, 1 + _MERGES)  # the first line is a heading
        merges = [(parts[0], parts[1]) for line in lines if len(parts := line.split()) == 2]
    if len(merges) != _MERGES:
        raise ValueError(f"{path}: expected {_MERGES} lines of two symbols, CLIP's merges; got {len(merges)}")
    symbols = [*_byte_symbols()]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), BEGIN, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _byte_symbols() -> str:
    """Return a printable character for each byte, in the vocabulary's order: printable bytes, then 256, 257, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return "".join(map(chr, [*printable, *range(256, 512 - len(printable))]))


class BERTTokenizer:
    """BERT's uncased WordPiece over 30,522 tokens; the vocabulary is read at the first call.

    vocab_path: a vocab.txt or a folder with one; None: bert-base-uncased of the Hugging Face hub, its cache first.
    """

    def __init__(self, vocab_path: str | Path | None = None, max_length: int = 77) -> None:
        self.vocab_path, self.max_length = vocab_path, max_length
        self._tokenizer: tokenizers.BertWordPieceTokenizer | None = None
        self.truncation = TruncationWarnings()

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Return [CLS], text, [SEP] and padding, (B, max_length) int64. Longer texts are truncated with a warning."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self._tokenizer is None:
            self._tokenizer = tokenizers.BertWordPieceTokenizer(str(self._find_vocabulary()), lowercase=True)
            self._tokenizer.enable_truncation(self.max_length)
            self._tokenizer.enable_padding(length=self.max_length)
        encodings = self._tokenizer.encode_batch(texts)
        with self.truncation.batch(len(texts)):
            for text, encoding in zip(texts, encodings):
                if encoding.overflowing:
                    self.truncation.add(text, self.max_length - 2, functools.partial(_dropped, text, encoding))
        return torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)

    def _find_vocabulary(self) -> Path:
        if self.vocab_path is not None:
            path = Path(self.vocab_path)
            path = path / "vocab.txt" if path.is_dir() else path
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; expected the vocab.txt of bert-base-uncased")
            return path
        failure: Exception | None = None
        for repository in _BERT_REPOSITORIES:
            try:
                return Path(huggingface_hub.hf_hub_download(repository, "vocab.txt"))
            except Exception as error:  # many types: no network, no such repository, a broken cache
                failure = failure or error
        raise FileNotFoundError(
            f"BERT's tokenizer needs the vocab.txt of {_BERT_REPOSITORIES[0]}; it is not in the hub cache and the "
            f"download failed ({type(failure).__name__}). Save the file and set cond_stage_config.params.tokenizer_path"
        ) from failure


def _dropped(text: str, encoding: tokenizers.Encoding) -> str:
    spans = zip(encoding.offsets, encoding.special_tokens_mask)
    return text[max((end for (_, end), special in spans if not special), default=0) :].strip()
