"""Calibrated self-reward: the prompter grows rewrites sentence by sentence, and learns from its own judgement of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from alignpro.config.learning import ObjectiveConfig
from alignpro.config.method import MethodSection
from alignpro.config.rollout import RolloutConfig
from alignpro.config.run import DeepSpeedConfig
from alignpro.config.section import Section

Calibration = Annotated[float, Field(ge=0, le=1)]
"""α, the weight of the external scorer; 1 − α is that of the policy's own likelihood."""


class SelfRewardConfig(Section):
    """How the candidates of a prompt are grown and scored, in place of independent samples; see `alignpro.theory.self_reward`."""

    alpha: Calibration = 0.9
    """α. With 0 the target is not asked: the policy is judged by itself alone."""
    sentences: int = Field(4, ge=1)
    """Most sentences of a rewrite; each has at most ``rollout.rewrite.max_tokens`` divided by this number of tokens."""
    beams: int = Field(4, ge=2)
    """Beginnings that are kept after each sentence: half of them the best, half the worst, so that both ends stay in sight."""
    branches: int = Field(4, ge=1)
    """Sentences that are drawn after each of them."""
    feed: Literal["pair", "group"] = "pair"
    """``pair``: the best candidate with reward 1, the worst with 0. ``group``: ``rollout.rewrites_per_prompt`` candidates, half
    the best and half the worst, with their scores as rewards."""

    @property
    def grown(self) -> int:
        """Most sentences that are drawn for a prompt."""
        return self.branches * (1 + (self.sentences - 1) * self.beams)

    @property
    def answered(self) -> int:
        """Most beginnings of a prompt's rewrites that the target answers: one for each sentence, if α > 0."""
        return self.grown if self.alpha > 0 else 0

    def check(
        self,
        rollout: RolloutConfig,
        objective: ObjectiveConfig,
        deepspeed: DeepSpeedConfig,
        environment: str | None,
        *,
        mixture: bool,
    ) -> None:
        """Check that the rest of a training fits.

        Args:
            rollout: Of the training, as are the next three.
            objective: Its loss.
            deepspeed: How its models are sharded.
            environment: The user's own, if there is one.
            mixture: Whether there are several targets.

        Raises:
            ValueError: It does not; the message says what to change.
        """
        K, most = rollout.rewrites_per_prompt, rollout.rewrite.max_tokens
        problems = {
            f"objective.loss={objective.loss}: candidates are chosen, not drawn from the policy: use gibbs": (
                objective.loss != "gibbs"
            ),
            f"rollout.rewrites_per_prompt={K} and feed=pair: set it to 2, or use feed=group": (
                self.feed == "pair" and K != 2
            ),
            f"sentences={self.sentences}, more than rollout.rewrite.max_tokens={most}": self.sentences > most,
            "rollout.rewrite.stop: sentences end by tokens of their own: leave it empty": bool(rollout.rewrite.stop),
            "rollout.ahead=1: candidates are grown by the policy of their own step: use rollout.ahead=0": (
                rollout.ahead > 0
            ),
            "environment: self-reward is one itself: leave one of them out": environment is not None,
            "target.mixture: candidates are ranked by one target: give it alone as `target`": mixture,
            "deepspeed.reward_stage=3: candidates are scored while they are grown, when the reward models are sharded: use 0": (
                deepspeed.reward_stage == 3 and self.alpha > 0
            ),
        }
        for problem, holds in problems.items():
            if holds:
                raise ValueError(f"self_reward with {problem}")


class SelfRewardMethod(MethodSection):
    """A prompter trained by self-reward, in iterations that each start from the one before, which is its reference too."""

    kind: Literal["self_reward"]
    alphas: list[Calibration] = Field(default=[0.0, 0.5, 0.9, 1.0], min_length=1)
    """Each α has a training of its own."""
    iterations: int = Field(3, ge=1)
    """Each is a cell: a training of ``train.run.steps`` steps, and an evaluation with the task's reward."""
    label: str | None = None
    """Its name in the report, to which α and the iteration are added; by default Self-reward, with the method's key if there are
    several."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sections of `alignpro train` that differ from the experiment's ``train``."""

    @field_validator("alphas")
    @classmethod
    def _check_alphas(cls, given: list[float]) -> list[float]:
        for i, alpha in enumerate(given):
            if alpha in given[:i]:
                raise ValueError(f"{alpha:g} is given twice")
        return given

    def sections(self, alpha: float) -> dict[str, Any]:
        """What the method itself sets of a training: a loss that samples of any distribution serve, and pairs."""
        return {
            "self_reward": {"alpha": alpha},
            "objective": {"loss": "gibbs", "advantage": "leave_one_out"},
            "rollout": {"rewrites_per_prompt": 2},
        }
