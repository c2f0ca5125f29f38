"""Each step's samples: drawn when the step begins, or one step ahead while the answers to the step before are awaited.

    step t, ahead = 0    sample t ~ ρ_t    await t                      score t    update: ρ_t → ρ_{t+1}
    step t, ahead = 1    sample t+1 ~ ρ_t, await t (t ~ ρ_{t−1})        score t    update: ρ_t → ρ_{t+1}

Ahead, the answers to t are computed by their server during the update of step t−1 and the sampling of t+1. Importance weights
ρ_t / ρ_{t−1} correct the gradient, see `alignpro.objectives.importance`. The first step has samples of its own policy, and the
last one draws none ahead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from alignpro.config import RunConfig
from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.engine import Chain, Completion, Engine, SamplingParams, derive_seed
from alignpro.environments.base import Environment
from alignpro.objectives import importance_weights
from alignpro.targets.base import BegunRollout
from alignpro.training.assignment import PromptAssignment
from alignpro.training.experience import Experience, sampled_logprob
from alignpro.training.stream import PromptStream

FILE_NAME = "ahead.json"
"""Of the samples that were drawn ahead, in a checkpoint."""


class BeginRollout(Protocol):
    """Samples rewrites and asks for the answers to them, as `PromptEnvironment.begin_rollout` does."""

    def __call__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int],
        drawn: Sequence[Sequence[Completion]] | None = None,
    ) -> BegunRollout:
        """Begin a rollout; ``drawn`` are the samples, if they have been drawn before."""


@dataclass(frozen=True)
class SamplingAhead:
    """Training on samples that are one update old."""

    begin: BeginRollout
    max_weight: float | None = None
    """Limit of the importance weights; None for no limit."""


@dataclass(frozen=True)
class Rollout:
    """This rank's part of a step."""

    local: list[int]
    """The indices of its prompts among those of the step, ascending."""
    prompts: list[Prompt]
    chains: list[list[Chain]]
    """[P][K]."""


@dataclass(frozen=True)
class _Drawn:
    """A step's samples of all ranks, as a checkpoint has them."""

    expected_length: float
    """By which the prompts were assigned to ranks."""
    samples: list[list[Completion]]
    """[P][K]."""


@dataclass(frozen=True)
class _Begun:
    """This rank's part of a step whose answers may still be awaited."""

    expected_length: float
    local: list[int]
    prompts: list[Prompt]
    rollout: BegunRollout


