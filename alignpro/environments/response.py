"""The sample is the response itself: RLHF, and a target that responds to the prompts as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams
from alignpro.environments.base import (
    ResponseScores,
    begin_scores,
    begun_scores,
    refuse_errors,
    score_texts,
    settled_values,
    truncated_samples,
)
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.rewards import RewardStack
from alignpro.targets.base import Target


class ResponseEnvironment:
    """A policy in this process responds: RLHF of the target, and its evaluation.

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
        own_score = type(self).score is not ResponseEnvironment.score  # only that knows what it will score
        begin = None if own_score else begin_scores(self.reward, prompts, self._text)

        def ended(i: int, k: int, sample: Completion) -> None:
            if begin is not None:
                begin(i, None, [sample])

        with begun_scores(self.reward):
            inputs = [self.encode(prompt) for prompt in prompts]
            groups = engine.generate("policy", inputs, params, seeds, None if begin is None else ended)
        return [[Chain(sample) for sample in group] for group in groups]

    def write_card(self, directory: Path, max_tokens: int) -> None:
        """Write nothing: the policy is used like the model that it was."""

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> ResponseScores:
        """Score each response."""
        return _score(prompts, chains, self._text, self.reward)

    def _text(self, sample: Completion) -> str:
        return self.template.decode(sample.text_tokens)


class UnchangedPromptEnvironment:
    """The frozen target responds to the prompts as they are, without a prompter.

    Args:
        target: The target.
        reward: r*(x, y).
    """

    def __init__(self, target: Target, reward: RewardStack) -> None:
        self.target = target
        self.reward = reward

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        """Sample x → K responses."""
        sent = [self.target.encode(prompt, None) for prompt in prompts]
        begin = begin_scores(self.reward, prompts, self.target.text)
        told = None if begin is None else lambda i, responses: begin(i, None, responses)
        with begun_scores(self.reward):
            groups = self.target.respond(engine, sent, params, seeds, told)
        return [[Chain(sample) for sample in group] for group in groups]

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> ResponseScores:
        """Score each response."""
        return _score(prompts, chains, self.target.text, self.reward)


def _score(
    prompts: Sequence[Prompt],
    chains: Sequence[Sequence[Chain]],
    text: Callable[[Completion], str],
    reward: RewardStack,
) -> ResponseScores:
    refuse_errors(prompts, chains)
    texts = [[text(chain.sample) for chain in group] for group in chains]
    scores = score_texts(
        prompts,
        None,
        [[[each] for each in group] for group in texts],
        reward,
        truncated=truncated_samples(chains),
        settled=settled_values([[[chain.sample] for chain in group] for group in chains]),
    )
    return replace(scores, samples=texts)
