"""Generation on one device: its models, their shared pages and prefix cache, and the sequences that run there.

| owns | does not own |
|---|---|
| what is refused, the memory of the device, when a run begins and ends | what follows a completion, other devices |

A run lasts from the first request to an idle worker until the worker is idle again. At its beginning, memory that an
earlier run could not get is tried again; at its end, its sequences are counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch

from alignpro.engine.arena import new_arena
from alignpro.engine.async_scheduling import AsyncScheduling
from alignpro.engine.attention_plan import probe_geometry
from alignpro.engine.fault_isolation import Executor
from alignpro.engine.faults import is_fatal
from alignpro.engine.graphs import DecodeGraphs
from alignpro.engine.pool import KVPool
from alignpro.engine.prefix_tree import PrefixTree
from alignpro.engine.runner import LaunchedPass
from alignpro.engine.scheduler import Batch, Scheduler
from alignpro.engine.sequence import OnCompletion, Request, SampledSequence
from alignpro.engine.stats import EngineStats
from alignpro.engine.types import SamplingParams
from alignpro.errors import ConfigError, DataError
from alignpro.models.invocation import invocation_start
from alignpro.models.language_model import LanguageModel

CPU_POOL = 1 << 30
"""Upper limit of the default pool size on the CPU, in bytes."""
GPU_SHARE = 0.4
"""Upper limit of the default pool size on an accelerator, as a share of its free memory."""
COUNTED_AT_ONCE = 1 << 16
"""Sequences after which a run that does not end is counted, so that a server does not keep all its prompts."""


class Worker:
    """Generates with the models of one device. For the arguments, see `Engine`."""

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        *,
        max_batch: int,
        pool_bytes: int | None,
        page_tokens: int,
        token_budget: int,
        cuda_graphs: bool | Literal["padded"] | None,
        async_scheduling: bool | None,
        audit: bool,
    ) -> None:
        self.models, self.audit = models, audit
        device = next(iter(models.values())).device
        self._forward_models = {name: _forward_model(name, models) for name in models}
        self._bases = {name: _base(name, models) for name, model in models.items() if model.invocation}
        geometries = {name: probe_geometry(model) for name, model in models.items()}
        geometries |= {base: geometries[name] for name, base in self._bases.items()}
        self.pool = KVPool(geometries, device, page_tokens=page_tokens, arena=new_arena)
        self._num_pages = (_default_bytes(device) if pool_bytes is None else pool_bytes) // self.pool.page_bytes
        """Configured size of the pool; ``pool.total`` is smaller if the device has too little memory."""
        if pool_bytes is None:
            longest = max(self.pool.pages_for(n, m.context_length + m.virtual_tokens) for n, m in models.items())
            self._num_pages = min(self._num_pages, max_batch * (longest + 1))
        self.tree = PrefixTree(self.pool)
        self.graphs = _decode_graphs(self.pool, device, cuda_graphs)
        run = list(dict.fromkeys(self._forward_models.values()))
        self.scheduler = Scheduler(self.pool, self.tree, run, max_batch=max_batch, token_budget=token_budget)
        self._executor = Executor(models, self.pool, self.scheduler, self.graphs)
        if async_scheduling is None:  # a CPU has nothing else to do while it plans
            async_scheduling = device.type == "cuda"
        self._ahead = AsyncScheduling(self.scheduler, self._executor) if async_scheduling else None
        self._released_pages = 0
        self._prepared: set[str] = set()  # models whose graphs have been checked in this run
        self._ended: list[SampledSequence] = []  # in this run

    def submit(
        self,
        name: str,
        prompt: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        arrival: int,
        on_completion: OnCompletion | None,
    ) -> Request:
        """Queue the sequences of a request. If it cannot run, they have failed already.

        Raises:
            ModelError: CUDA graphs are required, but the model cannot be captured.
        """
        model, forward_model = self.models[name], self._forward_models[name]
        if self.scheduler.idle:
            self._start_run()
        if self.graphs and forward_model not in self._prepared:
            self.graphs.prepare(forward_model, self.models[forward_model])
            self._prepared.add(forward_model)
        problem, base, num_base_tokens = _refusal(model, prompt, params), None, 0
        if problem is None and model.invocation:
            base = self._bases[name]
            try:
                num_base_tokens = invocation_start(prompt, model.invocation)
            except DataError as error:
                problem = str(error)
        prompt = (-1,) * model.virtual_tokens + prompt
        request = Request(
            name, prompt, params, seed, arrival, forward_model, base, num_base_tokens, on_completion=on_completion
        )
        problem = problem or self._lack_of_pages(request)
        for sequence in request.sequences:
            if problem is None:
                self.scheduler.add(sequence)
            else:
                sequence.fail(problem)
        return request

    def step(self, stats: EngineStats) -> list[SampledSequence]:
        """Run one batch. Returns the sequences that have ended.

        Raises:
            Exception: Nothing can be computed after this error (`faults.is_fatal`), or pages could not be allocated.
        """
        launched = self._ahead.take(stats) if self._ahead else None
        batch = launched.batch if launched else self.scheduler.schedule()
        ended = self.scheduler.take_failed()
        if batch is not None:
            ended += self._run(batch, launched, stats)
        assert batch is not None or ended, "sequences are pending, but none can run"
        stats.note_pages(self.pool.used)
        for sequence in ended:
            self._remove(sequence)
        if self._ahead:
            self._ahead.drop_if_needless(stats)
        self._audit()
        return ended

    def _run(self, batch: Batch, launched: LaunchedPass | None, stats: EngineStats) -> list[SampledSequence]:
        """Run a batch. Returns the sequences that have ended."""
        try:
            begun = self._executor.begin(batch, stats, launched)
        except Exception as error:
            return self._fail(batch, error)
        if self._ahead and begun.drawn and begun.whole:
            self._ahead.launch(batch, begun.drawn, stats)
        try:
            return self._executor.finish(begun, stats)
        except Exception as error:
            return self._fail(batch, error)

    def _fail(self, batch: Batch, error: Exception) -> list[SampledSequence]:
        if is_fatal(error):
            raise error
        return self._executor.fail_batch(batch, error)

    def cancel(self, request: Request, stats: EngineStats) -> None:
        """End the sequences of a request with the tokens sampled so far, and free their pages."""
        for sequence in request.sequences:
            if sequence.completion is None:
                self._remove(sequence)
                sequence.end("cancelled")
        if self._ahead:
            self._ahead.drop_if_needless(stats)
        self._audit()

    def count(self, stats: EngineStats) -> None:
        """Count the sequences of a run that has ended."""
        if self.scheduler.idle or len(self._ended) >= COUNTED_AT_ONCE:
            stats.note_run(self._ended)
            self._ended.clear()

    def clear(self) -> None:
        """Forget all sequences and all that is cached, whatever state an interrupt left; this may be repeated."""
        if self._ahead:
            self._ahead.clear()
        self.scheduler.clear()
        self.tree.clear()
        self.pool.clear()
        if self.graphs:
            self.graphs.clear()
        self._prepared.clear()
        self._ended.clear()

    def weights_updated(self, name: str) -> None:
        """Drop everything cached for a model, of which no sequence may be pending."""
        self.models[name].weights_updated()
        self.tree.drop(name)

    def release(self, keep: Collection[str]) -> None:
        """Free the memory of the pool, except for the cached prompts of the models in ``keep``."""
        self.tree.evict_all(keep)
        # On a second release in a row, the size before the first one counts.
        self._released_pages = max(self.pool.compact(self.tree.pages()), self._released_pages)
        if self.graphs:
            self.graphs.drop_moved()

    def _start_run(self) -> None:
        self.pool.total = self._num_pages
        self._executor.start_run()
        if self._ahead:
            self._ahead.start_run()
        self._prepared.clear()
        if self._released_pages:  # all at once: growing step by step may move the pages and invalidate graphs
            self.pool.try_resize([self._released_pages])
            self._released_pages = 0

    def _remove(self, sequence: SampledSequence) -> None:
        self.scheduler.remove(sequence)
        self._ended.append(sequence)

    def _audit(self) -> None:
        if self.audit:
            self.scheduler.audit()

    def _lack_of_pages(self, request: Request) -> str | None:
        """Why a request does not fit in the pool; None if it does."""
        name, length, new = request.model, len(request.prompt), request.params.max_tokens
        parts = (request.num_base_tokens, length - request.num_base_tokens, new - 1)
        pages = sum(self.pool.pages_for(name, part) for part in parts)
        if pages <= self.pool.total:
            return None
        return (
            f"{length} prompt tokens and {new} new ones take {pages} pages, and the engine's pool has "
            f"{self.pool.total}: give it more memory (pool_bytes)"
        )


def _forward_model(name: str, models: Mapping[str, LanguageModel]) -> str:
    """The model in whose forward passes a model runs: for a base, the model with the adapter; otherwise itself."""
    model = models[name]
    adapted = (other for other, each in models.items() if not each.is_base and each.shares_weights(model))
    return next(adapted, name) if model.is_base else name


def _base(name: str, models: Mapping[str, LanguageModel]) -> str:
    """The name of the base of an activated LoRA, which need not be one of the engine's models."""
    model = models[name]
    bases = (other for other, each in models.items() if each.is_base and each.shares_weights(model))
    return next(bases, f"base of {name}")


