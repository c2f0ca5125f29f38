"""A step's operations on the arrays of running sequences: C++ and NumPy write the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from alignpro.engine.cpp_sequence_arrays import CppSequenceArrays
from alignpro.engine.plan_buffers import ALL_ROWS, PlanBuffers, Shape, padded
from alignpro.engine.sampler import derive_seed, seed_state
from alignpro.engine.sequence_arrays import NO_SEGMENT, DecodeRows, SequenceArrays
from alignpro_kernels import cpp_library

PAGE, SEQUENCES, UNREAD, NEW = 4, 90, 5, 23
NO_ROWS = np.zeros(0, np.int64)

pytestmark = pytest.mark.skipif(cpp_library.unavailable() is not None, reason="the library of operators is not built")

Pair = tuple[SequenceArrays, CppSequenceArrays]


def add_segment(arrays: SequenceArrays, row: int, start: int, length: int, max_pages: int, serial: int) -> int:
    arrays.fit_segment(row, max_pages)
    arrays.max_pages[row], arrays.starts[row] = max_pages, start
    arrays.lengths[row], arrays.serials[row] = length, serial
    held = -(-length // PAGE)
    arrays.pages[row, :held] = np.arange(held) + 100 * row
    return row


def populated(arrays: SequenceArrays, seed: int) -> SequenceArrays:
    """Sequences on one, two or three segments: below a shared prompt, below one of its continuations, or alone."""
    generator = np.random.default_rng(seed)
    serials = iter(generator.permutation(1000))
    shared = add_segment(arrays, 1, 0, 9, 3, int(next(serials)))
    below = [add_segment(arrays, 2 + i, 9, 1 + 3 * i, 3, int(next(serials))) for i in range(6)]
    for row in range(SEQUENCES):
        nodes = [[], [shared], [shared, below[row % 6]]][row % 3]
        drawn = int(generator.integers(1, 9))
        room = -(-drawn // PAGE) * PAGE
        own = add_segment(arrays, 10 + row, 20, drawn, -(-(9 + NEW) // PAGE), int(next(serials)))
        path = [*nodes, own]
        arrays.fit_sequence(row, len(path))
        arrays.paths[:, row] = NO_SEGMENT
        arrays.paths[: len(path), row] = path
        slots_from = int(arrays.pages[own, room // PAGE - 1]) * PAGE - room + PAGE
        may_end, model = int(generator.integers(20, 40)), row % 2
        numbers = own, seed_state(row), drawn, 7, room, slots_from, may_end, len(path), model, 0, row % 4 // 2
        arrays.columns[row] = numbers
    return arrays


@pytest.fixture(params=[0, 1])
def pair(request: pytest.FixtureRequest) -> Pair:
    reference, fast = (populated(kind(UNREAD), request.param) for kind in (SequenceArrays, CppSequenceArrays))
    assert isinstance(fast, CppSequenceArrays)
    for arrays in (reference, fast):
        arrays.add_stop_tokens((3, 11))
    return reference, fast


def assert_same_arrays(reference: SequenceArrays, fast: SequenceArrays) -> None:
    names = [
        "columns",
        "tokens",
        "logprobs",
        "paths",
        "pages",
        "max_pages",
        "lengths",
        "starts",
        "serials",
        "stop_tokens",
    ]
    for name in names:
        assert getattr(reference, name).tobytes() == getattr(fast, name).tobytes(), name


def orders(reference: SequenceArrays, fast: SequenceArrays, rows: np.ndarray) -> DecodeRows:
    expected, found = reference.ordered(rows), fast.ordered(rows)
    assert found[2:] == expected[2:] and found.paths.flags.c_contiguous
    assert np.array_equal(found.rows, expected.rows) and np.array_equal(found.paths, expected.paths)
    return found


def batches(generator: np.random.Generator) -> Iterator[np.ndarray]:
    """All, in any order; one; those without a shared prompt; and then always most of the last, and some behind them."""
    yield generator.permutation(SEQUENCES)
    yield np.array([4])
    yield np.arange(0, SEQUENCES, 3)
    for _ in range(4):
        yield np.concatenate([np.arange(10, SEQUENCES), generator.permutation(10)])


def test_sequences_are_put_in_the_same_order(pair: Pair) -> None:
    for rows in batches(np.random.default_rng(2)):
        batch = orders(*pair, rows)
        again = orders(*pair, np.concatenate([batch.rows[1:], batch.rows[:1]]))
        assert np.array_equal(again.rows, batch.rows)


@pytest.mark.parametrize("active", [ALL_ROWS, 0, 17])
def test_the_inputs_of_a_step_have_the_same_bits(pair: Pair, active: int) -> None:
    for rows in batches(np.random.default_rng(3)):
        batch = orders(*pair, rows)
        acted_on = np.arange(min(active, len(rows)), dtype=np.int64) if active > 0 else NO_ROWS
        shape = Shape.for_batch(
            len(rows), [*zip(batch.segments, batch.pages, strict=True)], min(active, len(rows)), padded
        )
        buffers = [PlanBuffers(shape, torch.full((sum(shape.spaces),), 99, dtype=torch.int32)) for _ in pair]
        for arrays, into in zip(pair, buffers, strict=True):
            arrays.fill(batch, acted_on, into)
        assert torch.equal(buffers[0].memory, buffers[1].memory)
        assert_same_arrays(*pair)
        first = int(batch.rows[0])
        assert buffers[1].seeds[0] == derive_seed(first, int(pair[0].columns["count"][first]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawn_tokens_and_pages_are_noted_alike(pair: Pair, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(4)
    found_end = found_full = 0
    for _ in range(NEW):
        rows = generator.permutation(SEQUENCES)[: SEQUENCES - 3]
        tokens = torch.from_numpy(generator.integers(0, 40, len(rows)))
        logprobs = torch.from_numpy(generator.normal(size=len(rows))).to(dtype)
        expected, found = (arrays.add_tokens(rows, tokens, logprobs) for arrays in pair)
        assert found[:2] == expected[:2] and found[2] == pytest.approx(expected[2], rel=1e-12)
        found_end, found_full = found_end + len(found[0]), found_full + len(found[1])
        assert set(rows[np.isin(tokens.numpy(), [3, 11])]) <= set(found[0])
        (growing, same), (grown, also_same) = (arrays.without_room(0) for arrays in pair)
        assert np.array_equal(growing, grown) and same == also_same == (len(set(growing % 2)) <= 1)
        assert all(not len(arrays.without_room(1)[0]) for arrays in pair)
        new = list(range(5000, 5000 + len(growing)))
        for arrays in pair:
            arrays.add_pages(growing, new, PAGE)
        assert_same_arrays(*pair)
    assert found_end > 30 and found_full > 100


def test_what_is_not_finite_is_not_added(pair: Pair) -> None:
    before = pair[0].columns.copy()
    for arrays in pair:
        logprobs = torch.tensor([-1.0, -torch.inf, -1.0])
        may_end, full, total = arrays.add_tokens(np.arange(3), torch.tensor([3, 3, 3]), logprobs)
        assert (may_end, full, total) == ([], [], -torch.inf) and np.array_equal(arrays.columns, before)


def test_seeds_and_what_is_drawn_alike_are_found_alike(pair: Pair) -> None:
    rows = np.array([0, 1, 4, 5])
    assert np.array_equal(*(arrays.seeds(rows) for arrays in pair))
    for arrays in pair:
        assert arrays.drawn_alike(rows) and not arrays.drawn_alike(np.array([0, 1, 2]))
        assert arrays.ordered(rows).alike and not arrays.ordered(np.array([0, 1, 2])).alike


def test_what_would_be_written_elsewhere_is_an_error(pair: Pair) -> None:
    with pytest.raises(ValueError, match="rows: number 1 is 5000 of"):
        pair[1].ordered(np.array([0, 5000]))
    batch = orders(*pair, np.arange(9))
    shape = Shape.for_batch(9, [*zip(batch.segments, batch.pages, strict=True)], 0, padded)
    buffers = PlanBuffers(shape, torch.zeros(sum(shape.spaces), dtype=torch.int32))
    with pytest.raises(ValueError, match="the batch does not fit in its plan"):
        pair[1].fill(orders(*pair, np.arange(40)), NO_ROWS, buffers)
    buffers.memory = buffers.memory[:-100]
    with pytest.raises(ValueError, match="memory: too small"):
        pair[1].fill(batch, NO_ROWS, buffers)
