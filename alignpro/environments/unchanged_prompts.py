"""The target's responses to prompts as they are, for a guard that compares with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams
from alignpro.environments.base import refuse_errors
from alignpro.rewards.refusal_kept import RefusalKept
from alignpro.rewards.refusals import refusal_rule
from alignpro.targets.base import Target
from alignpro.targets.completion import TextCompletion


def learn_refusals(
    guard: RefusalKept, target: Target, engine: Engine, prompts: Sequence[Prompt], respond: SamplingParams
) -> list[Completion]:
    """Let a guard know whether the target refuses the prompts as they are, of those that it does not know yet.

    One greedy response is asked for: it depends on no seed, so it is the same on every rank and after a resume. A response that
    a server's content filter refused counts as a refusal.

    Args:
        guard: The guard.
        target: Responds.
        engine: Has the target, if it is a model of this process.
        prompts: The prompts of a rollout.
        respond: How long a response may be.

    Returns:
        The responses that were asked for, one to each prompt of ``guard.unknown(prompts)``.

    Raises:
        TrainingError: The target cannot respond to a prompt.
    """
    unknown = guard.unknown(prompts)
    greedy = replace(respond, n=1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    sent = [target.encode(prompt, None) for prompt in unknown]
    groups = target.respond(engine, sent, greedy, [0] * len(unknown))
    refuse_errors(unknown, [[Chain(sample) for sample in group] for group in groups])
    responses = [sample for (sample,) in groups]
    guard.learn(unknown, [_refuses(target, sample) for sample in responses])
    return responses


def _refuses(target: Target, response: Completion) -> bool:
    filtered = isinstance(response, TextCompletion) and response.outcome == "filtered"
    return filtered or refusal_rule(target.text(response)) is not None
