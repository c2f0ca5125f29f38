"""r*(x, y): a weighted sum of components, minus the penalties of the drift guards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from alignpro.config import FunctionRewardConfig, RewardComponentConfig, RewardConfig
from alignpro.data import Prompt
from alignpro.errors import ConfigError, RewardError
from alignpro.prompting.length_filter import filter_refused_prompts
from alignpro.rewards.component import Reward, checked_values, describe_prompt, guarded_call
from alignpro.rewards.function import FunctionReward
from alignpro.rewards.guards import Guard
from alignpro.rewards.model import LoadRewardModel, ModelReward

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

    def __init__(self, components: Sequence[tuple[float, Reward]], guards: Sequence[Guard]) -> None:
        self._components = list(components)
        self._guards = list(guards)

    def scorable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts to which responses can be scored; those that a reward model's template refuses are dropped and counted.

        Raises:
            ConfigError: A function takes a parameter that is no column of the data.
            DataError: No prompt is left.
        """
        kept = list(prompts)
        for _, reward in self._components:
            if isinstance(reward, FunctionReward):
                reward.check_columns(kept)
            elif isinstance(reward, ModelReward):
                kept = filter_refused_prompts(kept, reward.check, input_name=f"the input of the reward {reward.name!r}")
        return kept

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None) -> Scored:
        """Score N responses y against the ORIGINAL prompts x.

        Args:
            prompts: (N,) original prompts, repeated for each response of a group.
            responses: (N,) the target's responses.
            rewrites: (N,) the rewrites given to the target, for the guards; None in RLHF, which has no rewrites and skips
                the guards.

        Raises:
            RewardError: A component or guard raised, or returned the wrong number of values, NaN, infinity or something
                that is not a number. The message names it and the offending prompt.
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
        for weight, reward in self._components:
            measured = guarded_call(f"reward {reward.name!r}", prompts, partial(reward, prompts, responses, rewrites))
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
        return Scored(checked_values("reward: the weighted sum", prompts, totals), raw, scores)

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


def build_reward(config: RewardConfig, load: LoadRewardModel | None = None) -> RewardStack:
    """Load every component and guard of the configuration.

    Args:
        config: The components and guards.
        load: Loads the reward models, for example sharded over ranks; see `ModelReward`.

    Raises:
        ConfigError: A function cannot be found or called as configured, two components have the same name, or one has a
            name in `RESERVED`.
        ModelError: A reward model or encoder cannot be used.
    """
    components = [(component.weight, _component(component, load)) for component in config.components]
    reserved = RESERVED.intersection(reward.name for _, reward in components)
    if reserved:
        raise ConfigError(f"reward.components: the name {min(reserved)!r} is taken by a metric: give it another `name`")
    _refuse_repeats([reward.name for _, reward in components], "reward.components", "give each a `name` of its own")
    _refuse_repeats([guard.kind for guard in config.guards], "reward.guards", "each kind of guard is allowed once")
    return RewardStack(components, [Guard(guard) for guard in config.guards])


def _component(config: RewardComponentConfig, load: LoadRewardModel | None) -> Reward:
    return FunctionReward(config) if isinstance(config, FunctionRewardConfig) else ModelReward(config, load)


def _refuse_repeats(names: Sequence[str], key: str, remedy: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ConfigError(f"{key}: {repeated[0]!r} occurs more than once: {remedy}")
