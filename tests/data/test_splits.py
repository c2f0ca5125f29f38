import json
import random

import pytest

from alignpro.config import DataConfig
from alignpro.data import Message, Prompt, is_held_out, load_prompts, split
from alignpro.errors import DataError

PROMPTS = [Prompt.from_text(f"question {i}") for i in range(2000)]


def texts(prompts):
    return {prompt.text for prompt in prompts}


def test_sides_are_disjoint_ordered_and_of_the_requested_size():
    training, heldout = split(PROMPTS, 0.1)
    assert texts(training) & texts(heldout) == set()
    for side in (training, heldout):
        assert side == [p for p in PROMPTS if p.text in texts(side)]
    assert len(training) + len(heldout) == len(PROMPTS)
    # 0.1 · 2000 = 200, standard deviation √(2000 · 0.1 · 0.9) ≈ 13
    assert 150 < len(heldout) < 250


def test_a_prompt_keeps_its_side_when_data_grows_or_is_shuffled():
    few = texts(split(PROMPTS[:500], 0.2)[1])
    shuffled = PROMPTS.copy()
    random.Random(0).shuffle(shuffled)
    many = texts(split(shuffled, 0.2)[1])
    assert few == many & texts(PROMPTS[:500])


def test_more_holdout_only_adds_to_the_held_out_side():
    assert texts(split(PROMPTS, 0.1)[1]) < texts(split(PROMPTS, 0.3)[1])


def test_the_same_prompt_of_two_data_sets_is_on_the_same_side(tmp_path):
    questions = [f"question {i}" for i in range(200)]
    lines = [json.dumps({"prompt": text, "chosen": "a", "rejected": "b"}) for text in questions]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / "plain.csv").write_text("\n".join(["question", *reversed(questions)]))
    sides = []
    for name in ("pairs.jsonl", "plain.csv"):
        data = load_prompts(DataConfig(source=str(tmp_path / name)))
        sides.append(texts(split(data.prompts, 0.3)[1]))
    assert sides[0] == sides[1] != set()


def test_the_side_depends_only_on_the_conversation():
    plain = PROMPTS[0]
    annotated = Prompt(plain.messages, rewrite="x", metadata={"answer": 1}, source="elsewhere:1")
    assert is_held_out(plain, 0.5) == is_held_out(annotated, 0.5)
    others = [Prompt((Message("system", str(i)), *plain.messages)) for i in range(64)]
    assert len({is_held_out(p, 0.5) for p in others}) == 2


def test_the_hash_never_changes():
    """A change of the hash would move prompts between training and evaluation of existing runs."""
    assert [is_held_out(p, 0.5) for p in PROMPTS[:8]] == [True, False, True, False, False, True, True, True]


def test_a_split_without_training_prompts_is_an_error():
    prompt = next(p for p in PROMPTS if is_held_out(p, 0.5))
    with pytest.raises(DataError, match=r"data\.holdout=0\.5 leaves none of 1 prompts"):
        split([prompt], 0.5)
    assert split([], 0.5) == ([], [])
    assert split([prompt], 0.0) == ([prompt], [])
