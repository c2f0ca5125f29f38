"""Intervals hold the truth as often as they say: a quick part of the simulation, and slowly all of it."""

import json
from pathlib import Path

import pytest

import benchmarks.coverage
from benchmarks.coverage import (
    EQUAL_ARMS,
    SIZES,
    Cell,
    coverage,
    familywise_error,
    gap_coverage,
    kinds,
    table,
)

KINDS = {kind.name: kind for kind in kinds()}


def check(cell: Cell, noise: float = 0.0) -> None:
    assert cell.coverage >= 0.93 - noise, cell
    if cell.prompts >= 64 and not cell.exact:
        assert cell.coverage <= 0.97 + noise, cell


@pytest.mark.parametrize("name", KINDS)
def test_intervals_of_few_prompts_hold_the_truth(name: str) -> None:
    for prompts in (8, 20, 64):
        check(coverage(KINDS[name], prompts, repeats=1500, seed=1), noise=0.015)


def test_equal_arms_are_seldom_called_different() -> None:
    for name, draw in EQUAL_ARMS.items():
        assert familywise_error(draw, 20, repeats=1500, binary=name == "0/1") <= 0.06, name


def test_the_table_shows_what_is_not_estimable_apart() -> None:
    lines = table([Cell("a", 8, 0.95, 0.125, False), Cell("a", 20, 0.95, 0.0, False)])
    assert lines[2] == "| a | 0.950 (12.5 % not estimable) | 0.950 |  |  |  |"


@pytest.mark.slow
@pytest.mark.parametrize("prompts", SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_every_cell_of_the_simulation_holds_the_truth(name: str, prompts: int) -> None:
    check(coverage(KINDS[name], prompts, repeats=10_000, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("prompts", SIZES[:-1])
def test_shares_of_a_gap_hold_the_truth(prompts: int) -> None:
    check(gap_coverage(prompts, gap=1.0, repeats=4000))


@pytest.mark.slow
@pytest.mark.parametrize("prompts", SIZES)
@pytest.mark.parametrize("name", EQUAL_ARMS)
def test_the_familywise_error_is_at_most_five_percent(name: str, prompts: int) -> None:
    assert familywise_error(EQUAL_ARMS[name], prompts, repeats=10_000, binary=name == "0/1") <= 0.05


def test_the_recorded_simulation_reaches_what_the_documentation_says() -> None:
    document = json.loads(
        Path(benchmarks.coverage.__file__).with_name("results").joinpath("cpu/coverage.json").read_text()
    )
    cells = [Cell(**cell) for cell in document["cells"]]
    assert {cell.kind for cell in cells} >= set(KINDS)
    for cell in cells:
        check(cell)
    assert max(error for errors in document["familywise_error"].values() for error in errors.values()) <= 0.05
