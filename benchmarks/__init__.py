"""Benchmarks; their results, with the commands that produced them, are in ``results/``."""
