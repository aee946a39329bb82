"""Faults on purpose, in real processes: whether every sample is there afterwards, once, and right."""
