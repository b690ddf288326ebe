"""Latent diffusion models (Rombach et al., CVPR 2022, https://arxiv.org/abs/2112.10752)."""

__version__ = "0.1.0"
