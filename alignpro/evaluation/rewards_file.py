"""rewards.json: the rewards of an evaluation as plain data, from which evaluations are compared without any model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignpro.config import RewardConfig
from alignpro.errors import DataError
from alignpro.theory.statistics import FloatArray

REWARDS_FILE = "rewards.json"


@dataclass(frozen=True)
class ArmRewards:
    """The rewards of one arm."""

    raw: FloatArray
    """(P, K, M) float64, without penalties; K = 1 in an arm without rewrites."""
    penalised: FloatArray
    """(P, K, M) with the penalties of guards and truncation."""
    kl: FloatArray | None = None
    """(P,) KL of the arm to what it started from, in nats per sequence, or the most that it can be on average; None if it
    started from nothing or its KL is not known."""


@dataclass(frozen=True)
class EvaluationRewards:
    """The rewards of an evaluation, and what decides whether they can be compared with another's."""

    prompts: Sequence[str]
    """(P,) the id of each held-out prompt, which depends on its conversation alone."""
    clusters: Sequence[int]
    """(P,) the number of each prompt's cluster."""
    arms: Mapping[str, ArmRewards]
    """Key of the arm → its rewards."""
    seed: int
    """Of the evaluation's samples."""
    reward: str
    """Hash of the reward's configuration."""

    def as_dict(self) -> dict[str, Any]:
        """The content of rewards.json."""
        arms = {
            name: {"raw": arm.raw.tolist(), "penalised": arm.penalised.tolist()}
            | ({} if arm.kl is None else {"kl": arm.kl.tolist()})
            for name, arm in self.arms.items()
        }
        return {
            "prompts": list(self.prompts),
            "clusters": list(self.clusters),
            "seed": self.seed,
            "reward": self.reward,
            "arms": arms,
        }


def reward_hash(config: RewardConfig) -> str:
    """16 hexadecimal digits that depend on every key of the reward's configuration."""
    content = json.dumps(config.model_dump(mode="json"), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_rewards(path: Path) -> EvaluationRewards:
    """Read a rewards.json.

    Raises:
        DataError: The file is missing, is not JSON, or does not hold the rewards of an evaluation; names the key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: there is no such file; an evaluation by an earlier version has none: run `alignpro eval` again"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return parse_rewards(content, str(path))


def parse_rewards(content: Any, where: str) -> EvaluationRewards:
    """Check the content of a rewards.json.

    Args:
        content: The parsed JSON.
        where: Its file, for messages.

    Raises:
        DataError: A key is missing, or a value does not fit the others.
    """
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected an object with prompts, clusters and arms, got {type(content).__name__}")
    missing = [key for key in ("prompts", "clusters", "arms", "seed", "reward") if key not in content]
    if missing:
        raise DataError(f"{where}: lacks {', '.join(missing)}: it is not the rewards.json of an evaluation")
    prompts, clusters, arms = content["prompts"], content["clusters"], content["arms"]
    if not isinstance(prompts, list) or not prompts:
        raise DataError(f"{where}: prompts: expected a list of ids")
    if not isinstance(clusters, list) or len(clusters) != len(prompts):
        raise DataError(f"{where}: clusters: expected one number for each of the {len(prompts)} prompts")
    if not isinstance(arms, dict) or not arms:
        raise DataError(f"{where}: arms: expected an object with at least one arm")
    return EvaluationRewards(
        prompts=prompts,
        clusters=clusters,
        arms={name: _parse_arm(arm, len(prompts), f"{where}: arms.{name}") for name, arm in arms.items()},
        seed=content["seed"],
        reward=content["reward"],
    )


def _parse_arm(content: Any, prompts: int, where: str) -> ArmRewards:
    arrays = {}
    for key in ("raw", "penalised"):
        try:
            array = np.asarray(content[key], np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}.{key}: expected rewards [prompt][rewrite][response], all of one size") from error
        if array.ndim != 3 or len(array) != prompts or not array.size:
            raise DataError(
                f"{where}.{key}: expected rewards of {prompts} prompts as [prompt][rewrite][response], "
                f"got the shape {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            place = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
            raise DataError(f"{where}.{key}{place}: the reward is not finite")
        arrays[key] = array
    kl = content.get("kl")  # evaluations by earlier versions have none
    if kl is not None and (not isinstance(kl, list) or len(kl) != prompts):
        raise DataError(f"{where}.kl: expected one number for each of the {prompts} prompts")
    return ArmRewards(**arrays, kl=None if kl is None else np.asarray(kl, np.float64))
