"""A request and the sequences sampled for it.

| owns | does not own |
|---|---|
| what was asked for, the tokens sampled so far | memory, scheduling, what follows a finished sequence |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from alignpro.engine.pool import Segment
from alignpro.engine.prefix_tree import Node
from alignpro.engine.sampler import derive_seed
from alignpro.engine.types import Completion, SamplingParams, TokenLogprobs

_OF_ADAPTER = 1 << 40
"""Offset of the tokens that an adapter acts on, which keeps them distinct from the base model's tokens."""

OnCompletion = Callable[[int, Completion], None]
"""(index of the sequence in its request, its completion)"""


@dataclass(eq=False)
class Request:
    """A prompt and the ``params.n`` sequences sampled from it: the handle that `Engine.submit` returns.

    Sequence k draws from (``seed``, k), so what is sampled depends neither on when it runs nor on other requests.
    """

    model: str
    prompt: tuple[int, ...]
    """Token ids; −1 for the placeholders of a soft prompt."""
    params: SamplingParams
    seed: int
    arrival: int
    """Position in the order of arrival; the follow-ups of a request have the same."""
    forward_model: str
    """The model in whose forward passes it runs: its own, or one that differs only in an adapter."""
    base: str | None = None
    """The model that computes the first ``num_base_tokens`` tokens of the prompt, if it is a different one."""
    num_base_tokens: int = 0
    on_completion: OnCompletion | None = None
    """Called with each completion, within the step in which its sequence ends."""
    sequences: list[SampledSequence] = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = [SampledSequence(self, k, derive_seed(self.seed, k)) for k in range(self.params.n)]

    @property
    def finished(self) -> bool:
        """Whether all its sequences have ended."""
        return all(sequence.completion is not None for sequence in self.sequences)

    @property
    def completions(self) -> list[Completion]:
        """The n completions.

        Raises:
            ValueError: It has not finished.
        """
        completions = [sequence.completion for sequence in self.sequences if sequence.completion is not None]
        if len(completions) < len(self.sequences):
            raise ValueError("the request has not finished: call Engine.step until it has")
        return completions

    @property
    def cache_key(self) -> tuple[str, tuple[int, ...]]:
        """Model and prompt tokens, encoded so that two prompts share a cached prefix exactly if their keys do."""
        if self.base is None:
            return self.model, self.prompt
        own = tuple(token + _OF_ADAPTER for token in self.prompt[self.num_base_tokens :])
        return self.base, self.prompt[: self.num_base_tokens] + own


class UnreadTokens(Protocol):
    """Where the tokens are that sequences have drawn and nobody has read yet."""

    def read_tokens(self, sequence: SampledSequence) -> None:
        """Append them, and their log-probabilities, to the lists of a sequence."""


@dataclass(eq=False)
class SampledSequence:
    """A completion in progress.

    Its tokens do not depend on when it runs, what it is batched with, or how often it is preempted: position t draws from
    (seed, t).
    """

    request: Request
    index: int
    """Its place among the sequences of the request."""
    seed: int
    completion: Completion | None = None
    """Set once the sequence has ended."""
    node: Node | None = None
    """The prefix-tree node at which its prompt ends, while it runs."""
    output: Segment | None = None
    """The segment of its sampled tokens, while it runs. Once it decodes, all of them but the last are computed between
    steps; its ``tokens`` are those that have been read, and its ``computed`` is not updated any more."""
    row: int = 0
    """Its row in the `SequenceTable`, while it runs."""
    unread: UnreadTokens | None = None
    """Where the tokens are that ``read_ids`` lacks, while it runs."""
    read_ids: list[int] = field(default_factory=list)
    """The sampled tokens that have been read."""
    read_logprobs: list[float] = field(default_factory=list)
    """Their log-probabilities."""
    model_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of each sampled token, whether it has been read or not; empty if nobody asks."""
    num_cached_tokens: int = 0
    """Prompt tokens that were already computed when it was first admitted."""
    num_preemptions: int = 0
    needs_empty_pool: bool = False
    """Whether it was the only running sequence when pages ran out."""

    @property
    def output_ids(self) -> list[int]:
        """The sampled tokens."""
        if self.unread is not None:
            self.unread.read_tokens(self)
        return self.read_ids

    @property
    def logprobs(self) -> list[float]:
        """Their log-probabilities."""
        if self.unread is not None:
            self.unread.read_tokens(self)
        return self.read_logprobs

    @property
    def last_segment(self) -> Segment:
        """The segment at whose end it draws its next token, while it runs."""
        end = self.output if self.output_ids else self.node
        assert end is not None
        return end

    @property
    def model(self) -> str:
        """Name of the model that it is sampled from."""
        return self.request.model

    @property
    def forward_model(self) -> str:
        """The model in whose forward passes it runs."""
        return self.request.forward_model

    @property
    def params(self) -> SamplingParams:
        """How it is sampled, and where it ends."""
        return self.request.params

    def end(
        self,
        reason: Literal["stop", "length", "cancelled"],
        num_text_tokens: int | None = None,
        rest_tokens: tuple[int, ...] = (),
    ) -> None:
        """Complete the sequence with the tokens sampled so far."""
        self.completion = Completion(
            self.output_ids,  # which reads log-probabilities as well
            self.read_logprobs,
            reason,
            num_text_tokens=num_text_tokens,
            rest_tokens=rest_tokens,
            model_logprobs=self.model_logprobs,
        )

    def fail(self, error: str) -> None:
        """Complete the sequence with an error, discarding its tokens."""
        self.completion = Completion([], [], "error", error)
