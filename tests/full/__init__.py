"""Promises that are kept for every value, and that take minutes to check: python -m tests.full. The suite checks a part of each."""
