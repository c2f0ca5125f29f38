"""python -m benchmarks.coverage: how often the intervals of `alignpro.theory.statistics` hold the truth, by simulation.

Each cell draws many data sets of one kind and size and counts the 95 % intervals that hold the true value. Data sets whose
interval is not estimable are counted apart. Prints a table and writes JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import scipy.stats
import typer

from alignpro.theory.statistics import Clusters, FloatArray, NotEstimable, gap_recovered, holm
from alignpro.theory.statistics.binary import korn_graubard, tango, tango_p_value
from alignpro.theory.statistics.intervals import mean_bounds, p_values
from alignpro.theory.statistics.seeds import seed_error
from benchmarks import command
from benchmarks.session import Session

CONFIDENCE = 0.95
SIZES = (8, 20, 64, 200, 2000)
CLUSTER = 5
"""Prompts of a cluster."""
SEEDS = (2, 3, 5)
"""Numbers of trainings."""
ARMS = 4
"""Arms that are compared with no fine-tuning."""

Draw = Callable[[np.random.Generator, int, int], FloatArray]
"""(generator, R, P) -> rewards (R, P), or (R, P, n) with the rewards of a prompt on the last axis."""

EQUAL_ARMS: dict[str, Draw] = {
    "skewed": lambda g, R, P: g.exponential(size=(R, P)),
    "heavy-tailed": lambda g, R, P: g.standard_t(3, size=(R, P)),
    "0/1": lambda g, R, P: _flips(g, np.full((R, P), 0.6)),
}
"""Kinds of rewards for the familywise error."""

app = command.new_app()


@dataclass(frozen=True)
class Kind:
    """A kind of data: how it is drawn, and what the truth is."""

    name: str
    draw: Draw
    truth: float
    method: str
    """``mean`` for values that are not binary, ``proportion`` for 0/1 rewards, ``tango`` for differences of single ones."""
    cluster: int = 1
    """Prompts per cluster."""

    @property
    def exact(self) -> bool:
        """Whether the method guarantees its coverage, and may exceed it."""
        return self.method == "proportion"


@dataclass(frozen=True)
class Cell:
    """The result for one kind of data and number of prompts."""

    kind: str
    prompts: int
    coverage: float
    not_estimable: float
    exact: bool


def kinds() -> Iterator[Kind]:
    """Yield all kinds of data: means of one arm, and paired differences of two."""
    yield Kind("heavy-tailed, t with 3 df", lambda g, R, P: g.standard_t(3, size=(R, P)), 0.0, "mean")
    yield Kind("skewed, exponential", lambda g, R, P: g.exponential(size=(R, P)), 1.0, "mean")
    yield Kind("tied, five levels", _levels({1: 0.05, 2: 0.05, 3: 0.1, 4: 0.3, 5: 0.5}), 4.15, "mean")
    for p in (0.3, 0.9):
        yield Kind(f"0/1, one reward, p = {p}", _single_flips(p), p, "proportion")
    for a, b in ((1, 2), (9, 1)):
        yield Kind(f"0/1, eight rewards, p ~ Beta({a}, {b})", _beta_flips(a, b, 1, 8), a / (a + b), "proportion")
    for icc in (0.1, 0.3, 1.0):
        yield Kind(f"clusters of {CLUSTER}, correlation {icc:g}", _clustered(icc), 0.0, "mean", CLUSTER)
    yield Kind(
        f"0/1 in clusters of {CLUSTER}, p ~ Beta(2, 2)", _beta_flips(2, 2, CLUSTER, 1), 0.5, "proportion", CLUSTER
    )
    yield Kind(
        "paired, skewed arms", lambda g, R, P: g.exponential(size=(R, P)) - g.exponential(size=(R, P)), 0.0, "mean"
    )
    yield Kind("paired, heavy-tailed arms", _heavy_difference, 0.0, "mean")
    yield Kind("paired, tied", _levels({-1: 0.2, 0: 0.5, 2: 0.3}), 0.4, "mean")
    for up, down in ((0.1, 0.1), (0.3, 0.1), (0.6, 0.3)):
        draw = _levels({1: up, -1: down, 0: 1 - up - down})
        yield Kind(f"paired 0/1, one reward, {up} up and {down} down", draw, up - down, "tango")
    yield Kind("paired 0/1, eight rewards, p + 0.2 x", _gains, 0.1, "mean")
    yield Kind(
        f"paired, skewed, clusters of {CLUSTER}, correlation 0.3", _clustered(0.3, skew=0.3), 0.0, "mean", CLUSTER
    )


def coverage(kind: Kind, prompts: int, repeats: int, seed: int) -> Cell:
    """Count how many of ``repeats`` intervals hold the truth."""
    draw = np.random.default_rng([seed, prompts])
    held = estimable = total = 0
    size = max(1, min(repeats, 4_000_000 // (prompts * 8)))
    clusters = Clusters([place // kind.cluster for place in range(prompts)])
    while total < repeats:
        rewards = kind.draw(draw, min(size, repeats - total), prompts)
        total += len(rewards)
        low, high, given = _bounds(kind, rewards, clusters)
        held += int((given & (low <= kind.truth) & (kind.truth <= high)).sum())
        estimable += int(given.sum())
    return Cell(kind.name, prompts, held / estimable, 1 - estimable / total, kind.exact)


def familywise_error(draw: Draw, prompts: int, repeats: int, *, binary: bool = False) -> float:
    """Share of reports on `ARMS` arms as good as no fine-tuning in which Holm's adjustment leaves a significant one.

    Args:
        draw: Draws the rewards (R, P) of an arm.
        prompts: P.
        repeats: Number of reports.
        binary: Whether the rewards are single ones of 0 or 1.
    """
    generator = np.random.default_rng([1, prompts])
    clusters = Clusters.single(prompts)
    errors = total = 0
    while total < repeats:
        size = max(1, min(repeats - total, 4_000_000 // (prompts * 8)))
        base, *arms = (draw(generator, size, prompts) for _ in range(ARMS + 1))
        differences = [arm - base for arm in arms]
        p = [tango_p_value(each) if binary else p_values(clusters.error(each), clusters) for each in differences]
        errors += sum(min(holm(row)) < 1 - CONFIDENCE for row in np.stack(p, axis=1).tolist())
        total += size
    return errors / total


def gap_coverage(prompts: int, gap: float, repeats: int) -> Cell:
    """Fieller's interval of a share of 0.6 of a gap, among the data sets in which the gap is clear of zero."""
    generator = np.random.default_rng([3, prompts])
    held = estimable = 0
    for _ in range(repeats):
        base = generator.normal(size=prompts)
        ours, oracle = (base + share * gap + 0.5 * generator.exponential(size=prompts) - 0.5 for share in (0.6, 1.0))
        share = gap_recovered(base, ours, oracle)
        if not isinstance(share.interval, NotEstimable):
            estimable += 1
            held += int(share.low <= 0.6 <= share.high)
    return Cell(
        f"gap recovered, gap of {gap:g} SD", prompts, held / max(1, estimable), 1 - estimable / repeats, exact=False
    )


