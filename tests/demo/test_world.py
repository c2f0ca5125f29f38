"""The toy task: right answers, disjoint splits, records that depend only on the seed."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from alignpro.data import Prompt
from alignpro.demo import world
from alignpro.demo.phrases import FRAMES, HELDOUT_CLOSERS, HELDOUT_OPENERS, KEYS, TASKS, cores
from alignpro.errors import RewardError


def as_prompt(record: dict) -> Prompt:
    return Prompt.from_text(record["prompt"], metadata=record["metadata"])


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("reverse", "enots"),
        ("sort", "enost"),
        ("upper", "STONE"),
        ("consonants", "stn"),
        ("first", "s"),
        ("last", "e"),
        ("length", "5"),
    ],
)
def test_each_task_has_its_answer(task, answer):
    assert world.solve(task, "stone") == answer


def test_every_task_has_a_solver_and_phrasings_in_both_splits():
    for task in TASKS:
        assert world.solve(task, "stone")
        assert cores(task, heldout=False)
        assert cores(task, heldout=True)


def test_heldout_cores_are_new_combinations_of_known_parts():
    for task in TASKS:
        training, heldout = cores(task, heldout=False), cores(task, heldout=True)
        assert not {core.fill("stone") for core in training} & {core.fill("stone") for core in heldout}
        assert {core.key for core in heldout} <= {core.key for core in training}
    known_frames = {core.frame for task in TASKS for core in cores(task, heldout=False)}
    assert known_frames == {frame for frames in FRAMES.values() for frame in frames}


def test_a_core_never_asks_for_two_tasks():
    asked = Counter(core.fill("stone") for task in TASKS for side in (False, True) for core in cores(task, side))
    assert max(asked.values()) == 1
    keys = [key for kinds in KEYS.values() for names in kinds.values() for key in names]
    assert len(set(keys)) == len(keys)


def test_the_split_by_argument_is_stable():
    """Shipped weights depend on which words were held out, so the split must never change."""
    words = ("stone", "bread", "cloud", "piano", "apple", "green", "water", "chair")
    assert [word for word in words if world.is_heldout_argument(word)] == ["piano", "water"]


def test_nothing_held_out_is_trained_on():
    heldout = world.prompt_records(600, 0, heldout=True)
    heldout_arguments = {record["metadata"]["argument"] for record in heldout}
    trained = [
        *(
            record["prompt"]
            for careless in (False, True)
            for record in world.target_records(3000, 0, careless=careless)
        ),
        *(text for record in world.prompter_records(3000, 0) for text in (record["prompt"], record["rewrite"])),
        *(record["prompt"] for record in world.prompt_records(3000, 0, heldout=False)),
    ]
    words = {word.strip(".,:?!") for text in trained for word in text.split()}
    assert not heldout_arguments & words
    assert not any(text.startswith(HELDOUT_OPENERS) or text.endswith(HELDOUT_CLOSERS) for text in trained)
    assert not {record["prompt"] for record in heldout} & set(trained)


def test_heldout_prompts_have_heldout_cores():
    rng = random.Random(0)
    for _ in range(200):
        request = world.draw_request(rng, "reverse", "stone", heldout=True)
        if request.clutter == 0:
            assert request.text in {core.fill("stone") for core in cores("reverse", heldout=True)}


def test_records_depend_only_on_the_seed():
    for draw in (
        lambda seed: world.target_records(50, seed, careless=False),
        lambda seed: world.target_records(50, seed, careless=True),
        lambda seed: world.prompter_records(50, seed),
        lambda seed: world.prompt_records(50, seed, heldout=False),
        lambda seed: world.prompt_records(50, seed, heldout=True),
    ):
        assert draw(3) == draw(3)
        assert draw(3) != draw(4)


def test_canonical_requests_are_always_answered_correctly_and_casual_ones_sometimes():
    records = world.target_records(4000, 0, careless=True)
    casual = []
    for record in records:
        task, _, argument = record["prompt"].partition(": ")
        if task in TASKS and argument.isalpha():
            assert record["response"] == world.solve(task, argument)
        else:
            casual.append(record["response"] in ("what?", "huh?"))
    assert len(casual) / 4000 == pytest.approx(1 - world.CANONICAL_SHARE, abs=0.05)
    wrong = 1 - sum(share * weight for share, weight in zip(world.RIGHT_SHARE, (0.22, 0.47, 0.27, 0.04), strict=True))
    assert sum(casual) / len(casual) == pytest.approx(0.75 * wrong, abs=0.06)


def test_careful_data_has_no_answers_that_ask_back():
    answers = {record["response"] for record in world.target_records(2000, 0, careless=False)}
    assert not answers & {"what?", "huh?"}


def test_typos_leave_the_argument_intact():
    rng = random.Random(1)
    for _ in range(500):
        task = rng.choice(TASKS)
        argument = world.draw_argument(rng, heldout=False)
        request = world.draw_request(rng, task, argument, heldout=False)
        assert argument in request.text
        assert len(request.text) <= world.MAX_CHARACTERS
        assert 0 <= request.clutter <= 3


def test_arguments_are_pronounceable_and_in_their_split():
    rng = random.Random(2)
    for heldout in (False, True):
        for _ in range(300):
            word = world.draw_argument(rng, heldout=heldout)
            assert 4 <= len(word) <= 6
            assert world.is_heldout_argument(word) == heldout
            kinds = "".join("v" if letter in world.VOWELS else "c" for letter in word)
            assert "vvv" not in kinds and "ccc" not in kinds


def test_rewrites_keep_the_argument_and_occur_in_the_configured_shares():
    records = world.prompter_records(4000, 0)
    assert sum(record["rewrite"] == record["prompt"] for record in records) / 4000 == pytest.approx(
        world.REWRITE_SHARES["verbatim"], abs=0.03
    )
    canonical = [record for record in records if record["rewrite"].partition(": ")[0] in TASKS]
    expected = world.REWRITE_SHARES["canonical"] + world.REWRITE_SHARES["wrong_task"]
    assert len(canonical) / 4000 == pytest.approx(expected, abs=0.03)
    assert all(record["rewrite"].partition(": ")[2] in record["prompt"] for record in canonical)


def test_prompts_cover_the_tasks_evenly_and_differ():
    records = world.prompt_records(70, 0, heldout=True)
    assert Counter(record["metadata"]["task"] for record in records) == dict.fromkeys(TASKS, 10)
    assert len({record["prompt"] for record in records}) == 70


def test_reward_is_exact_match_against_the_original_prompt():
    prompts = [as_prompt(record) for record in world.prompt_records(20, 0, heldout=True)]
    answers = [prompt.metadata["answer"] for prompt in prompts]
    assert world.reward(prompts, answers) == [1.0] * 20
    assert world.reward(prompts, [answer + "\n" for answer in answers]) == [1.0] * 20
    assert world.reward(prompts, ["what?"] * 20) == [0.0] * 20
    assert world.reward(prompts, [""] * 20) == [0.0] * 20


def test_reward_without_an_answer_names_the_prompt():
    prompt = Prompt.from_text("stone backwards??", source="prompts.jsonl:3")
    with pytest.raises(RewardError, match=r"prompts\.jsonl:3.*answer"):
        world.reward([prompt], ["enots"])


def test_records_are_written_as_json_lines(tmp_path):
    records = world.prompt_records(5, 0, heldout=False)
    path = tmp_path / "data" / "train.jsonl"
    world.write_records(path, records)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
