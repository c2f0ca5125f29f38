"""Rewrites grow sentence by sentence, both ends of their order are kept, and the policy learns from the best and the worst."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import policy_config
from tiny_runs import Workshop

from alignpro.config import TrainConfig, load_config, validate_config
from alignpro.engine import Completion
from alignpro.environments.grown_candidates import Beams, Candidate, different, extremes
from alignpro.environments.self_reward import GrownChain, SelfRewardEnvironment
from alignpro.errors import ConfigError
from alignpro.models.loading import load_language_model
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.reference_logprobs import sequence_logprob
from alignpro.prompting.sentences import sentence_end_ids
from alignpro.training.builders import prompter_training
from alignpro.training.loggers.jsonl import read_rows

SELF = ("objective.loss=gibbs", "rollout.rewrites_per_prompt=2", "self_reward.sentences=2", "self_reward.beams=2")
SELF += ("self_reward.branches=2", "rollout.rewrite.max_tokens=6")
END = 0
SENTENCES = {(1, 9): 0.5, (2, 9): 0.3, (END,): 0.2}
"""All sentences of a world: two, and the end."""


def every_sentence(before: Candidate) -> list[Candidate]:
    """What can follow a beginning."""
    return [
        before.grown(Completion(list(tokens), [math.log(p), *[0.0] * (len(tokens) - 1)], "stop"), frozenset({END}))
        for tokens, p in SENTENCES.items()
    ]


def grow(alpha: float, sentences: int, external: Callable[[Sequence[int]], float]) -> Beams:
    """Beams wide enough to keep everything."""
    beams = Beams(100, alpha)
    for _ in range(sentences):
        drawn = [each for beginning in beams.live for each in every_sentence(beginning)]
        beams.advance(drawn, [external(each.tokens) for each in drawn])
    return beams


def test_all_rewrites_of_an_enumerable_world_are_candidates() -> None:
    beams = grow(0.5, 3, sum)
    found = {each.tokens for each in (*beams.finished, *beams.live)}
    texts = [(1, 9), (2, 9)]
    expected = {(*sum(beginning, ()), END) for n in range(3) for beginning in itertools.product(texts, repeat=n)}
    assert found == expected | {sum(each, ()) for each in itertools.product(texts, repeat=3)}


def test_without_calibration_the_order_is_that_of_the_policys_own_likelihood() -> None:
    best, worst = grow(0.0, 2, lambda tokens: 0.0).chosen(2)
    assert best.tokens == (1, 9, 1, 9) and best.scores == (1.0, 0.9)  # equally likely with another first sentence
    assert worst.tokens == (END,) and worst.scores == (0.0,)


def test_with_the_scorer_alone_the_order_is_the_scorers() -> None:
    beams = grow(1.0, 2, lambda tokens: tokens.count(2))
    best, worst = beams.chosen(2)
    assert best.tokens == (2, 9, 2, 9) and worst.tokens.count(2) == 0


def test_a_candidates_score_is_the_sum_over_sentences_divided_by_their_number() -> None:
    beams = Beams(4, 0.5)
    start = Candidate().grown(Completion([1, 9], [-1.0, -0.5], "stop"), frozenset({END}))
    other = Candidate().grown(Completion([2, 9], [-0.2, -0.1], "stop"), frozenset({END}))
    beams.advance([start, other], [3.0, 1.0])
    assert [each.score for each in beams.live] == [0.5, 0.5]  # each is first by one of both
    beams.advance([beams.live[0].grown(Completion([END], [-0.1], "stop"), frozenset({END}))], [0.0])
    (finished,) = beams.finished
    assert finished.scores == (0.5, 0.5) and finished.score == 0.5 and finished.own_logprob == -0.1
    assert finished.completion() == Completion([1, 9, END], [-1.0, -0.5, -0.1], "stop")


def test_the_best_and_the_worst_are_kept() -> None:
    some = [Candidate(tokens=(i,), scores=(score,)) for i, score in enumerate((0.1, 0.9, 0.4, 0.6, 0.2))]
    assert [each.score for each in extremes(some, 2)] == [0.9, 0.1]
    assert [each.score for each in extremes(some, 3)] == [0.9, 0.6, 0.1]
    assert [each.score for each in extremes(some, 9)] == [0.9, 0.6, 0.4, 0.2, 0.1]
    assert different([some[0], some[1], some[0]]) == some[:2]


def test_too_few_candidates_are_repeated() -> None:
    beams = Beams(4, 0.0)
    beams.advance([Candidate().grown(Completion([END], [-0.1], "stop"), frozenset({END}))], [0.0])
    assert not beams.live and [each.tokens for each in beams.chosen(3)] == [(END,)] * 3


def test_sentences_end_with_their_marks_and_with_lines(workshop: Workshop) -> None:
    tokenizer = load_language_model(policy_config(workshop.root / "prompter", architecture="qwen2")).tokenizer
    texts = {tokenizer.decode([each]) for each in sentence_end_ids(tokenizer)}
    assert "." in texts and "a" not in texts and all("\n" in text or text.rstrip()[-1] in ".!?…" for text in texts)


class TestTraining:
    @pytest.mark.parametrize("alpha", [0.0, 0.5])
    def test_candidates_have_the_policys_logprobs_and_the_target_is_asked_for_calibration_alone(
        self, workshop: Workshop, tmp_path: Path, alpha: float
    ) -> None:
        arguments = workshop.arguments("train", tmp_path, *SELF, f"self_reward.alpha={alpha}")[1:]
        training = prompter_training(load_config(TrainConfig, arguments))
        environment, engine = training.environment, training.engine
        assert isinstance(environment, SelfRewardEnvironment)
        prompts = training.stream.batch(0)
        chains = environment.rollout(engine, prompts, training.sampling, [1, 2])
        groups = [[chain for chain in group if isinstance(chain, GrownChain)] for group in chains]
        assert [len(group) for group in groups] == [2, 2]
        for prompt, group in zip(prompts, groups, strict=True):
            assert group[0].score >= group[1].score and all(1 <= chain.sentences <= 2 for chain in group)
            assert all(len(chain.sample.tokens) <= 6 for chain in group)
            samples = [chain.sample.tokens for chain in group]
            batch = SequenceBatch.build([environment.encode(prompt)] * 2, samples)
            logprob = sequence_logprob(training.policy.model, batch, training.policy.temperature)
            drawn = torch.tensor([sum(chain.sample.logprobs) for chain in group])
            torch.testing.assert_close(drawn, logprob.detach(), atol=1e-4, rtol=1e-4)
        scores = environment.score(prompts, chains)
        calls = scores.metrics["self_reward/target_calls"]
        assert calls == 0 if alpha == 0 else 1 <= calls <= 2 + 4
        assert set(scores.values.flatten().tolist()) <= {0.0, 0.5, 1.0}
        torch.testing.assert_close(scores.values.sum(1), torch.ones(2))
        again = environment.rollout(engine, prompts, training.sampling, [1, 2])
        assert [[c.sample.tokens for c in g] for g in again] == [[c.sample.tokens for c in g] for g in chains]

    @pytest.mark.parametrize("alpha", [0.0, 0.5])
    def test_nothing_is_asked_once_all_candidates_have_ended(
        self, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float
    ) -> None:
        arguments = workshop.arguments("train", tmp_path, *SELF, f"self_reward.alpha={alpha}")[1:]
        training = prompter_training(load_config(TrainConfig, arguments))
        environment = training.environment
        assert isinstance(environment, SelfRewardEnvironment)
        asked = []
        draw = environment._draw

        def ended(*of_sentence: Any) -> list[list[Candidate]]:
            asked.append(of_sentence[-1])
            return [[replace(each, ended=True) for each in candidates] for candidates in draw(*of_sentence)]

        monkeypatch.setattr(environment, "_draw", ended)
        chains = environment.rollout(training.engine, training.stream.batch(0), training.sampling, [1, 2])
        assert asked == [0] and [len(group) for group in chains] == [2, 2]

    def test_a_run_learns_from_its_candidates_and_is_evaluated_by_the_reward(
        self, workshop: Workshop, tmp_path: Path
    ) -> None:
        short = ("run.steps=2", "run.checkpoint_every=2", "run.eval_every=2")
        assert workshop.run("train", tmp_path, *SELF, *short, "self_reward.alpha=0") == 0
        rows = read_rows(tmp_path / "metrics.jsonl")
        steps = [row for row in rows if "self_reward/spread" in row]
        assert len(steps) == 2 and all(row["sample/logprob_difference_max"] < 1e-3 for row in steps)
        assert all(row["reward/mean"] == 0.5 for row in steps)  # 1 and 0
        (evaluation,) = (row for row in rows if "eval/reward" in row)
        assert evaluation["eval/reward"] not in (0.0, 0.5, 1.0)
        assert steps[-1]["kl"] > 1e-6


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"objective": {}}, "objective.loss=policy_gradient: candidates are chosen, not drawn"),
        ({"rollout": {}}, "rollout.rewrites_per_prompt=8 and feed=pair: set it to 2"),
        ({"self_reward": {"sentences": 200}}, "sentences=200, more than rollout.rewrite.max_tokens=128"),
        ({"deepspeed": {"reward_stage": 3}}, "deepspeed.reward_stage=3: candidates are scored while they are grown"),
        ({"environment": "a:B"}, "environment: self-reward is one itself"),
        ({"memory": {}}, "self_reward with memory: .*leave one out"),
        ({"target": {"mixture": [{"path": "a"}, {"path": "b"}]}}, "candidates are ranked by one target"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict, problem: str) -> None:
    given = {
        "run": {"out": "o"},
        "data": {"source": "x.jsonl"},
        "policy": {"path": "p"},
        "target": {"path": "t"},
        "reward": {"components": [{"kind": "function", "function": "a:b"}]},
        "objective": {"loss": "gibbs"},
        "rollout": {"rewrites_per_prompt": 2},
        "self_reward": {},
    }
    with pytest.raises(ConfigError, match=problem):
        validate_config(TrainConfig, given | changes)
