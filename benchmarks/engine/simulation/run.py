"""Runs of chains with stub models, and what their passes would take on a card."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from alignpro.engine import Engine, SamplingParams, TokenPrompt, attention_plan, runner, worker
from alignpro.engine.host_copy import to_device
from alignpro.engine.pool import KVPool
from alignpro.engine.static_plan import StaticPlan
from alignpro.engine.stats import EngineStats
from alignpro.models.head import Head
from benchmarks.engine.floor import num_weights
from benchmarks.engine.simulation.cards import LAUNCH_SECONDS, POOL_SHARE, REPLAY_SECONDS, Card
from benchmarks.engine.simulation.operations import attention_operations, operations
from benchmarks.engine.simulation.stub import HEAD_DIM, Pass, StubArena, StubGraphs, StubModel
from benchmarks.workload import ModelShape, Workload

HEAD_OPERATIONS = 11
"""Kernels of a draw: finite checks, the fused head, the copy to the host."""


@dataclass
class Tick:
    """One step of the engine."""

    host: float
    """Seconds of this project's code, without the stubs."""
    sequences: int
    """Running when it began."""
    ahead: bool
    """Whether its pass was launched by the step before, so that the host's time passes beside it."""
    passes: list[Pass] = field(default_factory=list)
    copies: int = 0
    """Copies from the host to the device."""

    @property
    def decodes(self) -> bool:
        """Whether all its passes decode, in a fixed shape."""
        return bool(self.passes) and all(one.how != "eager" for one in self.passes)


def simulate(
    workload: Workload, card: Card, *, max_batch: int, runs: int, seed: int, async_scheduling: bool = False
) -> list[dict[str, Any]]:
    """Run the chains of several training steps; between them the prompter's weights change and the pool is released.

    The lengths of rewrites and responses are geometrically distributed, with the workload's as mean and twice that as
    maximum.

    Returns:
        The figures of each run: of the host and the numbers of passes as they were, the rest as it is predicted.
    """
    log: list[Pass] = []
    models = {
        "policy": StubModel("policy", workload.prompter, workload.rewrite, log),
        "target": StubModel("target", workload.target, workload.response, log),
    }
    counts = {name: operations(model.shape) for name, model in models.items()}
    engine: Any = Engine(
        models,  # type: ignore[arg-type]
        max_batch=max_batch,
        pool_bytes=int(POOL_SHARE * card.memory / HEAD_DIM),
        async_scheduling=async_scheduling,
    )
    generator, results = random.Random(seed), []
    vocabulary = min(workload.prompter.vocabulary, workload.target.vocabulary)
    meta_prompt, before, after = (
        [generator.randrange(vocabulary) for _ in range(n)]
        for n in (workload.meta_prompt, workload.before, workload.after)
    )
    for turn in range(runs):
        prompts = [
            [*meta_prompt, *(generator.randrange(vocabulary) for _ in range(workload.prompt))]
            for _ in range(workload.prompts)
        ]
        engine.stats = EngineStats()
        with _stubs(log) as copies, _ticks(engine, log, copies) as ticks:
            engine.run_chains(
                prompts,
                rewrite=SamplingParams(max_tokens=2 * workload.rewrite, n=workload.K, stop_token_ids=(0,), seed=turn),
                to_target=lambda _, sample: TokenPrompt([*before, *sample.tokens, *after]),
                respond=SamplingParams(max_tokens=2 * workload.response, n=workload.M, stop_token_ids=(0,)),
            )
            engine.weights_updated("policy")
            engine.release(keep=["target"])
        results.append(_figures(ticks, models, counts, card, max_batch))
    return results


@contextmanager
def _stubs(log: list[Pass]) -> Iterator[list[int]]:
    """Replace graphs and the draw within the context; yields the number of arrays in each copy to the device."""
    copies: list[int] = []

    def graphs(pool: KVPool, device: torch.device, _: object) -> StubGraphs:
        return StubGraphs(pool, device, log=log)

    def draw(states: Tensor, head: Head, params: SamplingParams, seeds: Tensor) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        drawn = seeds % len(head.weight), torch.zeros(len(seeds))
        if log:
            log[-1].seconds += time.perf_counter() - started
        return drawn

    def copy(arrays: Sequence[Any], device: torch.device) -> list[Tensor]:
        copies.append(len(arrays))
        return to_device(arrays, device)

    def fill(plan: StaticPlan, *args: Any) -> None:
        copies.append(1)
        filled(plan, *args)

    filled = StaticPlan.fill
    with (
        mock.patch.object(worker, "new_arena", StubArena),
        mock.patch.object(worker, "_decode_graphs", graphs),
        mock.patch.object(runner, "sample", draw),
        mock.patch.object(runner, "to_device", copy),
        mock.patch.object(attention_plan, "to_device", copy),
        mock.patch.object(StaticPlan, "fill", fill),
    ):
        yield copies


