"""Sequences: the places of the actions, and the packed form with the states in which they were chosen."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ragged

from alignpro.errors import DataError
from alignpro.models.sequences import SequenceBatch

PROMPTS = [[1, 2, 3], [4], [5, 6]]
COMPLETIONS = [[10, 11], [12, 13, 14], []]


@pytest.fixture
def batch() -> SequenceBatch:
    return SequenceBatch.build(PROMPTS, COMPLETIONS)


def test_actions_are_left_aligned(batch: SequenceBatch) -> None:
    assert batch.mask.tolist() == [[True, True, False], [True, True, True], [False] * 3]
    assert batch.actions.tolist() == [[10, 11, 0], [12, 13, 14], [0, 0, 0]]
    assert batch.targets.tolist() == [10, 11, 12, 13, 14]


def test_the_state_of_an_action_is_at_the_token_before_it(batch: SequenceBatch) -> None:
    packed = batch.pack()
    assert packed.ids.tolist() == [1, 2, 3, 10, 4, 12, 13, 5, 6]  # no state is needed at the last action
    assert packed.ids[packed.state_indices].tolist() == [3, 10, 4, 12, 13]
    assert packed.layout.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]


def test_neighbours_share_their_prompt() -> None:
    packed = SequenceBatch.build([[1, 2], [1, 2], [1, 2], [3], [1, 2]], [[7, 8], [9], [], [7], [5, 6]]).pack()
    assert packed.ids.tolist() == [1, 2, 7, 3, 1, 2, 5]
    assert packed.ids[packed.state_indices].tolist() == [2, 7, 2, 3, 2, 5]
    layout = packed.layout
    assert layout.parent.tolist() == [0, 0, 0, 1, 2]
    assert layout.prompt_lengths.tolist() == [2, 1, 2] and layout.continuation_lengths.tolist() == [1, 0, 0, 0, 1]
    assert torch.equal(layout.pad_indices[layout.unpad_indices], torch.arange(7))


def test_a_soft_prompt_takes_positions_before_each_prompt() -> None:
    packed = SequenceBatch.build([[1, 2], [1, 2], [3]], [[7, 8], [9], [7]]).pack(virtual_tokens=2)
    assert packed.ids.tolist() == [-1, -1, 1, 2, 7, -1, -1, 3]
    assert packed.layout.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert packed.ids[packed.state_indices].tolist() == [2, 7, 2, 3]


def test_a_common_prefix_is_packed_once() -> None:
    begin = list(range(10, 18))
    batch = SequenceBatch.build([[*begin, 1], [*begin, 1], [*begin, 1, 2], [*begin, 3]], [[7, 8], [9], [7, 6], [5]])
    packed = batch.pack(invocation=[17])
    assert packed.ids.tolist() == [*begin, 1, 7, 1, 2, 7, 3]
    assert packed.layout.prefix_length == 8
    assert packed.layout.positions.tolist() == [*range(8), 8, 9, 8, 9, 10, 8]
    assert packed.ids[packed.state_indices].tolist() == [1, 7, 1, 2, 7, 3]
    assert packed.active is not None and packed.active.tolist() == list(range(7, 14))  # includes the last common token
    assert batch.pack(invocation=[10]).active.tolist() == list(range(14))  # type: ignore[union-attr]


def test_a_common_prefix_ends_where_an_invocation_begins_that_another_prompt_has_later() -> None:
    """As of a conversation and its continuation: the tokens from there on have the LoRA in one of them alone."""
    begin = list(range(10, 22))  # with the invocation 21 at its end
    batch = SequenceBatch.build([[*begin, 1], [*begin, 1, 21, 2]], [[7], [8]])
    packed = batch.pack(invocation=[21])
    assert packed.layout.prefix_length == 11
    assert packed.ids.tolist() == [*begin[:11], 21, 1, 21, 1, 21, 2]
    assert packed.active is not None and packed.active.tolist() == [11, 12, 15, 16]
    early = SequenceBatch.build([[10, 21, *begin[1:9], 1], [10, 21, *begin[1:9], 1, 21]], [[7], [8]])
    assert early.pack(invocation=[21]).layout.prefix_length == 0  # too short to pay off


def test_a_prompt_that_is_a_prefix_of_all_others_keeps_a_token() -> None:
    begin = list(range(10, 20))
    packed = SequenceBatch.build([begin, [*begin, 1]], [[7], [8]]).pack()
    assert packed.layout.prefix_length == 9
    assert packed.ids.tolist() == [*begin[:-1], 19, 19, 1]
    assert packed.ids[packed.state_indices].tolist() == [19, 1]


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
    packed = batch.pack()
    expected = [token for p, c in zip(prompts, completions, strict=True) for token in [*p, *c][len(p) - 1 : -1] if c]
    assert packed.ids[packed.state_indices].tolist() == expected
    assert batch.mask.sum(1).tolist() == [len(completion) for completion in completions]


@pytest.mark.parametrize(("start", "stop"), [(0, 20), (0, 1), (3, 9), (19, 20)])
def test_rows_equal_a_separately_built_batch(start: int, stop: int) -> None:
    prompts, completions = ragged(20, 50, seed=1), ragged(20, 50, seed=2)
    part = SequenceBatch.build(prompts, completions).rows(start, stop)
    alone = SequenceBatch.build(prompts[start:stop], completions[start:stop])
    assert torch.equal(part.mask, alone.mask) and torch.equal(part.actions, alone.actions)
    assert torch.equal(part.pack().ids, alone.pack().ids)
    picked = SequenceBatch.build(prompts, completions).select(torch.arange(start, stop))
    assert torch.equal(picked.pack().state_indices, alone.pack().state_indices)


def test_rows_without_actions_keep_one_column(batch: SequenceBatch) -> None:
    part = batch.rows(2, 3)
    assert part.mask.tolist() == [[False]]
    assert part.pack().ids.tolist() == [5, 6]
    assert part.targets.tolist() == []


def test_a_prompt_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match="sequence 1: its prompt is empty"):
        SequenceBatch.build([[1], []], [[2], [3]])


def test_unequal_numbers_of_prompts_and_completions_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        SequenceBatch.build([[1], [2]], [[3]])
