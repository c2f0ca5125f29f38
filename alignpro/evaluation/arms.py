"""The arms of a comparison: each samples responses to the same held-out prompts with its own method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignpro.config import EvalConfig, OptimalConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, Engine, SamplingParams, derive_seed
from alignpro.environments.base import ResponseScores, sampling_params
from alignpro.environments.build import max_input_tokens, prompt_environment
from alignpro.environments.prompt import PromptEnvironment
from alignpro.environments.response import ResponseEnvironment
from alignpro.models.language_model import LanguageModel
from alignpro.objectives import GibbsResample, gibbs_resample
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.length_filter import filter_overlong_prompts
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.rewards import RewardStack

LABELS = {
    "no_finetuning": "No fine-tuning",
    "sft_prompter": "SFT prompter",
    "gibbs": "Gibbs",
    "align_pro": "Align-Pro",
    "oracle": "Oracle (RLHF)",
}


@dataclass
class ArmSamples:
    """The samples of an arm and their scores."""

    name: str
    chains: list[list[Chain]]
    """[P][K]; in an arm without rewrites, the samples are the responses."""
    scores: ResponseScores

    @property
    def rewards(self) -> Tensor:
        """(P, K, M); in an arm without rewrites (P, 1, K), with its K responses on the last axis."""
        rewards = self.scores.rewards
        return rewards if self.scores_rewrites else rewards.transpose(1, 2)

    @property
    def scores_rewrites(self) -> bool:
        """Whether the samples are rewrites with responses of a target."""
        return bool(self.chains[0][0].responses)


@dataclass
class ArmSampler:
    """Samples arms on a set of prompts with one target and one reward; all arms use the same seed for a prompt.

    The number of responses per prompt is the same in every arm: K rewrites × M responses, or K·M responses.
    """

    config: EvalConfig | OptimalConfig
    prompts: Sequence[Prompt]
    target: LanguageModel
    reward: RewardStack

    def sample_responses(self, name: str, model: LanguageModel, count: int) -> ArmSamples:
        """Draw ``count`` responses of a model to each original prompt: for no fine-tuning, or for the oracle."""
        template = ChatTemplate(
            model.tokenizer, self.config.target_model.chat_template, stop_token_ids=model.end_token_ids
        )
        environment = ResponseEnvironment(template, self.reward)
        engine = Engine({"policy": model}, **self.config.engine.model_dump())
        return self._sample(name, environment, engine, sampling_params(self.config.respond, count))

    def sample_rewrites(self, name: str, prompter: LanguageModel, count: int) -> ArmSamples:
        """Draw ``count`` rewrites per prompt from a prompter, with the target's responses to each."""
        engine = Engine({"policy": prompter, "target": self.target}, **self.config.engine.model_dump())
        params = sampling_params(self.config.rewrite, count)
        return self._sample(name, self.environment(prompter), engine, params)

    def environment(self, prompter: LanguageModel) -> PromptEnvironment:
        """The environment of the chain prompter → target → reward."""
        config = self.config
        return prompt_environment(
            prompter,
            self.target,
            config.target_model,
            self.reward,
            config.prompting,
            config.respond,
            responses=config.responses_per_rewrite,
        )

    def resample(self, candidates: ArmSamples, prompter: LanguageModel, kl_coef: float, count: int) -> ArmSamples:
        """Resample ``count`` candidates per prompt with weights softmax(R/λ) and draw new responses of the target.

        The resampled rewrites are not scored with the responses that selected them, which would favour lucky ones.
        """
        weights = self.gibbs_weights(candidates, kl_coef).weights  # (P, N)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "gibbs"))
        chosen = torch.multinomial(weights.double(), count, replacement=True, generator=generator).tolist()
        environment = self.environment(prompter)
        chosen_chains = [[group[j] for j in row] for group, row in zip(candidates.chains, chosen, strict=True)]
        engine = Engine({"target": self.target}, **self.config.engine.model_dump())
        responses = engine.generate(
            "target",
            [chain.target_tokens for group in chosen_chains for chain in group],
            environment.respond,
            [derive_seed(self.config.seed, "fresh", i, k) for i in range(len(chosen_chains)) for k in range(count)],
        )
        of_each = iter(responses)
        chains = [[replace(chain, responses=next(of_each)) for chain in group] for group in chosen_chains]
        return ArmSamples("gibbs", chains, environment.score(self.prompts, chains))

    def gibbs_weights(self, candidates: ArmSamples, kl_coef: float) -> GibbsResample:
        """The closed-form weights of the candidates, with λ log Ẑ and the effective sample size."""
        return gibbs_resample(candidates.scores.values.double(), kl_coef)

    def _sample(
        self, name: str, environment: PromptEnvironment | ResponseEnvironment, engine: Engine, params: SamplingParams
    ) -> ArmSamples:
        seeds = [derive_seed(self.config.seed, "evaluation", i) for i in range(len(self.prompts))]
        chains = environment.rollout(engine, self.prompts, params, seeds)
        return ArmSamples(name, chains, environment.score(self.prompts, chains))


def drop_prompts_too_long_for_prompter(
    prompts: Sequence[Prompt], prompter: LanguageModel, config: EvalConfig | OptimalConfig
) -> list[Prompt]:
    """The prompts whose input fits in the prompter's context, beside the rewrite.

    Raises:
        ConfigError: The rewrite leaves no room for a prompt.
    """
    limit = max_input_tokens(prompter, config.rewrite, "the prompter", "rewrite")
    encode = PrompterTemplate(prompter.tokenizer, config.prompting).encode
    return filter_overlong_prompts(prompts, encode, min(config.prompting.max_prompt_tokens, limit))
