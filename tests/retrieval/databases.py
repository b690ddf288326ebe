"""Databases of random CLIP vectors in the published layout."""

import numpy as np

from ldm.retrieval.database import Database, unit


def vectors(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim))


def write_database(folder, *sizes: int, dim: int = 16, dtype=np.float16, save=np.savez):
    """Parts of `sizes` random vectors of different lengths in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, n in enumerate(sizes):
        length = np.random.default_rng(100 + k).uniform(1, 20, (n, 1))
        place = np.zeros((n, 4), np.float32)
        embedding = (length * vectors(n, dim, k)).astype(dtype)
        save(folder / f"part_{k}.npz", embedding=embedding, img_id=np.arange(n) + 1000 * k, patch_coords=place)
    return folder


def cosines(database: Database, queries: np.ndarray) -> np.ndarray:
    return unit(queries) @ unit(database.embedding(np.arange(len(database)))).T
