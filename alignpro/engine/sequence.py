"""A sampled sequence and the chain it is part of: prompt x → K rewrites → M responses to each.

| owns | does not own |
|---|---|
| drawn tokens, the follow-ups of a finished sequence | memory, scheduling |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Literal

from alignpro.engine.faults import describe
from alignpro.engine.pool import Segment
from alignpro.engine.prefix_tree import Node
from alignpro.engine.sampler import derive_seed
from alignpro.engine.types import Chain, Completion, SamplingParams
from alignpro.errors import AlignProError

logger = logging.getLogger(__name__)

_OF_ADAPTER = 1 << 40
"""Offset of the tokens that an adapter acts on, which keeps them distinct from the base model's tokens."""

ToTarget = Callable[[int, Completion], list[int]]
"""(prompt index, the policy's sample) → the target's prompt tokens."""


@dataclass(eq=False)
class SampledSequence:
    """A completion in progress.

    Its tokens do not depend on when it runs, what it is batched with, or how often it is preempted: position t draws from
    (seed, t).
    """

    model: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    origin: tuple[int, ...] = ()
    """Indices of its prompt, sample and response, as far as they apply."""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    completion: Completion | None = None
    """Set once the sequence has ended."""
    forward_model: str = ""
    """The model in whose forward passes it runs: its own, or one that differs only in an adapter."""
    base: str | None = None
    """The model that computes the first ``num_base_tokens`` tokens of the prompt, if it is a different one."""
    num_base_tokens: int = 0
    node: Node | None = None
    """The prefix-tree node at which its prompt ends, while it runs."""
    output: Segment | None = None
    """Its drawn tokens and their pages, while it runs."""
    preempted: bool = False
    """Whether it has been preempted, so that its tokens are recomputed."""
    needs_empty_pool: bool = False
    """Whether it was the only running sequence when pages ran out."""

    @property
    def cache_key(self) -> tuple[str, tuple[int, ...]]:
        """Model and prompt tokens, encoded so that two prompts share a cached prefix exactly if their keys do."""
        if self.base is None:
            return self.model, self.prompt
        own = tuple(token + _OF_ADAPTER for token in self.prompt[self.num_base_tokens :])
        return self.base, self.prompt[: self.num_base_tokens] + own

    def end(self, reason: Literal["stop", "length"], num_text_tokens: int | None = None) -> None:
        """Complete the sequence with the tokens drawn so far."""
        self.completion = Completion(self.output_ids, self.logprobs, reason, num_text_tokens=num_text_tokens)

    def fail(self, error: str) -> None:
        """Complete the sequence with an error, discarding its tokens."""
        self.completion = Completion([], [], "error", error)


def siblings(
    model: str, prompt: Sequence[int], params: SamplingParams, seed: int, origin: tuple[int, ...]
) -> list[SampledSequence]:
    """The ``params.n`` sequences of a prompt; sequence k draws from (seed, k)."""
    tokens = tuple(map(index, prompt))
    return [SampledSequence(model, tokens, params, derive_seed(seed, k), (*origin, k)) for k in range(params.n)]


@dataclass
class ChainRun:
    """Two-stage chains: each rewrite becomes a prompt of the target as soon as it ends.

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
        """The follow-ups of a finished sequence: for a rewrite its M responses, some of which may have failed already."""
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
            except Exception as error:  # a bug in the callback also fails only this chain
                logger.exception("to_target failed on a sample of prompt %d", i)
                problem = f"the sample cannot be given to {self.target}: {describe('to_target', error)}"
        seed = derive_seed(self.seeds[i], "respond", k)
        responses = siblings(self.target, chain.target_tokens, self.respond, seed, (i, k))
        if problem:
            for response in responses:
                response.fail(problem)
        self.responses[i, k] = responses
        return responses

    def result(self) -> list[list[Chain]]:
        """The chains of each prompt with their completions."""
        groups: list[list[Chain]] = [[] for _ in self.seeds]
        for (i, k), chain in sorted(self.chains.items(), key=lambda item: item[0]):
            chain.responses = [completed(response) for response in self.responses[i, k]]
            groups[i].append(chain)
        return groups


def completed(sequence: SampledSequence) -> Completion:
    """The completion of a sequence that has ended."""
    assert sequence.completion is not None
    return sequence.completion
