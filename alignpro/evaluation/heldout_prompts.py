"""The held-out prompts on which all arms are compared: those that every model can be given and every reward can score."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from alignpro.config import ComparisonConfig, EvalConfig, HeadroomConfig, ModelConfig
from alignpro.data import DataSet, Prompt, choose, split
from alignpro.errors import DataError
from alignpro.evaluation.sampled_arms import Trained, oracle_template
from alignpro.models.input_room import max_input_tokens, max_input_tokens_of
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.length_filter import filter_overlong_prompts
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.prompting.tokenization import load_tokenizer
from alignpro.rewards import RewardStack
from alignpro.targets.base import Target
from alignpro.targets.local import LocalTarget


def evaluation_prompts(
    config: EvalConfig | HeadroomConfig, data: DataSet, target: Target, trained: Trained, rewards: Sequence[RewardStack]
) -> list[Prompt]:
    """At most ``config.prompts`` held-out prompts that fit in the models' contexts; of all prompts if ``data.holdout`` is 0.

    A prompt that does not fit in one of the models, that one of their chat templates refuses, or that one of the rewards
    cannot score, is left out of all arms.

    Raises:
        DataError: Fewer than two are left.
    """
    holdout, by = config.data.holdout, config.data.holdout_by
    prompts = split(data.prompts, holdout, by)[1] if holdout > 0 else list(data.prompts)
    if len(prompts) < 2:
        raise DataError(
            f"evaluation needs at least 2 held-out prompts, there are {len(prompts)}: raise data.holdout, or set it to 0 "
            "to evaluate on all of data.source"
        )
    if isinstance(target, LocalTarget):
        prompts = _drop_prompts_too_long_for_responder(
            prompts, target.template.chat, target.template.max_tokens, "target"
        )
    if trained.oracle is not None and isinstance(config, EvalConfig):
        limit = max_input_tokens(trained.oracle, config.respond, "the oracle", "respond")
        prompts = _drop_prompts_too_long_for_responder(
            prompts, oracle_template(config, trained.oracle), limit, "oracle"
        )
    for prompter in (trained.prompter, trained.reference):
        if prompter is not None:
            prompts = drop_prompts_too_long_for_prompter(prompts, prompter, config)
    for other in config.also_fit if isinstance(config, EvalConfig) else ():
        prompts = drop_prompts_too_long_for_other(prompts, other, config)
    for reward in rewards:
        prompts = reward.scorable(prompts)
    return choose(prompts, config.prompts)


def _drop_prompts_too_long_for_responder(
    prompts: Sequence[Prompt], template: ChatTemplate, limit: int, name: str
) -> list[Prompt]:
    return filter_overlong_prompts(
        prompts, lambda prompt: template.encode(prompt.messages), limit, input_name=f"the {name}'s input"
    )


def drop_prompts_too_long_for_prompter(
    prompts: Sequence[Prompt], prompter: LanguageModel, config: ComparisonConfig
) -> list[Prompt]:
    """The prompts whose input fits in the prompter's context, beside the rewrite.

    Raises:
        ConfigError: The rewrite leaves no room for a prompt.
    """
    limit = max_input_tokens(prompter, config.rewrite, "the prompter", "rewrite")
    return _fitting(prompts, prompter.tokenizer, limit, config)


def drop_prompts_too_long_for_other(
    prompts: Sequence[Prompt], other: ModelConfig, config: ComparisonConfig
) -> list[Prompt]:
    """Likewise of a prompter that is not loaded.

    Raises:
        ConfigError: The rewrite leaves no room for a prompt.
        ModelError: The prompter's tokenizer cannot be used.
    """
    limit = max_input_tokens_of(other, config.rewrite, "the prompter", "rewrite")
    return _fitting(prompts, load_tokenizer(other), limit, config)


def _fitting(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, limit: int, config: ComparisonConfig
) -> list[Prompt]:
    encode = PrompterTemplate(tokenizer, config.prompting).encode
    return filter_overlong_prompts(prompts, encode, min(config.prompting.max_prompt_tokens, limit))
