"""The order of the data, which is a function of seed and step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from alignpro.data import Prompt
from alignpro.errors import CheckpointError, DataError
from alignpro.training.resume import check_data
from alignpro.training.stream import PromptStream

PROMPTS = [Prompt.from_text(f"question {i}", source=f"file:{i}") for i in range(10)]


def texts(stream: PromptStream, steps: range) -> list[str]:
    return [prompt.text for step in steps for prompt in stream.batch(step)]


@pytest.mark.parametrize("batch_size", [1, 3, 10, 23])
def test_every_epoch_has_every_prompt_once(batch_size: int) -> None:
    seen = texts(PromptStream(PROMPTS, batch_size, seed=0), range(-(-30 // batch_size)))[:30]
    for epoch in range(3):
        assert Counter(seen[10 * epoch : 10 * epoch + 10]) == Counter(p.text for p in PROMPTS)
    assert seen[:10] != seen[10:20]


def test_a_batch_depends_only_on_seed_and_step() -> None:
    whole = PromptStream(PROMPTS, 3, seed=0)
    in_order = [whole.batch(step) for step in range(20)]
    assert [PromptStream(PROMPTS, 3, seed=0).batch(step) for step in (17, 2)] == [in_order[17], in_order[2]]


def test_the_seed_decides_the_order() -> None:
    assert texts(PromptStream(PROMPTS, 3, 0), range(3)) != texts(PromptStream(PROMPTS, 3, 1), range(3))


def test_other_data_is_refused() -> None:
    start = [replace(PROMPTS[0], rewrite="a", metadata={"answer": 1, "nested": {"b": [1, 2]}}), *PROMPTS[1:]]
    saved = PromptStream(start, 3, 0).fingerprint
    check_data(saved, PromptStream(list(start), 5, 1).fingerprint)
    check_data(saved, PromptStream([replace(prompt, source="moved") for prompt in start], 3, 0).fingerprint)
    for changed in (
        start[:-1],
        start[::-1],
        [start[0].with_text("other"), *start[1:]],
        [replace(start[0], rewrite="b"), *start[1:]],
        [replace(start[0], response="b"), *start[1:]],
        [replace(start[0], chosen="b"), *start[1:]],
        [replace(start[0], rejected="b"), *start[1:]],
        [replace(start[0], metadata={"answer": 2, "nested": {"b": [1, 2]}}), *start[1:]],
        [replace(start[0], metadata={"answer": 1, "nested": {"b": [1, 3]}}), *start[1:]],
    ):
        with pytest.raises(CheckpointError, match="training data is not what this run started with"):
            check_data(saved, PromptStream(changed, 3, 0).fingerprint)


def test_no_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="no prompt to train on"):
        PromptStream([], 3, 0)


@pytest.mark.parametrize(("batch_size", "warned"), [(10, False), (11, True)])
def test_prompts_that_recur_within_a_step_give_a_warning(
    batch_size: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    PromptStream(PROMPTS, batch_size, 0)
    assert ("a step takes 11 prompts and there are 10" in caplog.text) == warned
