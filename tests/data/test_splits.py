import json
import random

import pytest

from alignpro.config import DataConfig
from alignpro.data import Message, Prompt, choose, cluster_labels, is_held_out, load_prompts, split
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


def conversation(*texts: str, system: str | None = None) -> Prompt:
    """Return a conversation of user, assistant, user, …"""
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return Prompt((*([Message("system", system)] if system else []), *turns))


def test_all_continuations_of_a_conversation_are_on_one_side():
    sides = []
    for i in range(64):
        start = f"question {i}"
        family = [
            conversation(start),
            conversation(start, "a", "and then?"),
            conversation(start, "b", "why?", "c", "so?"),
            conversation(start, "a", "and then?", system="Be brief."),
        ]
        assert len({is_held_out(prompt, 0.5) for prompt in family}) == 1
        sides.append(is_held_out(family[0], 0.5))
    assert 16 < sum(sides) < 48


def test_the_split_of_earlier_versions_hashes_the_whole_conversation():
    family = [conversation("x", str(i), "y") for i in range(64)]
    assert len({is_held_out(prompt, 0.5, "conversation") for prompt in family}) == 2
    assert split(PROMPTS, 0.3, "conversation") == split(PROMPTS, 0.3, "first_turn"), "single turns keep their side"


def test_some_prompts_are_chosen_from_all_sources_whatever_their_order():
    """A file in the order of its sources, of which the second is two thirds."""
    prompts = [Prompt.from_text(f"{source} {i}") for source, n in (("a", 200), ("b", 400)) for i in range(n)]
    chosen = choose(prompts, 60)
    assert len(chosen) == 60
    assert 28 < sum(prompt.text.startswith("b") for prompt in chosen) < 52
    assert chosen == [prompt for prompt in prompts if prompt in chosen], "in the given order"
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert texts(choose(shuffled, 60)) == texts(chosen)
    assert texts(chosen) < texts(choose(prompts, 90))
    assert choose(prompts, 600) == choose(prompts, 10**6) == prompts


def test_clusters_are_a_key_of_the_metadata_the_source_or_the_first_turn():
    prompts = [
        Prompt.from_text("x", metadata={"template": 1}, source="f.jsonl:1"),
        Prompt.from_text("y", metadata={"template": 2}, source="f.jsonl:2"),
        Prompt(conversation("x", "a", "z").messages, metadata={"template": 1}, source="hub/data:train:row 3"),
    ]

    def same(cluster: str | None) -> list[bool]:
        a, b, c = cluster_labels(prompts, cluster)
        return [a == b, a == c]

    assert same(None) == [False, True]
    assert same("template") == [False, True]
    assert same("source") == [True, False]
    with pytest.raises(DataError, match=r"f\.jsonl:1: data\.cluster=topic: .*\(keys: template\); map a column"):
        cluster_labels(prompts, "topic")


def test_the_side_does_not_depend_on_annotations():
    plain = PROMPTS[0]
    annotated = Prompt(plain.messages, rewrite="x", metadata={"answer": 1}, source="elsewhere:1")
    assert is_held_out(plain, 0.5) == is_held_out(annotated, 0.5)


def test_the_hash_never_changes():
    """A change of the hash would move prompts between training and evaluation of existing runs."""
    assert [is_held_out(p, 0.5) for p in PROMPTS[:8]] == [True, False, True, False, False, True, True, True]


def test_a_split_without_training_prompts_is_an_error():
    prompt = next(p for p in PROMPTS if is_held_out(p, 0.5))
    with pytest.raises(DataError, match=r"data\.holdout=0\.5 leaves none of 1 prompts"):
        split([prompt], 0.5)
    assert split([], 0.5) == ([], [])
    assert split([prompt], 0.0) == ([prompt], [])
