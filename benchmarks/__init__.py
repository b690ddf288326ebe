"""Timings of this project beside diffusers (`python -m benchmarks`), and of single parts."""
