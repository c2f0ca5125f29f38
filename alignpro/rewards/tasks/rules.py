"""Tasks whose rule depends on the prompt: each kind of prompt has a reward of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from alignpro.data import Prompt

TaskReward = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
"""The reward of each response to its prompt."""


def by_rule(
    rules: Mapping[str, TaskReward], kind: Callable[[str], str], prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[float]:
    """Score each response by the rule for its prompt.

    Args:
        rules: Kind of prompt → its reward.
        kind: Returns the kind of a prompt's text.
        prompts: The prompts.
        responses: A response to each.
    """
    pairs = zip(prompts, responses, strict=True)
    return [rules[kind(prompt.text)]([prompt], [response])[0] for prompt, response in pairs]