def _default_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_POOL
    free, _ = torch.accelerator.get_memory_info(device)
    return int(GPU_SHARE * free)


def _decode_graphs(
    pool: KVPool, device: torch.device, cuda_graphs: bool | Literal["padded"] | None
) -> DecodeGraphs | None:
    if cuda_graphs == "padded":
        return DecodeGraphs(pool, device, capture=False)
    if cuda_graphs and device.type != "cuda":
        raise ConfigError(f"engine: cuda_graphs=True needs a GPU, but a model is on {device}: leave cuda_graphs unset")
    if cuda_graphs or (cuda_graphs is None and device.type == "cuda" and torch.version.cuda):
        return DecodeGraphs(pool, device, required=cuda_graphs is True)
    return None


def _refusal(model: LanguageModel, prompt: tuple[int, ...], params: SamplingParams) -> str | None:
    """Why a request cannot run; None if nothing is known against it."""
    if not prompt:
        return "the prompt is empty"
    if unknown := [token for token in (min(prompt), max(prompt)) if not 0 <= token < model.vocabulary]:
        return f"token {unknown[0]} is not in the vocabulary of {model.vocabulary} of {model.name}"
    if len(prompt) + params.max_tokens > model.context_length:
        return (
            f"{len(prompt)} prompt tokens and {params.max_tokens} new ones do not fit in the context of "
            f"{model.context_length} tokens of {model.name}: drop the prompt (max_prompt_tokens), or lower max_tokens"
        )
    return None
