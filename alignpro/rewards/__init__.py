"""Rewards r*(x, y): functions, reward models, judges and drift guards, combined in a weighted sum.

What waits for a server waits beside all others. May import `endpoints`, `models`, `prompting`, `data`, `config` and `errors`.
"""

from alignpro.rewards.component import Measurement, Reward
from alignpro.rewards.conversation import encode_conversation
from alignpro.rewards.stack import RewardStack, Scored, build_reward

__all__ = ["Measurement", "Reward", "RewardStack", "Scored", "build_reward", "encode_conversation"]
