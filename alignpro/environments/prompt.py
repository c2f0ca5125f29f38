"""The project's own environment: a frozen target responds to each rewrite, and the reward scores its responses.

The reward scores the response against the ORIGINAL prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from alignpro.config import PromptingConfig
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
from alignpro.environments.unchanged_prompts import learn_refusals
from alignpro.prompting.model_card import write_card, write_memory
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.prompting.target_prompt import SentRewrite
from alignpro.rewards import RewardStack
from alignpro.targets.base import BegunRollout, Responder, Target


class PromptEnvironment:
    """A frozen target responds to each rewrite, and the reward scores its responses.

    Args:
        prompter: Template of the prompter: prompt → tokens, tokens → rewrite.
        target: What responds to the rewrites.
        reward: r*(x, y), with its guards on (x, x').
        respond: How the target samples its M responses (``n``) per rewrite.
        config: How empty and truncated rewrites are treated.
    """

    def __init__(
        self,
        prompter: PrompterTemplate,
        target: Responder,
        reward: RewardStack,
        respond: SamplingParams,
        config: PromptingConfig,
    ) -> None:
        self.prompter = prompter
        self.target = target
        self.reward = reward
        self.respond = respond
        self.config = config

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompter's input: meta-prompt and template around x."""
        return self.prompter.encode(prompt)

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        """Sample x → K rewrites → M responses to each."""
        return self.begin_rollout(engine, prompts, params, seeds)()

    def begin_rollout(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int],
        drawn: Sequence[Sequence[Completion]] | None = None,
    ) -> BegunRollout:
        """Sample the rewrites, and ask for the responses; what is returned awaits them.

        Components of the reward that wait begin with the responses to a rewrite as soon as they are there. In an environment
        of the user's own that has its own `score` they wait for that: only it knows what it will score.

        Args:
            engine: Has the prompter as ``policy``.
            prompts: P prompts.
            params: How rewrites are sampled; ``n`` is K.
            seeds: [P].
            drawn: [P][K]: the rewrites, if they have been sampled before.
        """
        if self.reward.refusal_kept is not None:
            learn_refusals(self.reward.refusal_kept, cast(Target, self.target), engine, prompts, self.respond)
        own_score = type(self).score is not PromptEnvironment.score
        with begun_scores(self.reward):
            begun = self.target.begin_rollout(
                engine,
                prompts,
                [self.encode(prompt) for prompt in prompts],
                decode=self.rewrite_of,
                rewrite=replace(params, stop_token_ids=self.prompter.stop_token_ids),
                respond=self.respond,
                seeds=seeds,
                drawn=drawn,
                on_answered=None if own_score else begin_scores(self.reward, prompts, self.target.text),
            )

        def finish() -> list[list[Chain]]:
            with begun_scores(self.reward):
                return begun()

        return BegunRollout(begun.samples, finish)

    def rewrite_of(self, prompt: Prompt, sample: Completion) -> str:
        """The text of a rewrite."""
        return self.prompter.decode(prompt, sample.text_tokens)

    def rewrites_of(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> list[list[str]]:
        """[P][K] the texts of the rewrites."""
        return [[self.rewrite_of(x, each.sample) for each in group] for x, group in zip(prompts, chains, strict=True)]

    def write_card(self, directory: Path, max_tokens: int) -> None:
        """Write the prompter's meta-prompt and memory, and how to use the prompter without this package."""
        write_card(directory, self.prompter, max_tokens)
        if self.prompter.memory is not None:
            write_memory(directory, self.prompter.memory.memory)

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> ResponseScores:
        """Average the rewards of the responses to each rewrite, scored against the original prompt."""
        refuse_errors(prompts, chains)
        rewrites = self.rewrites_of(prompts, chains)
        responses = [[[self.target.text(y) for y in c.responses] for c in group] for group in chains]
        scores = score_texts(
            prompts,
            rewrites,
            responses,
            self.reward,
            truncated=truncated_samples(chains),
            truncation_penalty=self.config.truncation_penalty,
            settled=settled_values([[c.responses for c in group] for group in chains]),
        )
        given: list[object] = [chain.target_prompt for group in chains for chain in group]
        flags = {
            "rewrite/empty": [each.empty for each in given if isinstance(each, SentRewrite)],
            "rewrite/over_long": [each.dropped > 0 for each in given if isinstance(each, SentRewrite)],
        }
        return replace(scores, metrics=scores.metrics | {name: sum(each) / len(each) for name, each in flags.items()})
