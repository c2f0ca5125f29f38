"""Padded sequences: where the actions are, and the states in which they were chosen."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ragged

from alignpro.errors import DataError
from alignpro.sequences import SequenceBatch

PROMPTS = [[1, 2, 3], [4], [5, 6]]
COMPLETIONS = [[10, 11], [12, 13, 14], []]


@pytest.fixture
def batch() -> SequenceBatch:
    return SequenceBatch.build(PROMPTS, COMPLETIONS)


def test_are_padded_on_the_right(batch: SequenceBatch) -> None:
    assert batch.ids.tolist() == [[1, 2, 3, 10, 11], [4, 12, 13, 14, 0], [5, 6, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 5, [True] * 4 + [False], [True] * 2 + [False] * 3]
    assert len(batch) == 3


def test_actions_are_left_aligned(batch: SequenceBatch) -> None:
    assert batch.mask.tolist() == [[True, True, False], [True, True, True], [False] * 3]
    assert batch.actions.tolist() == [[10, 11, 0], [12, 13, 14], [0, 0, 0]]
    assert batch.targets.tolist() == [10, 11, 12, 13, 14]


def test_the_state_of_an_action_is_at_the_token_before_it(batch: SequenceBatch) -> None:
    assert batch.positions.tolist() == [[2, 3, 0], [0, 1, 2], [0, 0, 0]]
    hidden = batch.ids.unsqueeze(-1) * 1.0  # a state that is its token
    assert batch.action_states(hidden).squeeze(-1).tolist() == [3, 10, 4, 12, 13]


def test_scatter_puts_values_back(batch: SequenceBatch) -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    scattered = batch.scatter(values)
    assert scattered.tolist() == [[1, 2, 0], [3, 4, 5], [0, 0, 0]]
    scattered.sum(1)[1].backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 0, 1, 1, 1]


def test_every_action_follows_its_state() -> None:
    prompts, completions = ragged(20, 50, seed=1), ragged(20, 50, seed=2)
    batch = SequenceBatch.build(prompts, completions)
    rows = torch.arange(20)[:, None].expand_as(batch.positions)[batch.mask]
    assert torch.equal(batch.ids[rows, batch.positions[batch.mask] + 1], batch.targets)
    assert batch.mask.sum(1).tolist() == [len(completion) for completion in completions]
    assert batch.attention_mask.sum(1).tolist() == [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]


@pytest.mark.parametrize(("start", "stop"), [(0, 20), (0, 1), (3, 9), (19, 20)])
def test_rows_are_those_of_a_batch_of_their_own(start: int, stop: int) -> None:
    prompts, completions = ragged(20, 50, seed=1), ragged(20, 50, seed=2)
    part = SequenceBatch.build(prompts, completions).rows(start, stop)
    alone = SequenceBatch.build(prompts[start:stop], completions[start:stop])
    for name in ("ids", "attention_mask", "mask", "positions", "actions"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name


def test_rows_without_actions_keep_one_column(batch: SequenceBatch) -> None:
    part = batch.rows(2, 3)
    assert part.mask.tolist() == [[False]]
    assert part.ids.tolist() == [[5, 6]]
    assert part.targets.tolist() == []


def test_a_prompt_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match="sequence 1: its prompt has no token"):
        SequenceBatch.build([[1], []], [[2], [3]])


def test_as_many_completions_as_prompts() -> None:
    with pytest.raises(ValueError, match="zip"):
        SequenceBatch.build([[1], [2]], [[3]])
