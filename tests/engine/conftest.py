"""Shared fixtures: a second model, and the completions of a run without failures."""

from __future__ import annotations

import pytest
from faults import PARAMS, PROMPTS, SEEDS
from tiny_models import tiny_language_model

from alignpro.engine import Completion, Engine
from alignpro.models.language_model import LanguageModel


@pytest.fixture(scope="session")
def target() -> LanguageModel:
    """Return a model with twice the heads of the tiny Llama and one layer more: its tokens take three times the memory."""
    return tiny_language_model("qwen3", seed=1, num_key_value_heads=4, num_hidden_layers=3)


@pytest.fixture(scope="session")
def free(llama: LanguageModel) -> list[list[Completion]]:
    """Return the completions of `faults.PROMPTS` in a run without failures."""
    return Engine({"m": llama}).generate("m", PROMPTS, PARAMS, SEEDS)


@pytest.fixture(scope="session")
def drawn_by_some(free: list[list[Completion]]) -> int:
    """Return a token that is in no prompt and that some of these sequences draw before their last token."""
    drawn = [token for group in free for one in group for token in one.tokens[3:8]]
    return next(token for token in drawn if all(token not in prompt for prompt in PROMPTS))
