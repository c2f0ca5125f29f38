"""Measurements; their results, with the commands that made them, are in ``results/``."""
