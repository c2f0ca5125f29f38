"""A rewrite by rule, such as a hand-written instruction: every prompt is rewritten alike, and nothing is sampled but y."""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams
from alignpro.environments.base import (
    ResponseScores,
    begin_scores,
    begun_scores,
    refuse_errors,
    score_texts,
    settled_values,
)
from alignpro.environments.unchanged_prompts import learn_refusals
from alignpro.prompting.rewrite_template import RewriteTemplate
from alignpro.rewards import RewardStack
from alignpro.targets.base import Target


class InstructionEnvironment:
    """The frozen target responds to prompts that a template has rewritten, as if a prompter always wrote just that.

    Args:
        template: x → x'.
        target: The target.
        reward: r*(x, y), with its guards on (x, x').
    """

    def __init__(self, template: RewriteTemplate, target: Target, reward: RewardStack) -> None:
        self.template = template
        self.target = target
        self.reward = reward

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        """Rewrite each prompt, and sample ``params.n`` responses: [P][1] chains."""
        if self.reward.refusal_kept is not None:
            learn_refusals(self.reward.refusal_kept, self.target, engine, prompts, params)
        rewrites = [self.template(prompt.text) for prompt in prompts]
        sent = [self.target.encode(prompt, rewrite) for prompt, rewrite in zip(prompts, rewrites, strict=True)]
        begin = begin_scores(self.reward, prompts, self.target.text)
        told = None if begin is None else lambda i, responses: begin(i, rewrites[i], responses)
        with begun_scores(self.reward):
            responses = self.target.respond(engine, sent, params, seeds, told)
        return [[Chain(Completion([], [], "stop"), responses=group)] for group in responses]

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> ResponseScores:
        """Score each response against the original prompt."""
        refuse_errors(prompts, chains)
        return score_texts(
            prompts,
            [[self.template(prompt.text)] for prompt in prompts],
            [[[self.target.text(y) for y in chain.responses] for chain in group] for group in chains],
            self.reward,
            settled=settled_values([[chain.responses for chain in group] for group in chains]),
        )
