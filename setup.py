"""Packaging: `pip install -e .` for the framework, extras for what only some of it needs."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "quickstart": ["scikit-learn>=1.5", "tensorboard>=2.17"],
    "logging": ["tensorboard>=2.17"],
    "retrieval": ["faiss-cpu>=1.9"],
    "safety": ["diffusers>=0.36"],
    "benchmarks": ["diffusers>=0.36"],
    "quantize": ["torchao>=0.18"],
    "bitsandbytes": ["bitsandbytes>=0.50"],
    "streams": ["webdataset>=1.0", "fsspec>=2024.6"],
    "deepspeed": ["deepspeed>=0.16"],
    "evaluation": ["torch-fidelity>=0.4"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings-python>=2.0"],
    "web": ["gradio>=6.31,<7"],
}
EXTRAS["test"] = [
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "ruff>=0.14",
    "mypy>=1.18",
    "import-linter>=2.5",
    "types-PyYAML",
    "types-tqdm",
    *EXTRAS["quickstart"],
    *EXTRAS["retrieval"],
    *EXTRAS["safety"],
    *EXTRAS["quantize"],
    *EXTRAS["streams"],
    *EXTRAS["evaluation"],
    *EXTRAS["web"],
    "playwright>=1.50",  # the page in a browser, which it does not bring: apt-get install chromium
    "peft>=0.17",  # LoRA files, compared with diffusers'
]

setup(
    name="latent-diffusion",
    version="0.1.0",
    description="Latent diffusion models: training, sampling and Stable Diffusion, faithful to the published framework",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["ldm", "ldm.*"]),
    package_data={"ldm.web": ["page.css"]},
    install_requires=[
        "torch>=2.10",
        "pytorch-lightning>=2.6.6",
        "omegaconf>=2.3",
        "einops>=0.8",
        "pillow>=11.0",
        "numpy>=2.0",
        "tokenizers>=0.22",
        "huggingface-hub>=1.0",
        "safetensors>=0.5",
        "tqdm>=4.66",
        "transformers>=5.0",
        "open-clip-torch>=3.0",
        "ftfy>=6.2",
        "invisible-watermark>=0.2.0",
        "taming-transformers-rom1504>=0.0.6",
    ],
    extras_require=EXTRAS,
)
