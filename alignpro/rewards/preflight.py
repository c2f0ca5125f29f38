"""Whether the servers that a reward asks can be asked, found out before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.config import HTTPRewardConfig, JudgeRewardConfig, RewardConfig
from alignpro.data import Prompt
from alignpro.rewards.http import HTTPReward
from alignpro.rewards.judge import JudgeReward
from alignpro.rewards.servers import Session


def check_servers(config: RewardConfig, prompts: Sequence[Prompt], session: Session) -> None:
    """Send a few small requests to every server of a reward: a judge is asked to count, any other one about the first prompt.

    Args:
        config: The reward.
        prompts: The data, or the beginning of them.
        session: The servers of the run.

    Raises:
        ConfigError: A rubric or a mapping cannot be used.
        EndpointError: A server cannot be asked; the message names the component and the URL.
        BudgetError: The requests could exceed the budget.
        RewardError: The answer of a server holds no score.
    """
    for component in config.components:
        match component:
            case JudgeRewardConfig():
                JudgeReward(component, session).preflight()
            case HTTPRewardConfig():
                HTTPReward(component, session).preflight(prompts)
