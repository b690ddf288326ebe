"""CLIP's byte-pair tokenizer (Radford et al. 2021, https://github.com/openai/CLIP), from the merges that open-clip-torch ships.

No download, and open_clip itself is not imported. Text is cleaned as for the training of Stable Diffusion v1: broken unicode is mended,
white space becomes single spaces, everything is lower case.
"""

import functools
import gzip
import heapq
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.modules.encoders.truncation import CutTexts

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
VOCAB_SIZE = 49408
_MERGES = (
    VOCAB_SIZE - 2 * 256 - 2
)  # the vocabulary: 256 bytes, the same at a word's end, one token per merge, begin and end
_FILE = "bpe_simple_vocab_16e6.txt.gz"
_WORD = r"""'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"""


class CLIPTokenizer:
    """Text -> ids of CLIP's 49,408 tokens: begin 49406, end 49407."""

    def __init__(self, merges_path: str | Path | None = None) -> None:
        """merges_path: bpe_simple_vocab_16e6.txt.gz; by default the one inside the installed open-clip-torch."""
        import regex  # \p{L}, "any letter", is unknown to the standard library's re

        merges = _read_merges(Path(merges_path) if merges_path else default_merges())
        self._byte_symbols = _byte_symbols()
        symbols = [*self._byte_symbols.values()]
        vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), BEGIN, END]
        self.token_ids = {token: i for i, token in enumerate(vocabulary)}
        self.tokens = vocabulary
        self.begin_id, self.end_id = self.token_ids[BEGIN], self.token_ids[END]
        self._rank = {pair: i for i, pair in enumerate(merges)}
        self._words = regex.compile(f"{regex.escape(BEGIN)}|{regex.escape(END)}|{_WORD}", regex.IGNORECASE)
        self._ids_of_word = functools.lru_cache(maxsize=65536)(self._merge_word)
        self.tell_cut = CutTexts().tell

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs of symbols that training joined, in its order."""
        return list(self._rank)

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without begin and end. A literal begin or end token in the text stands for itself."""
        return [i for word in self._words.findall(clean(text)) for i in self._ids_of_word(word)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, begin and end left out."""
        byte_of = {symbol: byte for byte, symbol in self._byte_symbols.items()} | {" ": ord(" ")}
        tokens = (self.tokens[i] for i in ids if i not in (self.begin_id, self.end_id))
        text = "".join(token.removesuffix("</w>") + " " if token.endswith("</w>") else token for token in tokens)
        return bytes(byte_of[symbol] for symbol in text).decode("utf-8", errors="replace").strip()

    def __call__(self, texts: str | Sequence[str], max_length: int = 77, pad_id: int | None = None) -> Tensor:
        """begin, the text, end, padding -> (B, max_length) int64. A text that does not fit loses its end, with a warning that says what.

        pad_id: by default the end token, as in Stable Diffusion v1; OpenCLIP's models take 0.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if max_length < 2:
            raise ValueError(f"max_length {max_length}: begin and end alone need 2")
        ids = torch.full((len(texts), max_length), self.end_id if pad_id is None else pad_id, dtype=torch.int64)
        for row, text in zip(ids, texts):
            if not isinstance(text, str):
                raise TypeError(f"a text to encode is a {type(text).__name__}: {text!r}")
            tokens = self.encode(text)
            if len(tokens) > max_length - 2:
                self.tell_cut(text, max_length - 2, functools.partial(self.decode, tokens[max_length - 2 :]))
                tokens = tokens[: max_length - 2]
            row[: len(tokens) + 2] = torch.tensor([self.begin_id, *tokens, self.end_id])
        return ids

    def _merge_word(self, word: str) -> tuple[int, ...]:
        """Join neighbors in the order in which their pairs were merged in training; n log n, for a caption may be one long word.

        A pair that a join makes comes later in that order than the join's own, because no two merges make the same token.
        """
        if word in (BEGIN, END):
            return (self.token_ids[word],)
        parts: list[str] = [self._byte_symbols[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        following, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts)))
        due: list[tuple[int, int]] = []  # (rank of a pair, where its left part is)

        def note(i: int) -> None:
            if (
                i >= 0
                and following[i] < len(parts)
                and (rank := self._rank.get((parts[i], parts[following[i]]))) is not None
            ):
                heapq.heappush(due, (rank, i))

        for i in range(len(parts)):
            note(i)
        while due:
            rank, i = heapq.heappop(due)
            if self._join(parts, following, before, i, rank):
                note(before[i])
                note(i)
        return tuple(self.token_ids[part] for part in parts if part)

    def _join(self, parts: list[str], following: list[int], before: list[int], i: int, rank: int) -> bool:
        """Join part i with the one after it if they still are the pair of that rank; a joined part is left empty."""
        j = following[i]
        if j >= len(parts) or self._rank.get((parts[i], parts[j])) != rank:
            return False
        parts[i], parts[j] = parts[i] + parts[j], ""
        following[i] = following[j]
        before[following[j]] = i
        return True


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """The one tokenizer of this process, made when it is first needed."""
    return CLIPTokenizer()


def clean(text: str) -> str:
    """The text as the tokenizer sees it: unicode mended, single spaces, lower case."""
    if not (text.isascii() and text.isprintable()) or "&" in text:  # plain ASCII is never broken
        import ftfy

        text = ftfy.fix_text(text)
    return " ".join(text.split()).lower()


def default_merges() -> Path:
    """Where the installed open-clip-torch keeps the merges, found without importing it (4 seconds)."""
    package = importlib.util.find_spec("open_clip")
    path = Path(package.origin).with_name(_FILE) if package and package.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"CLIP's tokenizer needs {_FILE} of open-clip-torch: pip install open-clip-torch")
    return path


def _read_merges(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = itertools.islice(file, 1, 1 + _MERGES)  # the first line is a heading
        merges = [tuple(line.split()) for line in lines]
    if len(merges) != _MERGES or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path}: not CLIP's merges: {_MERGES} lines of two symbols were expected")
    return merges


def _byte_symbols() -> dict[int, str]:
    """A printable character for each byte: itself where it is one, else the next from 256 on; in the order of the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
