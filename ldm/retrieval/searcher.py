"""Nearest neighbors of CLIP vectors: the memory of retrieval-augmented diffusion (Blattmann et al. 2022, arXiv 2204.11824).

A searcher of a database (ldm.retrieval.database) is a folder with `index.faiss` and `searcher.json`, which scripts/train_searcher.py writes. faiss
(`pip install faiss-cpu`) is imported where it is used.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ldm.config.files import load_json
from ldm.retrieval.database import Database, unit

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

EXACT_UP_TO = (
    200_000  # vectors that are compared one by one; beyond that an inverted file is much faster and nearly as good
)
RECALL = 0.95  # share of the true neighbors that an inverted file has to find
INDEX, RECORD = "index.faiss", "searcher.json"


class Neighbors(NamedTuple):
    """The nearest vectors to B queries, the nearest first."""

    ids: np.ndarray  # (B, k) int64
    cosine: np.ndarray  # (B, k) float32
    embedding: np.ndarray  # (B, k, D) float32, as the database holds them


class Searcher:
    """Finds the vectors of a database with the largest cosine to a query."""

    def __init__(self, database: Database, index: Any, record: dict[str, Any]) -> None:
        self.database, self.index, self.record = database, index, record

    @classmethod
    def train(cls, database: Database, knn: int = 20, exact_up_to: int = EXACT_UP_TO) -> Searcher:
        """Index a database: as it is up to `exact_up_to` vectors, else an inverted file of bytes, which searches as many of its lists
        as finding 95 % of the `knn` nearest takes."""
        from tqdm import tqdm

        faiss, n = import_faiss(), len(database)
        check_knn(knn, database)
        exact = n <= exact_up_to
        if exact:
            index = faiss.IndexFlatIP(database.dim)
        else:
            lists = max(1, min(int(4 * n**0.5), n // 39))  # faiss asks for 39 vectors a list to learn from
            index = faiss.index_factory(database.dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
            learned_from = np.sort(np.random.default_rng(0).choice(n, min(n, 40 * lists), replace=False))
            index.train(unit(database.embedding(learned_from)))
        with tqdm(total=n, desc="indexing", unit="vector") as bar:
            for block in database.units():
                index.add(block)
                bar.update(len(block))
        searcher = cls(database, index, {"version": 1, "parts": database.identity(), "dim": database.dim, "knn": knn})
        searcher.record["recall"] = 1.0 if exact else searcher._tune(knn)
        found = 100 * searcher.record["recall"]
        logger.info("%d vectors of %d numbers indexed; finds %.1f %% of the %d nearest", n, database.dim, found, knn)
        return searcher

    def _tune(self, knn: int, n_queries: int = 100) -> float:
        """Search more and more lists until enough of the true neighbors of some vectors are found -> their share."""
        chosen = np.sort(
            np.random.default_rng(1).choice(len(self.database), min(n_queries, len(self.database)), replace=False)
        )
        queries = unit(self.database.embedding(chosen))
        best, ids = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        start = 0
        for block in self.database.units():  # exactly, in one pass over the parts
            best = np.concatenate([best, queries @ block.T], axis=1)
            ids = np.concatenate(
                [ids, np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))], axis=1
            )
            keep = np.argsort(-best, axis=1, kind="stable")[:, :knn]
            best, ids, start = np.take_along_axis(best, keep, 1), np.take_along_axis(ids, keep, 1), start + len(block)
        self.index.nprobe = 1
        while True:
            found = self.search(queries, knn).ids
            recall = float(np.mean([len(np.intersect1d(a, b)) / knn for a, b in zip(found, ids, strict=True)]))
            if recall >= RECALL or self.index.nprobe >= self.index.nlist:
                return recall
            self.index.nprobe = min(2 * self.index.nprobe, self.index.nlist)

    def search(self, queries: np.ndarray, knn: int) -> Neighbors:
        """The `knn` nearest of queries (B, D), any length; an inverted file proposes 4 times as many, and exact cosines choose."""
        check_knn(knn, self.database)
        if queries.ndim != 2 or queries.shape[1] != self.database.dim:
            raise ValueError(
                f"queries of shape {queries.shape}: the database holds vectors of {self.database.dim} numbers"
            )
        queries = unit(queries)
        if not hasattr(self.index, "nprobe"):
            cosine, ids = self.index.search(queries, knn)
            return Neighbors(ids, cosine, self.database.embedding(ids))
        proposed = min(4 * knn, len(self.database))
        _, ids = self.index.search(queries, proposed)
        short = (ids >= 0).sum(axis=1) < knn  # the lists that were searched hold too few
        if short.any():
            everywhere = import_faiss().SearchParametersIVF(nprobe=self.index.nlist)
            ids[short] = self.index.search(queries[short], proposed, params=everywhere)[1]
        vectors = self.database.embedding(np.maximum(ids, 0))
        cosine = np.einsum("bd,bkd->bk", queries, unit(vectors))
        cosine[ids < 0] = -np.inf
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :knn]
        return Neighbors(
            *(np.take_along_axis(x, order, 1) for x in (ids, cosine)), np.take_along_axis(vectors, order[..., None], 1)
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write `index.faiss` and `searcher.json` -> their paths. What is there is replaced once both are whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        new = [folder / f".{name}.{os.getpid()}" for name in (INDEX, RECORD)]
        import_faiss().write_index(self.index, str(new[0]))
        new[1].write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        return [path.replace(folder / name) for path, name in zip(new, (INDEX, RECORD), strict=True)]

    @classmethod
    def load(cls, database: Database, folder: str | Path) -> Searcher:
        """The index that was made of this database; ValueError where it was made of another."""
        folder = Path(folder)
        try:
            record = load_json(folder / RECORD)
            parts = record["parts"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / RECORD}: not a searcher's record; {_again(database, folder)}") from error
        if parts != database.identity():
            raise ValueError(f"{folder}: made of another state of {database.folder}; {_again(database, folder)}")
        try:
            index = import_faiss().read_index(str(folder / INDEX))
        except RuntimeError as error:
            raise ValueError(f"{folder / INDEX}: cannot be read; {_again(database, folder)}") from error
        if not _is_own_kind(index) or (index.d, index.ntotal) != (database.dim, len(database)):
            raise ValueError(f"{folder / INDEX}: no index of {database.folder}; {_again(database, folder)}")
        return cls(database, index, record)

    @classmethod
    def of(cls, database: Database, folder: str | Path) -> Searcher:
        """The saved index or, of a database that is small enough for an exact one, a new one; ValueError says how to make one."""
        if (Path(folder) / RECORD).is_file():
            return cls.load(database, folder)
        if len(database) > EXACT_UP_TO:
            raise ValueError(f"{folder}: no searcher of {len(database)} vectors; {_again(database, Path(folder))}")
        return cls.train(database, knn=1)


def _is_own_kind(index: Any) -> bool:
    """Whether it is an index as `Searcher.train` makes them, whose vectors lie in its own file: other kinds can point at any file."""
    faiss = import_faiss()
    if type(index) is faiss.IndexFlatIP:
        return True
    return (
        type(index) is faiss.IndexIVFScalarQuantizer
        and type(faiss.downcast_InvertedLists(index.invlists)) is faiss.ArrayInvertedLists
    )


def _again(database: Database, folder: Path) -> str:
    return f"run python scripts/train_searcher.py -d {database.folder} -t {folder}"


def check_knn(knn: int, database: Database) -> None:
    if not 1 <= knn <= len(database):
        raise ValueError(f"--knn {knn}: choose 1 to {len(database)}, the number of vectors in {database.folder}")


def import_faiss() -> Any:
    """The library of the search; ImportError says how to get it."""
    logging.getLogger("faiss").setLevel(logging.WARNING)  # else it tells which instructions it found
    try:
        import faiss
    except ImportError as error:
        raise ImportError("retrieval needs faiss, which is not installed: pip install faiss-cpu") from error
    return faiss


class RetrievalCondition:
    """Prompts -> the context of a retrieval-augmented model: CLIP's vector of the text and those of its neighbors, all of length 1.

    clip: embeds texts, (B, n_repeat, D). searcher: None leaves the neighbors out. It is an `encode` of ldm.inference.text_to_image.
    """

    def __init__(
        self, clip: Any, searcher: Searcher | None = None, knn: int = 10, negative_prompt: str = "", scale: float = 5.0
    ) -> None:
        if searcher is not None:
            check_knn(knn, searcher.database)
            if searcher.database.dim != clip.width:
                has = f"vectors of {searcher.database.dim} numbers"
                raise ValueError(
                    f"{searcher.database.folder}: {has}; CLIP {clip.version} makes {clip.width}, see --clip_type"
                )
        self.clip, self.searcher, self.knn, self.negative_prompt, self.scale = (
            clip,
            searcher,
            knn,
            negative_prompt,
            scale,
        )
        self._told: set[str] = set()

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """B prompts -> (condition, what guidance leads away from), each (B, n_repeat + knn, D).

        The latter is zeros, as published, or the context of the negative prompt; None at scale 1.
        """
        context = self.context(prompts)
        if self.scale == 1.0:
            return context, None
        return context, self.context(
            [self.negative_prompt] * len(prompts)
        ) if self.negative_prompt else context.new_zeros(context.shape)

    def context(self, prompts: Sequence[str]) -> Tensor:
        import torch

        text = self.clip.encode(list(prompts))  # (B, n_repeat, D)
        if self.searcher is None:
            return text
        found = self.searcher.search(text[:, 0].float().cpu().numpy(), self.knn)
        for prompt, ids, cosine in zip(prompts, found.ids, found.cosine, strict=True):
            if prompt not in self._told:
                self._told.add(prompt)
                names = ", ".join(str(name) for name in self.searcher.database.img_id(ids[:5]))
                more = ", ..." if len(ids) > 5 else ""
                logger.info("%r: neighbors %s%s, cosine %.3f to %.3f", prompt, names, more, cosine[0], cosine[-1])
        neighbors = torch.from_numpy(unit(found.embedding)).to(text)  # (B, knn, D), of length 1 as published
        return torch.cat([text, neighbors], dim=1)
