"""A sampled sequence, and the chain that it is part of: x → K rewrites → M responses to each.

| owns | does not own |
|---|---|
| what has been drawn, what a finished sequence leads to | memory, when anything runs |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Literal

from alignpro.engine.faults import described
from alignpro.engine.pool import Segment
from alignpro.engine.prefix_tree import Node
from alignpro.engine.sampler import derive_seed
from alignpro.engine.types import Chain, Completion, SamplingParams
from alignpro.errors import AlignProError

logger = logging.getLogger(__name__)

_OF_ADAPTER = 1 << 40
"""Added to tokens that an adapter acts on, which are none of the base's."""

ToTarget = Callable[[int, Completion], list[int]]
"""(index of the prompt, the policy's sample) → the target's prompt tokens."""


@dataclass(eq=False)
class SampledSequence:
    """One completion in the making.

    Its tokens do not depend on when it runs, on what, or on how often it is preempted: position t draws from (seed, t).
    """

    model: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    origin: tuple[int, ...] = ()
    """Which prompt, sample and response it is."""
    drawn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    completion: Completion | None = None
    """Once it has ended."""
    lane: str = ""
    """The model in whose forward passes it runs: its own, or one that is the same but for an adapter."""
    base: str | None = None
    """The model that computes the first ``shared`` tokens of the prompt, where that is another one."""
    shared: int = 0
    node: Node | None = None
    """Where its prompt ends in the prefix tree, while it runs."""
    own: Segment | None = None
    """Its drawn tokens and their pages, while it runs."""
    preempted: bool = False
    """Whether what it has to compute was computed before."""
    needs_empty_pool: bool = False
    """Whether it was the only one running when pages ran out."""

    @property
    def cache_key(self) -> tuple[str, tuple[int, ...]]:
        """Model and prompt, such that what two prompts have in common in the cache begins alike."""
        if self.base is None:
            return self.model, self.prompt
        own = tuple(token + _OF_ADAPTER for token in self.prompt[self.shared :])
        return self.base, self.prompt[: self.shared] + own

    def end(self, reason: Literal["stop", "length"], kept: int | None = None) -> None:
        """Take what was drawn as the completion."""
        self.completion = Completion(self.drawn, self.logprobs, reason, kept=kept)

    def fail(self, error: str) -> None:
        """It cannot be run; nothing of it is kept."""
        self.completion = Completion([], [], "error", error)


def siblings(
    model: str, prompt: Sequence[int], params: SamplingParams, seed: int, origin: tuple[int, ...]
) -> list[SampledSequence]:
    """The ``params.n`` completions of a prompt; number k draws from (seed, k)."""
    tokens = tuple(map(index, prompt))
    return [SampledSequence(model, tokens, params, derive_seed(seed, k), (*origin, k)) for k in range(params.n)]


@dataclass
class ChainRun:
    """Two-stage chains: a rewrite that ends becomes a prompt of the target at once.

    Response m to rewrite k of a prompt draws from (the prompt's seed, "respond", k, m).
    """

    policy: str
    target: str
    rewrite: SamplingParams
    respond: SamplingParams
    to_target: ToTarget
    seeds: Sequence[int]
    chains: dict[tuple[int, int], Chain] = field(default_factory=dict)
    responses: dict[tuple[int, int], list[SampledSequence]] = field(default_factory=dict)

    def first(self, prompts: Sequence[Sequence[int]]) -> list[SampledSequence]:
        """The sequences of the first stage."""
        return [
            sequence
            for i, prompt in enumerate(prompts)
            for sequence in siblings(self.policy, prompt, self.rewrite, self.seeds[i], (i,))
        ]

    def after(self, sequence: SampledSequence) -> list[SampledSequence]:
        """What a sequence that has ended leads to: for a rewrite, its M responses, which may have failed already."""
        sample = sequence.completion
        assert sample is not None
        if len(sequence.origin) != 2:  # a response
            return []
        i, k = sequence.origin
        chain = self.chains[i, k] = Chain(sample)
        problem = None
        if sample.error is not None:
            problem = f"there is no sample to respond to: {sample.error}"
        else:
            try:
                chain.target_tokens = [index(token) for token in self.to_target(i, sample)]
            except AlignProError as error:
                problem = f"the sample cannot be given to {self.target}: {error}"
            except Exception as error:  # a fault of the callback, of this chain alone too
                logger.exception("to_target failed on a sample of prompt %d", i)
                problem = f"the sample cannot be given to {self.target}: {described('to_target', error)}"
        seed = derive_seed(self.seeds[i], "respond", k)
        responses = siblings(self.target, chain.target_tokens, self.respond, seed, (i, k))
        if problem:
            for response in responses:
                response.fail(problem)
        self.responses[i, k] = responses
        return responses

    def result(self) -> list[list[Chain]]:
        """The chains of each prompt, with what their sequences became."""
        groups: list[list[Chain]] = [[] for _ in self.seeds]
        for (i, k), chain in sorted(self.chains.items(), key=lambda item: item[0]):
            chain.responses = [completed(response) for response in self.responses[i, k]]
            groups[i].append(chain)
        return groups


def completed(sequence: SampledSequence) -> Completion:
    """The completion of a sequence that has ended."""
    assert sequence.completion is not None
    return sequence.completion
