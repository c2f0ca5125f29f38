"""Several targets, of which each prompt gets one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams, derive_seed
from alignpro.models.language_model import LanguageModel
from alignpro.targets.base import Answered, BegunRollout, Target
from alignpro.targets.completion import TextCompletion
from alignpro.targets.server_metrics import added


@dataclass(frozen=True)
class WeightedTarget:
    """A target of a mixture."""

    name: str
    weight: float
    target: Target


class TargetMixture:
    """Targets for which one prompter is trained; all rewrites of a prompt go to the one that is drawn by weight.

    A prompt's target follows from its seed, hence from (run seed, step, prompt), whatever rank it is on.

    Args:
        parts: The targets; their models have different names.
    """

    def __init__(self, parts: Sequence[WeightedTarget]) -> None:
        self.parts = list(parts)
        self.remote = any(part.target.remote for part in parts)
        total = sum(part.weight for part in parts)
        self._bounds = [bound / total for bound in accumulate(part.weight for part in parts)]

    @property
    def models(self) -> Mapping[str, LanguageModel]:
        """The models of all targets."""
        return {name: model for part in self.parts for name, model in part.target.models.items()}

    def answerable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that every target can answer: any of them may be drawn."""
        kept = list(prompts)
        for part in self.parts:
            kept = part.target.answerable(kept)
        return kept

    def choose(self, seed: int) -> int:
        """Which target the prompt with this seed gets."""
        drawn = derive_seed(seed, "target") / 2**63
        return min(bisect_right(self._bounds, drawn), len(self.parts) - 1)

    def begin_rollout(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        inputs: Sequence[Sequence[int]],
        *,
        decode: Callable[[Prompt, Completion], str],
        rewrite: SamplingParams,
        respond: SamplingParams,
        seeds: Sequence[int],
        drawn: Sequence[Sequence[Completion]] | None = None,
        on_answered: Answered | None = None,
    ) -> BegunRollout:
        """Sample each prompt's chains with its target; those behind servers answer while others are sampled."""
        chosen = [self.choose(seed) for seed in seeds]
        begun: list[tuple[Target, list[int], BegunRollout]] = []
        samples: list[Sequence[Completion]] = [[] for _ in prompts]
        for number, part in enumerate(self.parts):
            if places := [i for i, each in enumerate(chosen) if each == number]:
                own = part.target.begin_rollout(
                    engine,
                    [prompts[i] for i in places],
                    [inputs[i] for i in places],
                    decode=decode,
                    rewrite=rewrite,
                    respond=respond,
                    seeds=[seeds[i] for i in places],
                    drawn=None if drawn is None else [drawn[i] for i in places],
                    on_answered=None if on_answered is None else _told_with_text(part.target, places, on_answered),
                )
                begun.append((part.target, places, own))
                for i, group in zip(places, own.samples, strict=True):
                    samples[i] = group

        def collect() -> list[list[Chain]]:
            groups: list[list[Chain]] = [[] for _ in prompts]
            for target, places, own in begun:
                for i, group in zip(places, own(), strict=True):
                    for chain in group:
                        chain.responses = [_with_text(target, response) for response in chain.responses]
                    groups[i] = group
            return groups

        return BegunRollout(samples, collect)

    def text(self, completion: Completion) -> str:
        """The text of a response."""
        assert isinstance(completion, TextCompletion)  # as `begin_rollout` returns them
        return completion.text

    def metrics(self) -> dict[str, float]:
        """What responding took: sums over the targets, and each target's own as ``NAME`` of ``endpoint/requests/NAME``."""
        of_parts = [(part.name, part.target.metrics()) for part in self.parts]
        metrics = added(*(own for _, own in of_parts))
        for name, own in of_parts:
            metrics |= {f"{key}/{name}": value for key, value in own.items() if key.startswith("endpoint/")}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The state of each target."""
        return {part.name: part.target.state_dict() for part in self.parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of each target."""
        for part in self.parts:
            part.target.load_state_dict(state.get(part.name, {}))


def _told_with_text(target: Target, places: Sequence[int], on_answered: Answered) -> Answered:
    """What a target is given to tell of its responses, with the places of its prompts among all."""

    def tell(i: int, rewrite: str | None, responses: Sequence[Completion]) -> None:
        on_answered(places[i], rewrite, [_with_text(target, response) for response in responses])

    return tell


def _with_text(target: Target, response: Completion) -> Completion:
    """A response with its text, so that it need not be known any more whose it is."""
    if isinstance(response, TextCompletion) or response.error is not None:
        return response
    return TextCompletion(
        response.tokens,
        response.logprobs,
        response.finish_reason,
        num_text_tokens=response.num_text_tokens,
        rest_tokens=response.rest_tokens,
        text=target.text(response),
    )
