"""The candidates of calibrated self-reward: rewrites that grow sentence by sentence, in beams that keep both ends of the order.

| owns | does not own |
|---|---|
| beginnings with their scores, which are kept, which become candidates | how sentences are drawn or scored |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignpro.engine import Completion
from alignpro.theory import sentence_scores


@dataclass(frozen=True)
class Candidate:
    """A rewrite, or the beginning of one."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Of each token under the distribution it was drawn from, in nats."""
    scores: tuple[float, ...] = ()
    """Of each sentence but the last while that is not scored, in [0, 1]."""
    ended: bool = False
    """Whether its last token is an end token."""
    last: int = 0
    """Number of tokens of its last sentence."""

    @property
    def score(self) -> float:
        """The sum over its sentences divided by their number: what candidates are ordered by; ½ before the first."""
        return sum(self.scores) / len(self.scores) if self.scores else 0.5

    @property
    def own_logprob(self) -> float:
        """Log-likelihood of the last sentence, in nats."""
        return sum(self.logprobs[len(self.logprobs) - self.last :])

    def grown(self, sentence: Completion, ends: frozenset[int]) -> Candidate:
        """The candidate with one sentence more, which is not scored yet.

        Args:
            sentence: What was drawn after it.
            ends: The ids that end a rewrite.
        """
        return Candidate(
            (*self.tokens, *sentence.tokens),
            (*self.logprobs, *sentence.logprobs),
            self.scores,
            ended=sentence.finish_reason == "stop" and sentence.tokens[-1] in ends,
            last=len(sentence.tokens),
        )

    def completion(self) -> Completion:
        """The candidate as the engine would return it."""
        return Completion(list(self.tokens), list(self.logprobs), "stop" if self.ended else "length")


class Beams:
    """The beginnings of one prompt's rewrites.

    Args:
        width: Beginnings that are kept after each sentence.
        alpha: α, the weight of the external scorer.
    """

    def __init__(self, width: int, alpha: float) -> None:
        self._width, self._alpha = width, alpha
        self.live: list[Candidate] = [Candidate()]
        """Those that go on."""
        self.finished: list[Candidate] = []
        """Those that have ended."""

    def advance(self, drawn: Sequence[Candidate], external: Sequence[float]) -> None:
        """Score what has grown by a sentence, and keep the best and the worst of it.

        Args:
            drawn: Different beginnings, as `Candidate.grown` returns them; at least one.
            external: What the external scorer gives to each; of no matter if α is 0.
        """
        own = torch.tensor([each.own_logprob for each in drawn], dtype=torch.float64)
        scores = sentence_scores(torch.tensor(external, dtype=torch.float64), own, self._alpha).tolist()
        scored = [
            Candidate(each.tokens, each.logprobs, (*each.scores, score), each.ended, each.last)
            for each, score in zip(drawn, scores, strict=True)
        ]
        self.finished += [each for each in scored if each.ended]
        self.live = extremes([each for each in scored if not each.ended], self._width)

    def chosen(self, count: int) -> list[Candidate]:
        """The candidates that are trained on: half the best, half the worst, best first; repeated if there are too few."""
        found = extremes([*self.finished, *self.live], count)
        return [found[i * len(found) // count] for i in range(count)]


def different(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates without those that repeat the tokens of an earlier one."""
    found: dict[tuple[int, ...], Candidate] = {}
    for each in candidates:
        found.setdefault(each.tokens, each)
    return list(found.values())


def extremes(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """At most ``count`` candidates, best first: the best half (the larger, if ``count`` is odd) and the worst half."""
    ordered = sorted(candidates, key=lambda each: -each.score)
    if len(ordered) <= count:
        return ordered
    worst = count // 2
    return ordered[: count - worst] + (ordered[-worst:] if worst else [])
