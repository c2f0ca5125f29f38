"""RLHF: the sample is the response itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alignpro.data import Prompt
from alignpro.engine import Chain, Engine, SamplingParams
from alignpro.environments.base import ResponseScores, refuse_errors, score_texts, truncated_samples
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.rewards import RewardStack


class ResponseEnvironment:
    """The sample is the response itself: RLHF of the target, and its evaluation.

    Args:
        template: Template of the policy: prompt → tokens, tokens → response.
        reward: r*(x, y); its guards compare rewrites and are not applied here.
    """

    def __init__(self, template: ChatTemplate, reward: RewardStack) -> None:
        self.template = template
        self.reward = reward

    def encode(self, prompt: Prompt) -> list[int]:
        """The policy's input: the template around the conversation."""
        return self.template.encode(prompt.messages)

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        """Sample x → K responses."""
        params = replace(params, stop_token_ids=self.template.stop_token_ids)
        groups = engine.generate("policy", [self.encode(prompt) for prompt in prompts], params, seeds)
        return [[Chain(sample) for sample in group] for group in groups]

    def write_card(self, directory: Path, max_tokens: int) -> None:
        """Write nothing: the policy is used like the model that it was."""

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> ResponseScores:
        """Score each response."""
        refuse_errors(prompts, chains)
        texts = [[self.template.decode(c.sample.text_tokens) for c in group] for group in chains]
        responses = [[[text] for text in group] for group in texts]
        scores = score_texts(prompts, None, responses, self.reward, truncated=truncated_samples(chains))
        return replace(scores, samples=texts)
