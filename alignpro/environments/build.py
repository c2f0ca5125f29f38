"""Build environments from their configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from alignpro.config import ModelConfig, PromptingConfig, SamplingConfig
from alignpro.config.dotted_path import load_class
from alignpro.environments.base import sampling_params
from alignpro.environments.prompt import PromptEnvironment
from alignpro.errors import ConfigError
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.prompting.target_prompt import TargetTemplate
from alignpro.rewards import RewardStack

E = TypeVar("E")


def prompt_environment(
    prompter: LanguageModel,
    target: LanguageModel,
    target_config: ModelConfig,
    reward: RewardStack,
    prompting: PromptingConfig,
    respond: SamplingConfig,
    *,
    responses: int,
    kind: Callable[..., PromptEnvironment] = PromptEnvironment,
) -> PromptEnvironment:
    """Build the environment of chains x → x' → y from the templates of prompter and target, and the reward.

    Args:
        prompter: The prompter.
        target: The target.
        target_config: Its configuration, for its chat template.
        reward: r*(x, y).
        prompting: Meta-prompt, and how empty and truncated rewrites are treated.
        respond: How the target is sampled.
        responses: M, its responses per rewrite.
        kind: Makes the environment; see `environment_kind`.

    Raises:
        ConfigError: The target's context has no room for a prompt in addition to the response.
    """
    limit = max_input_tokens(target, respond, "the target", "respond")
    return kind(
        PrompterTemplate(prompter.tokenizer, prompting, stop_token_ids=prompter.end_token_ids),
        TargetTemplate(
            target.tokenizer,
            target_config.chat_template,
            max_tokens=limit,
            on_empty=prompting.on_empty,
            stop_token_ids=target.end_token_ids,
        ),
        reward,
        sampling_params(respond, responses),
        prompting,
    )


def environment_kind(name: str | None, params: dict[str, Any], default: type[E]) -> Callable[..., E]:
    """Return what makes an environment: the default class, or one of the user's own that extends it, with its arguments.

    Args:
        name: ``package.module:Class`` or ``path/to/file.py:Class``; None for the default.
        params: Keyword arguments of the user's own class.
        default: The class.

    Raises:
        ConfigError: The class cannot be loaded, or it does not extend ``default``.
    """
    return default if name is None else partial(load_class(name, default, "environment"), **params)


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
