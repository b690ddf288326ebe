"""Metrics of first stages and of samples."""
