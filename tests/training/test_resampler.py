"""Which samples the loss `Distillation` is computed on, in the trainer."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import World, credit, distance, take_gradient

from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.engine import Chain
from alignpro.environments.base import Scores
from alignpro.objectives import Distillation, distillation_weights
from alignpro.training.reinforcement import RLTrainer
from alignpro.training.resampler import Resampler

LAMBDA = 0.3
DISTILLATION = {"loss": "distillation", "kl": {"coef": LAMBDA}}


def make_training(out: Path = Path("runs"), group: int = 4, **settings: Any) -> RLTrainer:
    return World().training(DISTILLATION | settings, group, out, micro_batch_size=8)


def resampled(training: RLTrainer, groups: Sequence[tuple[int, ...]], step: int = 0) -> Any:
    assert isinstance(training.environment, World) and isinstance(training.loss, Distillation)
    experience = credit(training.environment, training, groups)
    local = list(range(2 * len(groups)))
    return experience, Resampler(Ranks(), 4, 0)(training.loss, experience, step, local, LAMBDA)


def test_prompts_whose_rewards_are_equal_are_left_out_and_the_others_renumbered() -> None:
    training = make_training()
    experience, (chosen, groups, count, metrics) = resampled(training, [(3, 3, 3, 3), (0, 9, 14, 3), (5, 5, 5, 5)])
    assert groups == [0, 1] and count == 2  # one of each prompt
    assert len(chosen.scores) == 2 * 2
    assert metrics["resampled_prompts"] == pytest.approx(2 / 6)
    of_first = experience.select(torch.tensor([1]), 4).scores
    assert all(score in of_first for score in chosen.scores[:2])
    weights = distillation_weights(
        *(getattr(experience.values, name).sum(1) for name in ("logprob", "reference_logprob")),
        experience.scores,
        4,
        LAMBDA,
        1.0,
    )
    effective = 1 / weights.square().sum(1)
    assert metrics["effective_samples"] == pytest.approx(effective[[1, 4]].mean().item())


def test_each_step_draws_anew_and_the_same_again() -> None:
    training = make_training(distillation_samples=8)
    rows = [resampled(training, [(0, 9, 14, 3)], step)[1][0].scores.tolist() for step in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_the_gradient_is_that_of_the_cross_entropy_of_what_is_kept() -> None:
    training = make_training(distillation_samples=3)
    _, (chosen, *_) = resampled(training, [(0, 9, 14, 3), (1, 12, 2, 7)])
    metrics = training.accumulate(chosen, training.kl)
    found = take_gradient(training.policy.trainable.values())
    loss = -training.policy.sequence_logprob(chosen.batch).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert distance(found, take_gradient(training.policy.trainable.values())) < 1e-12
    assert metrics["loss"] == pytest.approx(loss.item())


def test_the_references_logits_are_left_out_of_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training(epochs=2)
    assert training.kl.estimator == "exact"  # whose loss reads them, unlike the cross-entropy
    given = []
    plain = training.policy.loss

    def loss(*arguments: Any, **others: Any) -> Any:
        given.append(others["reference_states"])
        return plain(*arguments, **others)

    monkeypatch.setattr(training.policy, "loss", loss)
    training.update(credit(training.environment, training, [(0, 9, 14, 3)]), 0, [0, 1])  # type: ignore[arg-type]
    assert given and all(each is None for each in given)


def test_a_micro_batch_may_hold_some_of_a_prompts_samples(tmp_path: Path) -> None:
    for loss, rows in (("distillation", 2), ("gibbs", 4)):
        training = World().training({"loss": loss, "kl": {"coef": LAMBDA}}, 4, tmp_path, micro_batch_size=2)
        assert training.accumulate.micro_batch_size == rows


class Indifferent(World):
    """All rewards are equal."""

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> Scores:
        scores = super().score(prompts, chains)
        scores.values.fill_(0.5)
        return scores


def test_a_step_that_tells_nothing_changes_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = Indifferent().training(DISTILLATION, 4, tmp_path)
    before = [weight.detach().clone() for weight in training.policy.trainable.values()]
    with caplog.at_level(logging.WARNING):
        metrics = training.step(0)
    assert distance(before, [*training.policy.trainable.values()]) == 0
    assert metrics["resampled_prompts"] == 0 and "gradient_norm" not in metrics
    assert "step 1: the rewards of each prompt are all equal" in caplog.text


def test_a_step_makes_an_update_for_each_minibatch_of_the_prompts_that_are_kept(tmp_path: Path) -> None:
    training = make_training(tmp_path, minibatches=2, epochs=3)
    metrics = training.step(0)
    assert training.updates == 6
    assert 0 < metrics["resampled_prompts"] <= 1 and 1 <= metrics["effective_samples"] <= 4
    assert math.isfinite(metrics["gradient_norm"])