@contextmanager
def _ticks(engine: Engine, log: list[Pass], copies: list[int]) -> Iterator[list[Tick]]:
    """Record the steps of the engine's only worker within the context."""
    (one,) = engine.workers.values()
    ticks: list[Tick] = []
    step = one.step

    def launched() -> int:
        """Return the number of passes at the end of the log that were launched for the next step: 1 or 0."""
        return int(one._ahead is not None and one._ahead.has_pass)

    def timed(stats: EngineStats) -> Any:
        ahead = launched()
        first, sequences, copied = len(log) - ahead, len(one.scheduler.running), len(copies)
        spent = sum(each.seconds for each in log[first:])
        started = time.perf_counter()
        ended = step(stats)
        seconds = time.perf_counter() - started
        host = seconds - (sum(each.seconds for each in log[first:]) - spent)
        ticks.append(Tick(host, sequences, bool(ahead), log[first : len(log) - launched()], len(copies) - copied))
        return ended

    with mock.patch.object(one, "step", timed):
        yield ticks


def _figures(
    ticks: Sequence[Tick],
    models: dict[str, StubModel],
    counts: dict[str, tuple[int, int]],
    card: Card,
    max_batch: int,
) -> dict[str, Any]:
    by_model: dict[str, dict[str, Any]] = {}
    hidden = 0.0
    for tick in ticks:
        if tick.ahead:
            one = tick.passes[0]
            hidden += min(tick.host, _Work.of(one, models[one.model].shape, counts[one.model], card).seconds)
    for name, model in models.items():
        passes = [one for tick in ticks for one in tick.passes if one.model == name]
        how = Counter(one.how for one in passes)
        decode = how.total() - how["eager"]
        work = [_Work.of(one, model.shape, counts[name], card) for one in passes]
        by_model[name] = {
            "passes": dict(how),
            "replayed_share": how["replayed"] / decode if decode else None,
            "captures": how["captured"],
            "launches": sum(each.launches for each in work),
            "bytes": sum(each.bytes for each in work),
            "flops": sum(each.flops for each in work),
            "floor_s": sum(each.floor for each in work),
            "predicted_s": sum(each.seconds for each in work),
            "rows_over_tokens": sum(one.rows for one in passes) / sum(one.tokens for one in passes),
        }
    full = [tick.host for tick in ticks if tick.decodes and tick.sequences >= 0.9 * max_batch]
    host, copies = sum(tick.host for tick in ticks), sum(tick.copies for tick in ticks)
    return {
        "ticks": len(ticks),
        "mixed_ticks": sum(len(tick.passes) > 1 for tick in ticks),
        "ahead_ticks": sum(tick.ahead for tick in ticks),
        "models": by_model,
        "copies_to_device": copies,
        "host_s": host,
        "host_hidden_s": hidden,
        "host_full_ticks": len(full),
        "host_full_median_s": statistics.median(full) if full else None,
        "host_full_mean_s": statistics.mean(full) if full else None,
        "predicted_s": host - hidden + copies * LAUNCH_SECONDS + sum(each["predicted_s"] for each in by_model.values()),
        "floor_s": sum(each["floor_s"] for each in by_model.values()),
    }


@dataclass(frozen=True)
class _Work:
    """What a pass does on a card, its draw included."""

    launches: int
    launch_seconds: float
    bytes: float
    flops: float
    floor: float

    @property
    def seconds(self) -> float:
        """As predicted."""
        return max(self.floor, self.launch_seconds)

    @classmethod
    def of(cls, one: Pass, shape: ModelShape, operations_: tuple[int, int], card: Card) -> _Work:
        layer, rest = operations_
        kernels = shape.layers * (layer + attention_operations(one.levels)) + rest
        replayed = one.how in ("replayed", "captured")
        launches = (1 if replayed else kernels) + HEAD_OPERATIONS
        seconds = REPLAY_SECONDS + HEAD_OPERATIONS * LAUNCH_SECONDS if replayed else launches * LAUNCH_SECONDS
        weights = num_weights(shape, head=True)
        read = 2 * weights + one.keys * 2 * shape.layers * shape.kv_heads * shape.head_width * 2
        flops = 2.0 * weights * one.rows + 4 * shape.layers * shape.heads * shape.head_width * one.scores
        return cls(launches, seconds, read, flops, max(read / card.bytes_per_s, flops / card.flops_per_s))


def python_loop_seconds() -> float:
    """Seconds of a million turns of an empty loop: how fast this core runs Python, to compare times of hosts by."""
    started = time.perf_counter()
    for _ in range(1_000_000):
        pass
    return time.perf_counter() - started
