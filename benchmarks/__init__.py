"""Benchmarks; their results, with the commands that produced them, are in ``results/``."""

from alignpro.models.cpu.threads import set_environment

set_environment()
