"""The generation cases: chains of both models, or sequences of the target only, always to their full lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.workload import BARE, GPU, PAPER, QUICK, ModelShape, Workload


@dataclass(frozen=True)
class Case:
    """A measurement."""

    workload: Workload
    title: str
    chain: bool
    """Whether to run both stages; otherwise the target gives ``workload.M`` responses to each of its prompts."""
    needs_gpu: bool = False
    given: tuple[tuple[int, ...], ...] = ()
    """The ids of real prompts, of which every round takes the next ``workload.prompts``; if empty, prompts are random."""

    @property
    def name(self) -> str:
        """The name of the workload."""
        return self.workload.name

    @property
    def shapes(self) -> dict[str, ModelShape]:
        """Name → model."""
        target = {"target": self.workload.target}
        return {"policy": self.workload.prompter} | target if self.chain else target

    @property
    def context(self) -> int:
        """The length of the longest sequence in tokens."""
        w = self.workload
        longest = max(map(len, self.given), default=w.prompter_input if self.chain else w.prompt)
        if not self.chain:
            return longest + w.response
        return max(longest + w.rewrite, w.target_input + w.response)

    @property
    def prefill(self) -> int:
        """The number of prompt tokens that the first stage computes in a round, if those of equal beginnings are shared."""
        w = self.workload
        if self.given:
            prompts = self.given[: w.prompts]
            return len({prompt[:length] for prompt in prompts for length in range(1, len(prompt) + 1)})
        return w.prompts * w.prompt + (w.meta_prompt if self.chain else 0)

    @property
    def expected(self) -> dict[str, int]:
        """Model → number of tokens that it generates."""
        w = self.workload
        if not self.chain:
            return {"target": w.chains * w.response}
        return {"policy": w.prompts * w.K * w.rewrite, "target": w.chains * w.response}

    @property
    def sequences(self) -> int:
        """The number of responses."""
        return self.workload.chains


def _alone(name: str, prompts: int, response: int) -> Workload:
    return replace(BARE, name=name, prompts=prompts, prompt=64, response=response, K=1, M=1)


CASES = (
    Case(PAPER, "paper: chains with a meta-prompt and a template", chain=True),
    Case(BARE, "bare: chains of prompts alone", chain=True),
    Case(_alone("unshared", 64, 64), "unshared: 64 prompts that have nothing in common", chain=False),
    Case(_alone("single", 1, 64), "single: one sequence", chain=False),
    Case(_alone("decode256", 256, 32), "decode256: 256 sequences at once", chain=False),
    Case(GPU, "gpu: chains of a 1.5B prompter and an 8B target", chain=True, needs_gpu=True),
)


def shrink(case: Case) -> Case:
    """Return a tiny version of a case, for a smoke test."""
    counts = ("meta_prompt", "template", "prompts", "K", "M")
    limited = {name: min(getattr(case.workload, name), getattr(QUICK, name)) for name in counts}
    return replace(case, workload=replace(QUICK, name=case.name, **limited), needs_gpu=False)


@dataclass(frozen=True)
class Inputs:
    """Token ids of a case, the same for all entrants."""

    case: Case
    seed: int
    meta_prompt: list[int]
    before: list[int]
    after: list[int]

    def prompts(self, turn: int) -> list[list[int]]:
        """Return the prompts of a round. Random ones are unique to it, so that no entrant has cached them."""
        w, generator = self.case.workload, random.Random(f"{self.seed} {turn}")
        if given := self.case.given:
            first = turn * w.prompts
            return [list(given[i % len(given)]) for i in range(first, first + w.prompts)]
        vocabulary = (w.prompter if self.case.chain else w.target).vocabulary
        return [self.meta_prompt + _tokens(generator, w.prompt, vocabulary) for _ in range(w.prompts)]

    def to_target(self, rewrite: Sequence[int]) -> list[int]:
        """Return the target's prompt: its template around the rewrite."""
        vocabulary = self.case.workload.target.vocabulary
        return [*self.before, *(token % vocabulary for token in rewrite), *self.after]


def make_inputs(case: Case, seed: int) -> Inputs:
    """Draw the random tokens of a case."""
    generator, w = random.Random(seed), case.workload
    vocabulary = w.target.vocabulary
    return Inputs(
        case,
        seed,
        _tokens(generator, w.meta_prompt, w.prompter.vocabulary),
        _tokens(generator, w.before, vocabulary),
        _tokens(generator, w.after, vocabulary),
    )


def _tokens(generator: random.Random, count: int, vocabulary: int) -> list[int]:
    return [generator.randrange(vocabulary) for _ in range(count)]
