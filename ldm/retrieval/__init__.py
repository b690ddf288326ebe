"""Retrieval-augmented diffusion (Blattmann et al. 2022, arXiv 2204.11824): databases of CLIP vectors, searchers."""

# ruff: noqa: F401
from typing import TYPE_CHECKING

from ldm.published import lazy_attributes

if TYPE_CHECKING:
    from ldm.retrieval.clip import RetrievalCondition, clip_image_encoder, clip_text_encoder, embed_folder
    from ldm.retrieval.database import DATABASES, Database, find_database, searcher_folder
    from ldm.retrieval.searcher import Neighbors, Searcher, check_knn, import_faiss

__getattr__ = lazy_attributes(
    __name__,
    {
        "ldm.retrieval.clip": "RetrievalCondition clip_image_encoder clip_text_encoder embed_folder",
        "ldm.retrieval.database": "DATABASES Database find_database searcher_folder",
        "ldm.retrieval.searcher": "Neighbors Searcher check_knn import_faiss",
    },
)
