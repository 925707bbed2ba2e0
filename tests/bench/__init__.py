"""Benchmarks: ratios against the plain alternative, side by side in one run. Not part of the tests."""