class Rollouts:
    """Draws the samples of each step; a sample's seed is derived from (run seed, step, prompt).

    Args:
        ranks: All ranks.
        environment: Rolls out.
        engine: Generates.
        assign: Which of a step's prompts this process takes.
        stream: The prompts of each step.
        sampling: Sampling parameters of the policy; ``n`` is K.
        run: Seed and number of steps.
        ahead: With it, each step's samples are drawn in the step before.
    """

    def __init__(
        self,
        ranks: Ranks,
        environment: Environment,
        engine: Engine,
        assign: PromptAssignment,
        stream: PromptStream,
        sampling: SamplingParams,
        run: RunConfig,
        ahead: SamplingAhead | None = None,
    ) -> None:
        self._ranks, self._environment, self._engine, self._assign = ranks, environment, engine, assign
        self._stream, self._sampling, self._run, self._ahead = stream, sampling, run, ahead
        self._begun: dict[int, _Begun] = {}
        self._drawn: dict[int, _Drawn] = {}

    def __call__(self, step: int) -> Rollout:
        """Return the samples of a step with their responses, and begin the next step's if samples are drawn ahead."""
        if self._ahead is None:
            local, own = self._assign(self._stream.batch(step), self._sampling.n)
            seeds = self._seeds(step, local)
            chains = self._environment.rollout(self._engine, own, self._sampling, seeds) if own else []
            return Rollout(local, own, chains)
        begun = self._begin(self._ahead, step)
        if step + 1 < self._run.steps:
            self._begin(self._ahead, step + 1)
        return Rollout(begun.local, begun.prompts, begun.rollout())

    def corrected(self, experience: Experience, chains: Sequence[Sequence[Chain]]) -> Experience:
        """Multiply all terms of a row by ρ_t / ρ_{t−1} if samples are drawn ahead: the policy that drew them is not the current.

        Args:
            experience: With the log-probabilities of the current policy, ρ_t.
            chains: The samples, with those of the distribution from which they were drawn.
        """
        if self._ahead is None:
            return experience
        mask = experience.batch.mask
        sampled = sampled_logprob(chains, mask)
        importance = importance_weights(experience.values.logprob, sampled, mask, self._ahead.max_weight)
        weights = importance.weights if experience.weights is None else importance.weights * experience.weights
        return replace(experience, weights=weights, importance=importance)

    def forget(self, step: int) -> None:
        """Drop the samples of a step that has been made; until then a checkpoint holds them."""
        self._begun.pop(step, None)

    def save(self, directory: Path) -> None:
        """Write the samples that were drawn ahead into a checkpoint; a collective if there can be any."""
        if self._ahead is None:
            return
        own = {
            step: (begun.expected_length, dict(zip(begun.local, begun.rollout.samples, strict=True)))
            for step, begun in self._begun.items()
        }
        parts = self._ranks.all_gather_object(own)
        with self._ranks.raise_together():
            if self._ranks.is_rank_zero:
                rows = [row for step in parts[0] if (row := self._row(step, parts)) is not None]
                (directory / FILE_NAME).write_text(json.dumps(rows), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Read what `save` wrote; the answers are asked for again in the step that needs them, with the same seeds."""
        self._begun, path = {}, directory / FILE_NAME
        rows = json.loads(path.read_text(encoding="utf-8")) if self._ahead is not None and path.is_file() else []
        self._drawn = {
            int(row["step"]): _Drawn(row["expected_length"], [list(map(_from_json, group)) for group in row["samples"]])
            for row in rows
        }

    def _seeds(self, step: int, local: Sequence[int]) -> list[int]:
        return [derive_seed(self._run.seed, step, i) for i in local]

    def _begin(self, ahead: SamplingAhead, step: int) -> _Begun:
        """Begin a step's rollout, unless it has begun."""
        if step not in self._begun:
            saved = self._drawn.pop(step, None)
            expected_length = self._assign.expected_length if saved is None else saved.expected_length
            local, prompts = self._assign(self._stream.batch(step), self._sampling.n, expected_length)
            drawn = None if saved is None else [saved.samples[i] for i in local]
            rollout = ahead.begin(self._engine, prompts, self._sampling, self._seeds(step, local), drawn)
            self._begun[step] = _Begun(expected_length, local, prompts, rollout)
        return self._begun[step]

    def _row(self, step: int, parts: Sequence[dict[int, Any]]) -> dict[str, Any] | None:
        """A step's samples of all ranks; None if a rank has not drawn its own, or one failed: then they are drawn anew."""
        samples = {i: group for part in parts if step in part for i, group in part[step][1].items()}
        failed = any(sample.error is not None for group in samples.values() for sample in group)
        if failed or len(samples) < self._stream.batch_size:
            return None
        groups = [[_to_json(sample) for sample in samples[i]] for i in sorted(samples)]
        return {"step": step, "expected_length": parts[0][step][0], "samples": groups}


def _to_json(sample: Completion) -> list[Any]:
    rest = list(sample.rest_tokens)
    return [sample.tokens, sample.logprobs, sample.finish_reason, sample.num_text_tokens, rest]


def _from_json(row: list[Any]) -> Completion:
    tokens, logprobs, finish_reason, num_text_tokens, rest = row
    return Completion(tokens, logprobs, finish_reason, num_text_tokens=num_text_tokens, rest_tokens=tuple(rest))