def seed_coverage(seeds: int, between: float, prompts: int, repeats: int) -> Cell:
    """The interval over seeds and prompts of a paired difference, in clusters of `CLUSTER` prompts.

    Args:
        seeds: Number of trainings.
        between: Standard deviation between them; that between clusters and between their prompts is 0.2 each, and that of what
            a seed and a prompt have alone 0.3.
        prompts: P.
        repeats: Number of data sets.
    """
    generator = np.random.default_rng([4, seeds, prompts])
    clusters = Clusters([place // CLUSTER for place in range(prompts)])
    held = total = 0
    while total < repeats:
        size = max(1, min(repeats - total, 4_000_000 // (prompts * seeds)))
        shared = np.repeat(generator.normal(size=(size, 1, clusters.count)), CLUSTER, axis=-1)[..., :prompts]
        tables = (
            between * generator.normal(size=(size, seeds, 1))
            + 0.2 * (shared + generator.normal(size=(size, 1, prompts)))
            + 0.3 * generator.normal(size=(size, seeds, prompts))
        )
        error = seed_error([tables], clusters)
        limit = scipy.stats.t.isf((1 - CONFIDENCE) / 2, error.degrees_of_freedom)
        held += int((np.abs(error.mean) <= limit * error.stderr).sum())
        total += size
    return Cell(f"{seeds} seeds, {between:g} between them", prompts, held / total, 0.0, exact=False)


@app.command(help=__doc__)
def run(
    repeats: Annotated[int, typer.Option(min=100, help="Data sets per cell.")] = 10_000,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("coverage", device="cpu", file=json_file)
    cells = [coverage(kind, prompts, repeats, seed=0) for kind in kinds() for prompts in SIZES]
    cells += [gap_coverage(prompts, gap=1.0, repeats=max(100, repeats // 4)) for prompts in SIZES[:-1]]
    over_seeds = [
        seed_coverage(seeds, between, prompts, repeats)
        for seeds in SEEDS
        for between in (0.0, 0.05, 0.2)
        for prompts in SIZES[1:4]
    ]
    errors = {
        name: {n: familywise_error(draw, n, repeats, binary=name == "0/1") for n in SIZES}
        for name, draw in EQUAL_ARMS.items()
    }
    document: dict[str, Any] = {
        "run": session.describe(),
        "repeats": repeats,
        "cells": [vars(cell) for cell in cells],
        "over_seeds": [vars(cell) for cell in over_seeds],
        "familywise_error": errors,
    }
    session.save(document)
    typer.echo("\n".join(table([*cells, *over_seeds])))
    for name, each in errors.items():
        typer.echo(f"familywise error, {name}: " + ", ".join(f"{error:.3f} (n = {n})" for n, error in each.items()))
    typer.echo(f"{session.file}")


def table(cells: list[Cell]) -> list[str]:
    """Lines of a table in Markdown: coverage by kind and number of prompts, with the share that is not estimable."""
    lines = [f"| | {' | '.join(map(str, SIZES))} |", "|---" * (len(SIZES) + 1) + "|"]
    for kind in dict.fromkeys(cell.kind for cell in cells):
        of_size = {cell.prompts: cell for cell in cells if cell.kind == kind}
        shown = [_shown(of_size[n]) if n in of_size else "" for n in SIZES]
        lines.append(f"| {kind} | {' | '.join(shown)} |")
    return lines


def _shown(cell: Cell) -> str:
    missing = f" ({100 * cell.not_estimable:.1f} % not estimable)" if cell.not_estimable else ""
    return f"{cell.coverage:.3f}{missing}"


def _bounds(
    kind: Kind, rewards: FloatArray, clusters: Clusters
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    """Both ends of the intervals, and whether each is estimable, (R,)."""
    if kind.method == "proportion":
        low, high = korn_graubard(rewards.mean(2), rewards.shape[2], clusters, CONFIDENCE)
        return low, high, np.ones(len(rewards), np.bool_)
    if kind.method == "tango":
        low, high = tango(rewards, CONFIDENCE)
        return low, high, np.ones(len(rewards), np.bool_)
    error = clusters.error(rewards)
    return (*mean_bounds(error, clusters, CONFIDENCE), error.stderr > 0)


def _levels(shares: Mapping[float, float]) -> Draw:
    """Draw levels with their shares."""
    levels, p = np.array([*shares], np.float64), [*shares.values()]
    return lambda g, R, P: g.choice(levels, p=p, size=(R, P))


def _single_flips(p: float) -> Draw:
    return lambda g, R, P: _flips(g, np.full((R, P, 1), p))


def _beta_flips(a: float, b: float, prompts: int, rewards: int) -> Draw:
    """Draw rewards of 0 or 1, whose p ~ Beta(a, b) is that of a cluster of prompts."""

    def draw(generator: np.random.Generator, repeats: int, total: int) -> FloatArray:
        p = np.repeat(generator.beta(a, b, (repeats, -(-total // prompts))), prompts, axis=1)[:, :total]
        return _flips(generator, np.repeat(p[:, :, None], rewards, axis=2))

    return draw


def _clustered(correlation: float, skew: float = 0.0) -> Draw:
    """Draw normal rewards with a correlation within clusters, plus an exponential part."""

    def draw(generator: np.random.Generator, repeats: int, prompts: int) -> FloatArray:
        clusters = generator.normal(size=(repeats, -(-prompts // CLUSTER)))
        shared = np.repeat(clusters, CLUSTER, axis=1)[:, :prompts]
        own = generator.normal(size=shared.shape)
        skewed = skew * (generator.exponential(size=shared.shape) - 1)
        rewards: FloatArray = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own + skewed
        return rewards

    return draw


def _flips(generator: np.random.Generator, p: FloatArray) -> FloatArray:
    return (generator.random(p.shape) < p).astype(np.float64)


def _heavy_difference(generator: np.random.Generator, repeats: int, prompts: int) -> FloatArray:
    return generator.standard_t(3, size=(repeats, prompts)) - generator.standard_t(3, size=(repeats, prompts))


def _gains(generator: np.random.Generator, repeats: int, prompts: int) -> FloatArray:
    """Differences of the means of eight rewards of 0 or 1; the second arm's p is higher by up to 0.2."""
    p = 0.8 * generator.beta(1, 2, (repeats, prompts))
    gain = 0.2 * generator.random(p.shape)
    return (generator.binomial(8, p + gain) - generator.binomial(8, p)) / 8.0


if __name__ == "__main__":
    app()
