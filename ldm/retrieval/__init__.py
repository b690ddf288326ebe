"""Retrieval-augmented diffusion (Blattmann et al. 2022, arXiv 2204.11824): databases of CLIP vectors and their searchers."""
