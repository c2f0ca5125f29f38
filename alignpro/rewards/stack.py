"""r*(x, y): a weighted sum of components, minus the penalties of the drift guards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from alignpro.config import (
    FunctionRewardConfig,
    JudgeRewardConfig,
    ModelRewardConfig,
    RewardComponentConfig,
    RewardConfig,
)
from alignpro.data import Prompt
from alignpro.errors import ConfigError, RewardError
from alignpro.rewards.component import (
    ConcurrentReward,
    Measurement,
    Reward,
    checked_values,
    describe_prompt,
    guarded_call,
)
from alignpro.rewards.function import AsyncFunctionReward, FunctionReward
from alignpro.rewards.guards import Guard
from alignpro.rewards.http import HTTPReward
from alignpro.rewards.judge import JudgeReward
from alignpro.rewards.model import LoadRewardModel, ModelReward
from alignpro.rewards.refusal_kept import RefusalKept
from alignpro.rewards.servers import Session
from alignpro.rewards.waiting import WaitingComponents

RESERVED = frozenset({"mean", "std", "guard"})
"""Names used by metrics of the whole reward: ``reward/mean``, ``reward/std``, ``reward/guard/…``."""


@dataclass
class Scored:
    """The rewards of N rows."""

    values: list[float]
    """(N,) r*: the weighted sum of the components, minus penalties."""
    raw: list[float]
    """(N,) the weighted sum of the components alone."""
    components: Mapping[str, Sequence[float | None]]
    """Name -> (N,): each component's unweighted score (None where it abstains), its metrics as ``<component>/<metric>``, each
    guard's measure as ``guard/<kind>`` and, if it has one, its penalty as ``guard/<kind>/penalty``."""


