"""Nearest neighbors of CLIP vectors for retrieval-augmented diffusion (Blattmann et al. 2022, arXiv 2204.11824).

A searcher of a database is a folder with `index.faiss` and `searcher.json`, written by scripts/train_searcher.py.
faiss (`pip install faiss-cpu`) is optional and imported on first use.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ldm.atomic import atomic_file, save_text
from ldm.config.files import load_json
from ldm.retrieval.database import Database, unit

logger = logging.getLogger(__name__)

EXACT_UP_TO = 200_000  # vectors with an exact search; beyond, an inverted file is much faster and nearly as good
RECALL = 0.95  # of the true neighbors, required of an inverted file
INDEX, RECORD = "index.faiss", "searcher.json"


class Neighbors(NamedTuple):
    """The nearest vectors of B queries, nearest first."""

    ids: np.ndarray  # (B, k) int64
    cosine: np.ndarray  # (B, k) float32
    embedding: np.ndarray  # (B, k, D) float32, as stored


class Searcher:
    """Search for the vectors of a database with the largest cosine to a query."""

    def __init__(self, database: Database, index: Any, record: dict[str, Any]) -> None:
        self.database, self.index, self.record = database, index, record

    @classmethod
    def train(cls, database: Database, knn: int = 20, exact_up_to: int = EXACT_UP_TO) -> Searcher:
        """Index a database: exactly up to `exact_up_to` vectors, else as an inverted file of 8-bit vectors that
        searches enough of its lists to find 95 % of the `knn` nearest."""
        faiss, n = import_faiss(), len(database)
        check_knn(knn, database)
        exact = n <= exact_up_to
        if exact:
            index = faiss.IndexFlatIP(database.dim)
        else:
            lists = max(1, min(int(4 * n**0.5), n // 39))  # faiss wants at least 39 training vectors per list
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
        logger.info("%d vectors of %d values indexed; recall %.1f %% of the %d nearest", n, database.dim, found, knn)
        return searcher

    def _tune(self, knn: int, n_queries: int = 100) -> float:
        """Double the number of searched lists until the recall of some vectors is high enough -> the recall."""
        chosen = np.sort(
            np.random.default_rng(1).choice(len(self.database), min(n_queries, len(self.database)), replace=False)
        )
        queries = unit(self.database.embedding(chosen))
        best, ids = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        start = 0
        for block in self.database.units():  # exact search in one pass over the parts
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
        """The `knn` nearest of queries (B, D); an inverted file's 4 * knn candidates are ranked by exact cosine."""
        check_knn(knn, self.database)
        if queries.ndim != 2 or queries.shape[1] != self.database.dim:
            raise ValueError(
                f"queries of shape {queries.shape}: the database's vectors have {self.database.dim} values"
            )
        queries = unit(queries)
        if not hasattr(self.index, "nprobe"):
            cosine, ids = self.index.search(queries, knn)
            return Neighbors(ids, cosine, self.database.embedding(ids))
        proposed = min(4 * knn, len(self.database))
        _, ids = self.index.search(queries, proposed)
        short = (ids >= 0).sum(axis=1) < knn  # the searched lists have too few vectors
        if short.any():
            everywhere = import_faiss().SearchParametersIVF(nprobe=self.index.nlist)
            ids[short] = self.index.search(queries[short], proposed, params=everywhere)[1]
        vectors = self.database.embedding(np.maximum(ids, 0))
        cosine = np.einsum("bd,bkd->bk", queries, unit(vectors))
        cosine[ids < 0] = -np.inf
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :knn]
        ids, cosine = (np.take_along_axis(x, order, 1) for x in (ids, cosine))
        return Neighbors(ids, cosine, np.take_along_axis(vectors, order[..., None], 1))

    def save(self, folder: str | Path) -> list[Path]:
        """Write `index.faiss` and `searcher.json` -> their paths."""
        folder = Path(folder)
        with atomic_file(folder / INDEX) as new:
            import_faiss().write_index(self.index, str(new))
        return [folder / INDEX, save_text(folder / RECORD, json.dumps(self.record, indent=1) + "\n")]

    @classmethod
    def load(cls, database: Database, folder: str | Path) -> Searcher:
        """Load the index of this database; raise ValueError if it belongs to another."""
        folder = Path(folder)
        try:
            record = load_json(folder / RECORD)
            parts = record["parts"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / RECORD}: not a searcher's record; {_again(database, folder)}") from error
        if parts != database.identity():
            raise ValueError(f"{folder}: made from another state of {database.folder}; {_again(database, folder)}")
        try:
            index = import_faiss().read_index(str(folder / INDEX))
        except RuntimeError as error:
            raise ValueError(f"{folder / INDEX}: cannot be read; {_again(database, folder)}") from error
        if not _is_own_kind(index) or (index.d, index.ntotal) != (database.dim, len(database)):
            raise ValueError(f"{folder / INDEX}: not an index of {database.folder}; {_again(database, folder)}")
        return cls(database, index, record)

    @classmethod
    def of(cls, database: Database, folder: str | Path) -> Searcher:
        """The saved index, or a new one if the database is small enough for an exact search; else raise ValueError."""
        if (Path(folder) / RECORD).is_file():
            return cls.load(database, folder)
        if len(database) > EXACT_UP_TO:
            raise ValueError(f"{folder}: no searcher for {len(database)} vectors; {_again(database, Path(folder))}")
        return cls.train(database, knn=1)


def _is_own_kind(index: Any) -> bool:
    """True for the kinds that `Searcher.train` makes. Others may keep their vectors in any file on disk."""
    faiss = import_faiss()
    if type(index) is not faiss.IndexIVFScalarQuantizer:
        return type(index) is faiss.IndexFlatIP
    return type(faiss.downcast_InvertedLists(index.invlists)) is faiss.ArrayInvertedLists


def _again(database: Database, folder: Path) -> str:
    return f"run python scripts/train_searcher.py -d {database.folder} -t {folder}"


def check_knn(knn: int, database: Database) -> None:
    if not 1 <= knn <= len(database):
        raise ValueError(f"--knn {knn}: choose 1 to {len(database)}, the number of vectors in {database.folder}")


def import_faiss() -> Any:
    """The optional library of the search; raise ImportError if it is not installed."""
    logging.getLogger("faiss").setLevel(logging.WARNING)  # at INFO it lists the CPU's instruction sets
    try:
        import faiss
    except ImportError as error:
        raise ImportError("retrieval requires faiss: pip install faiss-cpu") from error
    return faiss
