"""Two-stage chains: prompt x → K rewrites → M responses to each.

| owns | does not own |
|---|---|
| what follows a rewrite, the chains of a run | when anything runs |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from alignpro.engine.faults import describe
from alignpro.engine.sampler import derive_seed
from alignpro.engine.sequence import OnCompletion, Request
from alignpro.engine.types import Chain, Completion, HasTokens, SamplingParams, token_ids
from alignpro.errors import AlignProError

logger = logging.getLogger(__name__)

ToTarget = Callable[[int, Completion], HasTokens]
"""(prompt index, the policy's sample) → the target's prompt."""

OnChain = Callable[[int, Chain], None]
"""(prompt index, a chain whose responses have all ended)"""


class Submit(Protocol):
    """Queues a request."""

    def __call__(
        self,
        name: str,
        prompt: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        *,
        on_completion: OnCompletion | None = None,
    ) -> Request: ...


_Parts = tuple[Completion, HasTokens | None, Request | list[Completion]]


@dataclass
class ChainRun:
    """The chains of one run. A rewrite becomes a request for its responses as soon as it ends.

    Response m to rewrite k of a prompt draws from (the prompt's seed, "respond", k, m).
    """

    target: str
    respond: SamplingParams
    to_target: ToTarget
    seeds: Sequence[int]
    """One per prompt."""
    submit: Submit
    on_chain: OnChain | None = None
    """Called with each chain as soon as its responses have ended."""
    responses: list[Request] = field(default_factory=list)
    """The requests submitted so far."""
    _parts: dict[tuple[int, int], _Parts] = field(default_factory=dict)

    def add_sample(self, i: int, k: int, sample: Completion) -> None:
        """Request the responses to rewrite k of prompt i; if there can be none, they are errors that state the reason."""
        if sample.error is not None:
            self._fail(i, k, sample, f"there is no sample to respond to: {sample.error}")
            return
        refusal = f"the sample cannot be given to {self.target}"
        try:
            prompt = self.to_target(i, sample)
            tokens = token_ids(prompt.tokens)
        except AlignProError as error:
            self._fail(i, k, sample, f"{refusal}: {error}")
        except Exception as error:  # a bug in the callback also fails only this chain
            logger.exception("to_target failed on a sample of prompt %d", i)
            self._fail(i, k, sample, f"{refusal}: {describe('to_target', error)}")
        else:
            seed = derive_seed(self.seeds[i], "respond", k)
            tell = None if self.on_chain is None else self._countdown(i, k)
            request = self.submit(self.target, tokens, self.respond, seed, on_completion=tell)
            self.responses.append(request)
            self._parts[i, k] = sample, prompt, request

    def _countdown(self, i: int, k: int) -> OnCompletion:
        """What is called with each response to a rewrite, and tells of the chain at the last."""
        left = self.respond.n

        def ended(_: int, response: Completion) -> None:
            nonlocal left
            left -= 1
            if left == 0 and self.on_chain is not None:
                self.on_chain(i, self._chain(i, k))

        return ended

    def _chain(self, i: int, k: int) -> Chain:
        sample, prompt, responses = self._parts[i, k]
        return Chain(sample, prompt, responses.completions if isinstance(responses, Request) else responses)

    def _fail(self, i: int, k: int, sample: Completion, problem: str) -> None:
        responses = [Completion([], [], "error", problem) for _ in range(self.respond.n)]
        self._parts[i, k] = sample, None, responses
        if self.on_chain is not None:
            self.on_chain(i, self._chain(i, k))

    def result(self) -> list[list[Chain]]:
        """The chains of each prompt, once all requests have finished."""
        groups: list[list[Chain]] = [[] for _ in self.seeds]
        for i, k in sorted(self._parts):
            groups[i].append(self._chain(i, k))
        return groups
