"""Build environments from their configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from alignpro.config import PromptingConfig, SamplingConfig
from alignpro.config.dotted_path import load_class
from alignpro.environments.base import sampling_params
from alignpro.environments.prompt import PromptEnvironment
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.memory_context import MemoryContext
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.rewards import RewardStack
from alignpro.targets.base import Responder

E = TypeVar("E")


def prompt_environment(
    prompter: LanguageModel,
    target: Responder,
    reward: RewardStack,
    prompting: PromptingConfig,
    respond: SamplingConfig,
    *,
    responses: int,
    memory: MemoryContext | None = None,
    kind: Callable[..., PromptEnvironment] = PromptEnvironment,
) -> PromptEnvironment:
    """Build the environment of chains x → x' → y from the prompter's template, the target and the reward.

    Args:
        prompter: The prompter.
        target: The target.
        reward: r*(x, y).
        prompting: Meta-prompt, and how empty and truncated rewrites are treated.
        respond: How the target is sampled.
        responses: M, its responses per rewrite.
        memory: Past rewrites that the prompter sees.
        kind: Makes the environment; see `environment_kind`.
    """
    return kind(
        PrompterTemplate(prompter.tokenizer, prompting, stop_token_ids=prompter.end_token_ids, memory=memory),
        target,
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
