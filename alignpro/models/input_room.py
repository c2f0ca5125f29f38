"""How much of a model's context is left for its input."""

from __future__ import annotations

from alignpro.config import SamplingConfig
from alignpro.errors import ConfigError
from alignpro.models.language_model import LanguageModel


def max_input_tokens(model: LanguageModel, sampling: SamplingConfig, whose: str, key: str) -> int:
    """Return the number of tokens of a model's context that are left for its input.

    Args:
        model: The model.
        sampling: How it is sampled.
        whose: The name of the model in messages.
        key: The configuration key of ``sampling``.

    Raises:
        ConfigError: No tokens are left.
    """
    limit = model.context_length - sampling.max_tokens
    if limit < 1:
        raise ConfigError(
            f"{key}.max_tokens={sampling.max_tokens} leaves no room for a prompt in {whose}'s context of "
            f"{model.context_length} tokens ({model.name})"
        )
    return limit
