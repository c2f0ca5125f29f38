"""Scores answers for the page by the rewards of the runs: what a prompter was trained for, beside what it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from alignpro.config import FunctionRewardConfig, TrainConfig
from alignpro.data import Prompt
from alignpro.environments.trained_prompter import read_run
from alignpro.errors import AlignProError, RewardError
from alignpro.rewards import RewardStack, build_reward

_LOGGER = logging.getLogger(__name__)


class RunRewards:
    """The rewards of served runs, each loaded when it is first asked for and kept until its run changes."""

    def __init__(self) -> None:
        self._loaded: dict[Path, tuple[int, RewardStack]] = {}
        self._loading = asyncio.Lock()

    async def score(self, run: Path, prompt: str, answers: Sequence[str]) -> list[float]:
        """The rewards of answers to a prompt, without the penalties of guards.

        Args:
            run: The run directory.
            prompt: As it was before rewriting.
            answers: The target's.

        Raises:
            AlignProError: The reward cannot be loaded here, or cannot score this prompt. The message holds no text of either.
        """
        async with self._loading:
            reward = await asyncio.to_thread(self._load, run)
        try:
            prompts = [Prompt.from_text(prompt)] * len(answers)
            return (await asyncio.to_thread(reward, prompts, list(answers), None)).values
        except RewardError as error:  # whose message quotes the prompt, which logs must not
            cause = error if error.__cause__ is None else error.__cause__
            _LOGGER.warning("the reward of run %s failed: %s", run.name, type(cause).__name__)
            _LOGGER.debug("the reward of run %s failed", run.name, exc_info=error)
            how = "" if isinstance(cause, AlignProError) else f" ({type(cause).__name__})"
            raise RewardError(
                f"the reward of run {run.name} cannot score this prompt{how}: it may need a column of its training data"
            ) from error

    def _load(self, run: Path) -> RewardStack:
        changed = _changed(run)
        known = self._loaded.get(run)
        if known is None or known[0] != changed:
            known = self._loaded[run] = (changed, _load_reward(run))
        return known[1]


def _changed(run: Path) -> int:
    """When the configuration of a run was written; 0 if it is not there."""
    file = run / "config.yaml"
    return file.stat().st_mtime_ns if file.is_file() else 0


def _load_reward(run: Path) -> RewardStack:
    config = read_run(run)
    if not isinstance(config, TrainConfig):
        raise RewardError(f"run {run.name} is of `alignpro sft`, which has no reward")
    for component in config.reward.components:
        if not isinstance(component, FunctionRewardConfig):
            raise RewardError(
                f"the reward of run {run.name} has a component of kind {component.kind}: the page scores by functions alone"
            )
    try:
        reward = build_reward(config.reward.model_copy(update={"guards": []}))
        reward.scorable([Prompt.from_text("a prompt of the page has no columns of the data")])
    except AlignProError as error:
        raise RewardError(f"the reward of run {run.name} cannot be used here: {error}") from error
    return reward
