"""Exhaustive checks that take minutes: python -m tests.full. The test suite checks a part of each."""
