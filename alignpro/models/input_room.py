"""How much of a model's context is left for its input."""

from __future__ import annotations

from transformers import AutoConfig

from alignpro.config import ModelConfig, SamplingConfig
from alignpro.errors import ConfigError
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import stored_context
from alignpro.models.mixture_files import read_mixture


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
    return _room(model.context_length, model.name, sampling, whose, key)


def max_input_tokens_of(config: ModelConfig, sampling: SamplingConfig, whose: str, key: str) -> int:
    """Return `max_input_tokens` of a model that is not loaded; of a model with an adapter, ``config`` names its base model.

    Raises:
        ConfigError: No tokens are left.
        OSError: There is no configuration of the model.
    """
    loaded = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    context: int = loaded.get_text_config().max_position_embeddings
    return _room(context, config.path, sampling, whose, key)


def check_room(config: ModelConfig, sampling: SamplingConfig, whose: str, key: str) -> None:
    """Check that a model's context leaves room for its input, where its config.json tells the context; nothing is loaded.

    Raises:
        ConfigError: No tokens are left.
        ModelError: There is no configuration of the model.
    """
    if read_mixture(config.path) is None and (context := stored_context(config)) is not None:
        _room(context, config.path, sampling, whose, key)


def _room(context: int, name: str, sampling: SamplingConfig, whose: str, key: str) -> int:
    limit = context - sampling.max_tokens
    if limit < 1:
        raise ConfigError(
            f"{key}.max_tokens={sampling.max_tokens} leaves no room for a prompt in {whose}'s context of "
            f"{context} tokens ({name})"
        )
    return limit
