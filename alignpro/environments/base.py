"""What every environment does: the protocol, and scores of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from alignpro.config import SamplingConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams
from alignpro.errors import AlignProError, TrainingError
from alignpro.rewards import RewardStack, Scored
from alignpro.targets.base import Answered
from alignpro.targets.completion import TextCompletion

ABSTAINED = "/abstained"
"""Ending of the metric that says from what share of the samples a component of the reward abstained."""


@dataclass
class Scores:
    """The scores of P prompts × K samples."""

    values: Tensor
    """(P, K) float32: R of each sample, which the policy is trained to raise."""
    samples: list[list[str]]
    """[P][K]: the policy's samples, as text."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means over the samples, to be logged: such as the reward's components, or the share of truncated samples."""

    def texts(self, p: int, k: int) -> dict[str, Any]:
        """Return what is logged of one sample, serializable as JSON."""
        return {"sample": self.samples[p][k]}


@dataclass
class ResponseScores(Scores):
    """Scores that are means over M responses y to each sample; in RLHF the sample is its own response."""

    rewards: Tensor = field(kw_only=True)
    """(P, K, M) float32: r*(x, y), with component weights and guard penalties applied."""
    raw: Tensor = field(kw_only=True)
    """(P, K, M) float32: the same without guard penalties."""
    penalised: Tensor = field(kw_only=True)
    """(P, K, M) float32: the same with guard and truncation penalties; its means over M are ``values``."""
    responses: list[list[list[str]]] = field(kw_only=True)
    """[P][K][M]: the responses that were scored, as text."""

    def texts(self, p: int, k: int) -> dict[str, Any]:
        """Return what is logged of one sample."""
        return super().texts(p, k) | {"responses": self.responses[p][k]}


class Environment(Protocol):
    """Turns prompts into scored samples."""

    def encode(self, prompt: Prompt) -> list[int]:
        """The policy's input for this prompt."""

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        """Sample ``params.n`` chains per prompt."""

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> Scores:
        """Score the chains."""

    def write_card(self, directory: Path, max_tokens: int) -> None:
        """Write beside the saved policy how to use it; ``max_tokens`` limits a sample."""


def score_texts(
    prompts: Sequence[Prompt],
    rewrites: Sequence[Sequence[str]] | None,
    responses: Sequence[Sequence[Sequence[str]]],
    reward: RewardStack,
    *,
    truncated: Tensor | None = None,
    truncation_penalty: float = 0.0,
    settled: Mapping[int, float] | None = None,
) -> ResponseScores:
    """Score P prompts × K rewrites × M responses given as text.

    Args:
        prompts: The original prompts.
        rewrites: [P][K], for the guards; None if nothing was rewritten.
        responses: [P][K][M].
        reward: The reward.
        truncated: (P, K) bool: samples that reached their token limit.
        truncation_penalty: Subtracted from the value of truncated samples.
        settled: Place among the P·K·M responses → the value of a response that is not scored (`settled_values`).

    Raises:
        RewardError: A component of the reward failed; the message names the prompt.
    """
    K, M = len(responses[0]), len(responses[0][0])
    index = [(p, k, m) for p in range(len(prompts)) for k in range(K) for m in range(M)]
    settled = settled or {}
    kept = [place for i, place in enumerate(index) if i not in settled]
    scored = reward(
        [prompts[p] for p, _, _ in kept],
        [responses[p][k][m] for p, k, m in kept],
        None if rewrites is None else [rewrites[p][k] for p, k, _ in kept],
    )
    if settled:
        scored = _with_settled(scored, settled, len(index))
    rewards = torch.tensor(scored.values, dtype=torch.float32).view(len(prompts), K, M)
    raw = torch.tensor(scored.raw, dtype=torch.float32).view(len(prompts), K, M)
    values, penalised = rewards.mean(-1), rewards
    metrics = _component_metrics(scored.components)
    if truncated is not None:
        values = values - truncation_penalty * truncated
        penalised = rewards - truncation_penalty * truncated[..., None]
        metrics["sample/truncated"] = truncated.float().mean().item()
    return ResponseScores(
        values,
        [list(group) for group in rewrites or []],
        metrics,
        rewards=rewards,
        raw=raw,
        penalised=penalised,
        responses=[[list(each) for each in group] for group in responses],
    )


def begin_scores(reward: RewardStack, prompts: Sequence[Prompt], text: Callable[[Completion], str]) -> Answered | None:
    """What a target is given, so that the reward begins with responses as soon as they are there; None if none of it waits.

    Args:
        reward: The reward.
        prompts: The prompts of the rollout, which are scored later.
        text: A response's text.
    """
    if not reward.begins_early:
        return None

    def begin(i: int, rewrite: str | None, responses: Sequence[Completion]) -> None:
        if all(response.error is None for response in responses):  # otherwise nothing will be scored
            reward.begin(prompts[i], [text(each) for each in responses if _value(each) is None], rewrite)

    return begin


@contextmanager
def begun_scores(reward: RewardStack) -> Iterator[None]:
    """Of a rollout that fails, let the reward drop what it has begun."""
    try:
        yield
    except BaseException:
        reward.forget_begun()
        raise


def settled_values(responses: Sequence[Sequence[Sequence[Completion]]]) -> dict[int, float]:
    """Return place among the P·K·M responses → value, of the responses whose value does not depend on their text.

    Args:
        responses: [P][K][M].
    """
    every = [response for group in responses for each in group for response in each]
    return {i: value for i, response in enumerate(every) if (value := _value(response)) is not None}


def _value(response: Completion) -> float | None:
    """The value of a response that is not scored."""
    return response.value if isinstance(response, TextCompletion) else None


def _with_settled(scored: Scored, settled: Mapping[int, float], count: int) -> Scored:
    """Put settled values in their places; the reward's components abstain there."""

    def spread(values: Sequence[float]) -> list[float]:
        of_others = iter(values)
        return [settled[i] if i in settled else next(of_others) for i in range(count)]

    def abstaining(values: Sequence[float | None]) -> list[float | None]:
        of_others = iter(values)
        return [None if i in settled else next(of_others) for i in range(count)]

    components = {name: abstaining(values) for name, values in scored.components.items()}
    return Scored(spread(scored.values), spread(scored.raw), components)


def _component_metrics(components: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Average each component over the samples that it scored; count those from which it abstained, if there are any."""
    metrics: dict[str, float] = {}
    for name, values in components.items():
        known = [value for value in values if value is not None]
        if known:
            metrics[f"reward/{name}"] = sum(known) / len(known)
        if len(known) < len(values):
            metrics[f"reward/{name}{ABSTAINED}"] = 1 - len(known) / len(values)
    return metrics


def sampling_params(config: SamplingConfig, n: int) -> SamplingParams:
    """Convert the configuration to the engine's parameters; templates add their stop tokens."""
    return SamplingParams(n=n, **config.model_dump())


def truncated_samples(chains: Sequence[Sequence[Chain]]) -> Tensor:
    """Return which samples reached their token limit, (P, K) bool."""
    return torch.tensor([[c.sample.finish_reason == "length" for c in group] for group in chains])


def refuse_errors(
    prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]], kind: type[AlignProError] = TrainingError
) -> None:
    """Raise if any chain failed: failure depends on what was sampled, so an estimate from the others would be biased."""
    for prompt, group in zip(prompts, chains, strict=True):
        for completion in (each for chain in group for each in (chain.sample, *chain.responses)):
            if completion.error:
                name = f"{prompt.id} ({prompt.source})" if prompt.source else repr(prompt.text[:60])
                raise kind(f"prompt {name}: {completion.error}")