class RewardStack:
    """The reward of a run; see `build_reward`."""

    def __init__(
        self,
        components: Sequence[tuple[float, Reward | ConcurrentReward]],
        guards: Sequence[Guard],
        refusal_kept: RefusalKept | None = None,
    ) -> None:
        self._components = list(components)
        self._guards = list(guards)
        self.refusal_kept = refusal_kept
        """The guard that compares responses with those to unchanged prompts, which an environment tells it; if there is one."""
        waiting = {_named(each): each for _, each in components if isinstance(each, ConcurrentReward)}
        self._waiting = WaitingComponents(waiting)

    def scorable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts to which responses can be scored; those that a reward model's template refuses are dropped and counted.

        Raises:
            ConfigError: A component needs a column that the data do not have.
            DataError: No prompt is left.
        """
        kept = list(prompts)
        for _, reward in self._components:
            kept = reward.scorable(kept)
        return kept

    @property
    def begins_early(self) -> bool:
        """Whether `begin` is of use: a component waits, and can be asked about some responses before the others are there."""
        return self._waiting.begin_early

    def begin(self, prompt: Prompt, responses: Sequence[str], rewrite: str | None) -> None:
        """Let the components that wait begin with responses to one rewrite, or to one prompt; returns at once.

        A call to score them, with the same `Prompt`, then waits for what was begun. From any thread.
        """
        self._waiting.begin(prompt, responses, rewrite)

    def forget_begun(self) -> None:
        """Cancel what was begun: it will not be scored."""
        self._waiting.forget()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None) -> Scored:
        """Score N responses y against the ORIGINAL prompts x.

        Components that wait, wait at the same time and while the others compute, which do so one after another.

        Args:
            prompts: (N,) original prompts, repeated for each response of a group.
            responses: (N,) the target's responses.
            rewrites: (N,) the rewrites given to the target, for the guards; None in RLHF, which has no rewrites and skips
                the guards.

        Raises:
            RewardError: A component or guard raised, or returned the wrong number of values, NaN, infinity or something
                that is not a number. The message names it and the offending prompt.
            EndpointError: A server that a component asks cannot be used.
            BudgetError: What a component asks a server could exceed the budget.
            ValueError: The numbers of prompts, responses and rewrites differ.
        """
        if len(prompts) != len(responses) or (rewrites is not None and len(rewrites) != len(prompts)):
            counts = f"{len(prompts)} prompts, {len(responses)} responses"
            raise ValueError(
                f"{counts}" + ("" if rewrites is None else f", {len(rewrites)} rewrites") + ": not one each"
            )
        if not prompts:
            return Scored([], [], {})
        totals = [0.0] * len(prompts)
        scores: dict[str, Sequence[float | None]] = {}
        for (weight, reward), measured in zip(
            self._components, self._measure(prompts, responses, rewrites), strict=True
        ):
            scores[reward.name] = measured.values
            scores.update({f"{reward.name}/{metric}": values for metric, values in measured.metrics.items()})
            totals = [
                total if value is None else total + weight * value
                for total, value in zip(totals, measured.values, strict=True)
            ]
        self._refuse_unscored(prompts, scores)
        raw = checked_values("reward: the weighted sum", prompts, totals)
        for guard in self._guards if rewrites is not None else []:
            measured = guard(prompts, rewrites or [])
            scores.update(measured.metrics)
            totals = [total - (penalty or 0.0) for total, penalty in zip(totals, measured.values, strict=True)]
        if self.refusal_kept is not None and rewrites is not None:
            kept = self.refusal_kept(prompts, responses)
            scores.update(kept.metrics)
            totals = [total - (penalty or 0.0) for total, penalty in zip(totals, kept.values, strict=True)]
        return Scored(checked_values("reward: the weighted sum", prompts, totals), raw, scores)

    def _measure(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None
    ) -> list[Measurement]:
        """The results of the components, in their order; of several errors, the first in that order is raised."""
        named = [(_named(reward), reward) for _, reward in self._components]
        waiting = self._waiting.start(prompts, responses, rewrites)
        try:
            computed = {
                what: guarded_call(what, prompts, partial(reward, prompts, responses, rewrites))
                for what, reward in named
                if not isinstance(reward, ConcurrentReward)
            }
            awaited = waiting.results()
        finally:
            waiting.cancel()
        return [(computed | awaited)[what] for what, _ in named]

    def _refuse_unscored(self, prompts: Sequence[Prompt], scores: Mapping[str, Sequence[float | None]]) -> None:
        """Raise if all components abstain from a sample: then it has no reward."""
        names = [reward.name for _, reward in self._components]
        for i, prompt in enumerate(prompts):
            if names and all(scores[name][i] is None for name in names):
                first, *others = names
                beside = f", and {', '.join(map(repr, others))} abstain too" if others else ""
                raise RewardError(
                    f"reward {first!r} returned None, which is not a number{beside}: one component must score each sample"
                    f"\n  for {describe_prompt(prompt)}"
                )


def build_reward(
    config: RewardConfig, load: LoadRewardModel | None = None, session: Session | None = None
) -> RewardStack:
    """Load every component and guard of the configuration.

    Args:
        config: The components and guards.
        load: Loads the reward models, for example sharded over ranks; see `ModelReward`.
        session: The servers of the run, for components that ask one.

    Raises:
        ConfigError: A function cannot be found or called as configured, a rubric or a mapping cannot be used, two components
            have the same name or one has a name in `RESERVED`, or one asks a server and there is no session.
        EndpointError: A server cannot be used as configured.
        ModelError: A reward model or encoder cannot be used.
    """
    components = [(component.weight, _component(component, load, session)) for component in config.components]
    reserved = RESERVED.intersection(reward.name for _, reward in components)
    if reserved:
        raise ConfigError(f"reward.components: the name {min(reserved)!r} is taken by a metric: give it another `name`")
    _refuse_repeats([reward.name for _, reward in components], "reward.components", "give each a `name` of its own")
    _refuse_repeats([guard.kind for guard in config.guards], "reward.guards", "each kind of guard is allowed once")
    guards = [Guard(guard) for guard in config.guards if guard.kind != "refusal_kept"]
    kept = next((RefusalKept(guard.penalty) for guard in config.guards if guard.kind == "refusal_kept"), None)
    return RewardStack(components, guards, kept)


def _component(
    config: RewardComponentConfig, load: LoadRewardModel | None, session: Session | None
) -> Reward | ConcurrentReward:
    match config:
        case FunctionRewardConfig():
            function = FunctionReward(config)
            return AsyncFunctionReward(function, config.whole_batch) if function.is_async else function
        case ModelRewardConfig():
            return ModelReward(config, load)
    if session is None:
        raise ConfigError(
            f"reward {config.name or config.kind!r} asks a server, and nothing here connects to one: give build_reward a session"
        )
    return JudgeReward(config, session) if isinstance(config, JudgeRewardConfig) else HTTPReward(config, session)


def _named(reward: Reward | ConcurrentReward) -> str:
    return f"reward {reward.name!r}"


def _refuse_repeats(names: Sequence[str], key: str, remedy: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ConfigError(f"{key}: {repeated[0]!r} occurs more than once: {remedy}")
