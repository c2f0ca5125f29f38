"""The arms of a comparison: each samples responses to the same held-out prompts with its own method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignpro.config import EvalConfig, OptimalConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams, derive_seed
from alignpro.environments.base import ResponseScores, sampling_params
from alignpro.environments.build import prompt_environment
from alignpro.environments.prompt import PromptEnvironment
from alignpro.environments.response import ResponseEnvironment
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch
from alignpro.objectives import GibbsResample, gibbs_resample
from alignpro.policy.policy import Policy, sequence_logprob
from alignpro.prompting.chat_template import ChatTemplate
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

    def responses(self, name: str, model: LanguageModel, count: int) -> ArmSamples:
        """Draw ``count`` responses of a model to each original prompt: for no fine-tuning, or for the oracle."""
        environment = ResponseEnvironment(
            ChatTemplate(model.tokenizer, self.config.target_model.chat_template), self.reward
        )
        engine = Engine({"policy": model}, **self.config.engine.model_dump())
        return self._draw(name, environment, engine, sampling_params(self.config.respond, count))

    def rewrites(self, name: str, prompter: LanguageModel, count: int) -> ArmSamples:
        """Draw ``count`` rewrites per prompt from a prompter, with the target's responses to each."""
        engine = Engine({"policy": prompter, "target": self.target}, **self.config.engine.model_dump())
        params = sampling_params(self.config.rewrite, count)
        return self._draw(name, self.environment(prompter), engine, params)

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

    def gibbs(self, candidates: ArmSamples, prompter: LanguageModel, kl_coef: float, count: int) -> ArmSamples:
        """Resample ``count`` candidates per prompt with weights softmax(R/λ) and draw new responses of the target.

        The resampled rewrites are not scored with the responses that selected them, which would favour lucky ones.
        """
        weights = self.weigh(candidates, kl_coef).weights  # (P, N)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "gibbs"))
        chosen = torch.multinomial(weights.double(), count, replacement=True, generator=generator).tolist()
        environment = self.environment(prompter)
        picked = [[group[j] for j in row] for group, row in zip(candidates.chains, chosen, strict=True)]
        engine = Engine({"target": self.target}, **self.config.engine.model_dump())
        fresh = engine.generate(
            "target",
            [chain.target_tokens for group in picked for chain in group],
            environment.respond,
            [derive_seed(self.config.seed, "fresh", i, k) for i in range(len(picked)) for k in range(count)],
        )
        answers = iter(fresh)
        chains = [[replace(chain, responses=next(answers)) for chain in group] for group in picked]
        return ArmSamples("gibbs", chains, environment.score(self.prompts, chains))

    def weigh(self, candidates: ArmSamples, kl_coef: float) -> GibbsResample:
        """The closed-form weights of the candidates, with λ log Ẑ and the effective sample size."""
        return gibbs_resample(candidates.scores.values.double(), kl_coef)

    def _draw(
        self, name: str, environment: PromptEnvironment | ResponseEnvironment, engine: Engine, params: SamplingParams
    ) -> ArmSamples:
        seeds = [derive_seed(self.config.seed, "evaluation", i) for i in range(len(self.prompts))]
        chains = environment.rollout(engine, self.prompts, params, seeds)
        return ArmSamples(name, chains, environment.score(self.prompts, chains))


def sequence_kl(
    model: LanguageModel, reference: LanguageModel, inputs: Sequence[Sequence[int]], arm: ArmSamples, temperature: float
) -> float:
    """Mean exact KL(model ‖ reference) on an arm's samples, in nats per sequence; both models share one vocabulary."""
    policy = Policy(model, reference, temperature=temperature)
    prompts = [ids for ids, group in zip(inputs, arm.chains, strict=True) for _ in group]
    samples = [chain.sample.tokens for group in arm.chains for chain in group]
    total = 0.0
    for batch in batches(prompts, samples, model):
        total += policy.token_values(batch).kl.sum().item()
    return total / len(samples)


@torch.no_grad()
def logprobs(
    model: LanguageModel, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], temperature: float
) -> Tensor:
    """log p(y|prompt) of whole completions, (N,) float64 on the CPU."""
    tokens = [completion.tokens for completion in completions]
    parts = [sequence_logprob(model, batch, temperature) for batch in batches(prompts, tokens, model)]
    return torch.cat(parts).double().cpu()


def batches(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], model: LanguageModel, size: int = 128
) -> list[SequenceBatch]:
    """Split sequences into batches of ``size``, in order."""
    return [
        SequenceBatch.build(prompts[start : start + size], completions[start : start + size], model.device)
        for start in range(0, len(prompts), size)
    ]
