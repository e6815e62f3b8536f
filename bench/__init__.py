"""Measurements: every figure is a ratio to its baseline, both taken in the same run."""
