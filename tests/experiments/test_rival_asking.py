"""Rivals ask the target no more often than they may, and nothing twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from tiny_runs import Workshop

from alignpro.config import ModelConfig, PromptingConfig, RewardConfig, SamplingConfig, validate_config
from alignpro.data import Prompt
from alignpro.engine import Engine
from alignpro.environments.instruction import InstructionEnvironment
from alignpro.errors import TrainingError
from alignpro.experiments.rivals.answers import Answer, AnswerFile
from alignpro.experiments.rivals.asking import CallsSpent, Scoreboard, TargetAsker, template, usable
from alignpro.experiments.rivals.gathering import Gathering
from alignpro.models.loading import load_language_model
from alignpro.rewards import build_reward
from alignpro.targets.local import LocalTarget

MANY = [
    Prompt.from_text(text)
    for text in ("flip stone", "sort river", "sort stone", "flip river", "flip flip", "sort flip")
]
PROMPTS = MANY[:2]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TargetAsker]:
    """Makes an asker with the answers of a file."""
    shop = Workshop(tmp_path_factory.mktemp("asking"))
    (shop.root / "plain_reward.py").write_text(
        "def score(prompts, responses):\n    return [sum(map(ord, each)) % 17 / 17 for each in responses]\n"
    )
    given = {"components": [{"kind": "function", "function": f"{shop.root}/plain_reward.py:score"}]}
    config, respond = ModelConfig(path=str(shop.root / "target"), device="cpu"), SamplingConfig(max_tokens=4)
    target = LocalTarget.build(load_language_model(config), config, PromptingConfig(), respond)

    def make(answers: AnswerFile, limit: int, **guards: Any) -> TargetAsker:
        reward = build_reward(validate_config(RewardConfig, given | guards))
        board = Scoreboard([prompt.id for prompt in PROMPTS])
        engine = Engine(dict(target.models))
        return TargetAsker(target, engine, reward, respond, answers, limit=limit, seed=0, scoreboard=board)

    return make


@contextmanager
def answers(path: Path, fingerprint: str = "a") -> Iterator[AnswerFile]:
    file = AnswerFile(path, fingerprint)
    try:
        yield file
    finally:
        file.close()


def test_the_call_that_is_one_too_many_is_not_made(opened: Callable[..., TargetAsker], tmp_path: Path) -> None:
    with answers(tmp_path / "answers.jsonl") as file:
        asker = opened(file, 3)
        for _ in range(3):
            asker.ask("Be brief.", PROMPTS[0])
        assert not asker.refused
        with pytest.raises(CallsSpent):
            asker.ask("Be brief.", PROMPTS[0])
    assert (asker.calls, asker.left, asker.refused) == (3, 0, True)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1 + 3


def test_responses_to_prompts_as_they_are_that_the_guard_of_refusals_needs_are_counted_and_kept(
    opened: Callable[..., TargetAsker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()
    plain = LocalTarget.respond

    def respond(self: LocalTarget, engine: Engine, prompts: Sequence[Any], *others: Any) -> Any:
        asked.append(len(prompts))
        return plain(self, engine, prompts, *others)

    monkeypatch.setattr(LocalTarget, "respond", respond)
    guards = [{"kind": "refusal_kept", "penalty": 1.0}]
    counts = []
    for _ in range(2):  # the second time it has all answers
        with answers(tmp_path / "answers.jsonl") as file:
            asker = opened(file, 6, guards=guards)
            asker.ask("Be brief.", PROMPTS[0])
            assert asker.calls == 2
            asker.ask_all("Be kind.", PROMPTS)
            assert (asker.calls, asker.left) == (5, 1)
            with pytest.raises(CallsSpent):
                asker.ask("Be kind.", MANY[2])  # it and the prompt as it is would be two
            counts.append((asker.calls, asker.tokens, sum(asked)))
    assert counts[0] == counts[1] and counts[0][2] == 5
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1 + 5


def test_an_interrupted_search_asks_only_for_what_it_has_not_got(
    opened: Callable[..., TargetAsker], tmp_path: Path
) -> None:
    questions = [("Be brief.", PROMPTS[0]), ("Be brief.", PROMPTS[0]), ("Be kind.", PROMPTS[1])]
    with answers(tmp_path / "whole") as file:
        asker = opened(file, 9)
        whole = [asker.ask(*each) for each in questions]
    with answers(tmp_path / "parts") as file:
        opened(file, 9).ask(*questions[0])
    text = (tmp_path / "parts").read_text()
    (tmp_path / "parts").write_text(text + text.splitlines()[-1][:20])  # a kill while it wrote
    with answers(tmp_path / "parts") as file:
        asker = opened(file, 9)
        assert [asker.ask(*each) for each in questions] == whole
        assert asker.calls == 3  # those that were answered before count as well
    lines = (tmp_path / "parts").read_text().splitlines()
    assert len(lines) == 1 + 3 and lines[1] == text.splitlines()[1]


def test_questions_of_several_threads_are_one_batch_and_count_in_the_order_of_their_texts(
    opened: Callable[..., TargetAsker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = list[int]()
    plain = InstructionEnvironment.rollout

    def rollout(self: Any, engine: Engine, prompts: Sequence[Prompt], *others: Any) -> Any:
        batches.append(len(prompts))
        return plain(self, engine, prompts, *others)

    with answers(tmp_path / "one_by_one") as file:
        asker = opened(file, 6)
        alone = {prompt.id: asker.ask("Be brief.", prompt) for prompt in MANY}
    monkeypatch.setattr(InstructionEnvironment, "rollout", rollout)
    admitted = {prompt.id for prompt in sorted(MANY, key=lambda each: each.id)[:4]}
    for name, order in (("forwards", MANY), ("backwards", MANY[::-1])):
        with answers(tmp_path / name) as file, ThreadPoolExecutor(len(MANY)) as threads:
            asker, all_there = opened(file, 4), Barrier(len(MANY))

            def ask(prompt: Prompt, asker: TargetAsker = asker, all_there: Barrier = all_there) -> Answer:
                all_there.wait()
                return asker.ask("Be brief.", prompt)

            asked = {prompt.id: threads.submit(ask, prompt) for prompt in order}
            assert {
                name for name, each in asked.items() if isinstance(each.exception(), CallsSpent)
            } == alone.keys() - admitted
            assert all(asked[name].result() == alone[name] for name in admitted)
            assert (asker.calls, asker.tokens) == (4, sum(alone[name].tokens for name in admitted))
    assert batches == [4, 4]


def test_an_error_of_the_target_reaches_every_thread_that_waits(
    opened: Callable[..., TargetAsker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise TrainingError("the target is gone")

    monkeypatch.setattr(InstructionEnvironment, "rollout", fail)
    with answers(tmp_path / "answers.jsonl") as file, ThreadPoolExecutor(3) as threads:
        asker = opened(file, 9)
        asked = [threads.submit(asker.ask, "Be brief.", prompt) for prompt in MANY[:3]]
        assert all(isinstance(each.exception(), TrainingError) for each in asked)


def test_answers_of_another_search_are_refused(tmp_path: Path) -> None:
    with answers(tmp_path / "answers.jsonl") as file:
        file.add(file.question("target", "Be brief.", "p"), Answer("yes", 1, 0.5))
    with pytest.raises(TrainingError, match="another configuration: name another `out`"):
        AnswerFile(tmp_path / "answers.jsonl", "b")


def test_a_damaged_answer_is_asked_for_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.jsonl"
    with answers(path) as file:
        keys = [file.question("target", str(i)) for i in range(4)]
        for key in keys:
            file.add(key, Answer("yes", 1, 0.5))
    lines = path.read_bytes().splitlines()
    lines[2], lines[4] = b"\0" * len(lines[2]), b'{"key": "a"}'  # the power was cut
    path.write_bytes(b"\n".join(lines) + b"\n")
    with answers(path) as file:
        assert [file.find(key) is not None for key in keys] == [True, False, True, False]
    assert f"{path}: 2 of 4 answers cannot be read, and are asked for again" in caplog.text
    assert len(path.read_text().splitlines()) == 1 + 2


def test_an_instruction_counts_once_it_has_a_reward_on_every_validation_prompt() -> None:
    board = Scoreboard(["a", "b"])
    board.add("first", "a", 1.0, 1)
    assert board.best(1) is None
    board.add("first", "b", 0.0, 2)
    board.add("second", "a", 1.0, 3)
    board.add("second", "elsewhere", 9.0, 4)
    board.add("second", "b", 0.5, 5)
    board.add("second", "b", 0.0, 6)
    assert board.means() == {"first": 0.5, "second": 0.625}
    assert [(each.calls, each.mean, each.instruction) for each in board.curve] == [
        (2, 0.5, "first"),
        (5, 0.75, "second"),
        (6, 0.625, "second"),
    ]


def test_a_proposed_text_is_an_instruction_whatever_braces_it_has() -> None:
    assert template(usable("Say {{ it }} {% now"))("x") == "x\n\nSay { { it } } { % now"
    assert template(usable("First {{ prompt }}, then stop."))("x") == "First x, then stop."
    assert template(usable("  "))("x") == "x"


def test_a_batch_waits_for_what_was_announced_and_no_longer_than_it_is_patient() -> None:
    batches: list[list[int]] = []
    gathering = Gathering[int](lambda batch: batches.append(sorted(batch)), pause=0.01, patience=0.5)

    def ask(questions: Sequence[int], seconds: float) -> None:
        with ThreadPoolExecutor(len(questions)) as threads:
            for i in questions:
                threads.submit(gathering.ask, i)
                time.sleep(seconds)

    gathering.announce(3)
    ask([1, 2, 3], 0.05)
    assert batches == [[1, 2, 3]]
    gathering.announce(3)
    ask([4, 5], 0.05)  # the third thread has failed
    assert batches[1:] == [[4, 5]]
    gathering.announce(0)
    ask([6, 7], 0.1)
    assert batches[2:] == [[6], [7]]
