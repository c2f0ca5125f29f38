"""Build environments from their configuration."""

from __future__ import annotations

from alignpro.config import ModelConfig, PromptingConfig, SamplingConfig
from alignpro.environments.base import sampling_params
from alignpro.environments.prompt import PromptEnvironment
from alignpro.errors import ConfigError
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.prompting.target_prompt import TargetTemplate
from alignpro.rewards import RewardStack


def prompt_environment(
    prompter: LanguageModel,
    target: LanguageModel,
    target_config: ModelConfig,
    reward: RewardStack,
    prompting: PromptingConfig,
    respond: SamplingConfig,
    *,
    responses: int,
) -> PromptEnvironment:
    """Build the environment of chains x → x' → y from the templates of prompter and target, and the reward.

    Raises:
        ConfigError: The target's context has no room for a prompt in addition to the response.
    """
    room = max_input_tokens(target, respond, "the target", "respond")
    return PromptEnvironment(
        PrompterTemplate(prompter.tokenizer, prompting),
        TargetTemplate(target.tokenizer, target_config.chat_template, max_tokens=room, on_empty=prompting.on_empty),
        reward,
        sampling_params(respond, responses),
        prompting,
    )


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
    room = model.context_length - sampling.max_tokens
    if room < 1:
        raise ConfigError(
            f"{key}.max_tokens={sampling.max_tokens} leaves no room for a prompt in {whose}'s context of "
            f"{model.context_length} tokens ({model.name})"
        )
    return room
