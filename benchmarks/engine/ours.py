"""This project's engine."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from alignpro.engine import Completion, Engine, EngineStats, SamplingParams, TokenPrompt
from alignpro.models.language_model import LanguageModel
from benchmarks.device import empty_cache
from benchmarks.engine.cases import Case, Inputs, make_inputs
from benchmarks.engine.entrant import Entrant, Generated, Setting, make_models
from benchmarks.models import make_chat_template, make_tokenizer
from benchmarks.pool import Pool, fit, needed_bytes

NAME = "ours"
DECODE_RUNS = 3


def entrant() -> Entrant:
    """Return the engine, with default settings except for the batch size, and on a GPU the size of the pool."""
    return Entrant(NAME, _OurRun)


class _OurRun:
    """Rounds with one engine; before each, the policy's weights are marked as updated, as after a training step.

    So are the target's if prompts come from a file, since later rounds may repeat them.
    """

    def __init__(self, case: Case, inputs: Inputs, setting: Setting) -> None:
        self._case, self._inputs = case, inputs
        tokenizer = make_tokenizer(make_chat_template("", ""))  # the engine does not use it here
        models = {
            name: LanguageModel(model, tokenizer, name).requires_grad_(False)
            for name, model in make_models(case, setting).items()
        }
        self._pool = _pool(case, setting)
        pool_bytes = None if self._pool is None else self._pool.bytes
        self._engine = Engine(models, max_batch=setting.max_batch, pool_bytes=pool_bytes)

    def __call__(self, turn: int) -> Generated:
        self._begin()
        w, engine, prompts = self._case.workload, self._engine, self._inputs.prompts(turn)
        if not self._case.chain:
            params = SamplingParams(max_tokens=w.response, n=w.M, seed=turn)
            groups = engine.generate("target", prompts, params)
            return Generated({"target": _count([one for group in groups for one in group])}, self._details())
        chains = engine.run_chains(
            prompts,
            rewrite=SamplingParams(max_tokens=w.rewrite, n=w.K, seed=turn),
            to_target=lambda _, sample: TokenPrompt(self._inputs.to_target(sample.tokens)),
            respond=SamplingParams(max_tokens=w.response, n=w.M),
        )
        flat = [chain for group in chains for chain in group]
        tokens = {
            "policy": _count([chain.sample for chain in flat]),
            "target": _count([response for chain in flat for response in chain.responses]),
        }
        return Generated(tokens, self._details())

    def decode(self, turn: int) -> dict[str, float]:
        """Run the target on cached prompts; return the seconds per tick, in total and on the host."""
        engine, prompts = self._engine, self._inputs.prompts(turn)
        self._begin()
        engine.generate("target", prompts, SamplingParams(max_tokens=1, seed=turn))
        engine.stats = EngineStats()
        w = self._case.workload
        engine.generate("target", prompts, SamplingParams(max_tokens=w.response, n=w.M, seed=turn))
        return {"tick_s": engine.stats.run_seconds / engine.stats.ticks} | _host(engine.stats)

    def _begin(self) -> None:
        if self._case.chain:
            self._engine.weights_updated("policy")
        if self._case.given:
            self._engine.weights_updated("target")
        self._engine.stats = EngineStats()

    def _details(self) -> dict[str, Any]:
        stats = self._engine.stats
        computed = stats.computed.total()
        return {
            "computed_tokens": dict(stats.computed),
            "floor_tokens": stats.floor_tokens,
            "computed_over_floor": computed / stats.floor_tokens,
            "ticks": stats.ticks,
            "most_pages": dict(stats.peak_pages),
            "preemptions": stats.preemptions,
            "pool": None if self._pool is None else str(self._pool),
        } | _host(stats)


def decode_ticks(case: Case, setting: Setting) -> dict[str, float]:
    """Return the seconds per decode tick of a case and the host's share of them: medians of several runs.

    The prompts are computed beforehand, so that every tick computes one token per sequence.
    """
    run = _OurRun(case, make_inputs(case, setting.seed), setting)
    ticks = [run.decode(turn) for turn in range(DECODE_RUNS)]
    return {name: statistics.median(tick[name] for tick in ticks) for name in ticks[0]}


def _pool(case: Case, setting: Setting) -> Pool | None:
    """Return the pool of a case on a GPU, where the default is a share of the free memory; None on a CPU."""
    if setting.device.type == "cpu":
        return None
    empty_cache(setting.device)
    free, total = torch.accelerator.get_memory_info(setting.device)
    return fit(needed_bytes(case.workload, setting.dtype.itemsize, chain=case.chain), free=free, total=total)


def _host(stats: EngineStats) -> dict[str, float]:
    """Return the time outside the model and the sampler: scheduling, planning, bookkeeping of sequences and pages."""
    host = stats.run_seconds - stats.seconds["forward"] - stats.seconds["sample"]
    return {"host_s": host / stats.ticks, "host_share": host / stats.run_seconds}


def _count(completions: list[Completion]) -> int:
    errors = [completion.error for completion in completions if completion.error]
    if errors:
        raise RuntimeError(errors[0])
    return sum(len(completion.tokens) for completion in completions)
