"""Align-Pro: reinforcement learning of prompt rewriters for frozen language models."""

__version__ = "0.1.0"
