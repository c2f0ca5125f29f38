"""The generation engine: sampling from one model, and chains of two (prompter → target), on one pool of memory.

A prompt is computed once for all that goes on from it, whether it arrives with it, later, or in another call; sequences
come and go between any two tokens. See `scheduler`, `prefix_tree`, `attention` and `pool` for the parts.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch

from alignpro.activated_lora import invoked_at
from alignpro.engine.attention import probe_geometry
from alignpro.engine.graphs import DecodeGraphs
from alignpro.engine.isolation import Passes
from alignpro.engine.pool import KVPool
from alignpro.engine.prefix_tree import PrefixTree
from alignpro.engine.sampler import derive_seed
from alignpro.engine.scheduler import Scheduler
from alignpro.engine.sequence import ChainRun, SampledSequence, ToTarget, completed, siblings
from alignpro.engine.types import Chain, Completion, EngineStats, SamplingParams
from alignpro.errors import ConfigError, DataError
from alignpro.models import LanguageModel

CPU_POOL = 1 << 30
"""Bytes of a pool on the CPU, at most, where none are given."""
GPU_SHARE = 0.4
"""The share of a device's free memory that a pool takes, at most, where no bytes are given."""

_Follow = Callable[[SampledSequence], list[SampledSequence]]


@dataclass(frozen=True)
class _Memory:
    """Pages on one device, the prompts in them, and the graphs that read them."""

    pool: KVPool
    pages: int
    """Of the pool, if the device has memory for as many."""
    tree: PrefixTree
    graphs: DecodeGraphs | None


class Engine:
    """Samples from a set of named models.

    Models on one device share one pool; it lives as long as the engine, and so do the prompts in it, until the pages
    are needed or `weights_updated` says that they are out of date.

    A model with a LoRA and its base (`LanguageModel.base`) run in the same forward passes. What stands before the invocation
    of an activated LoRA is computed once for both, and stays when the LoRA's weights change.

    Args:
        models: Name → model; the trainer's own modules, never copies.
        max_batch: Sequences of a model that run at once.
        pool_bytes: Memory for keys and values on each device; when absent, what ``max_batch`` sequences as long as the
            context need, but no more than 1 GiB on a CPU and 40 % of what is free on an accelerator.
        page_tokens: Tokens of the largest model in a page.
        token_budget: Tokens that are computed at once; what is left of long prompts waits for the next pass.
        fuse: Whether models that are one but for an adapter run in one forward pass. What is drawn is the same.
        cuda_graphs: Whether passes of next tokens alone are captured as CUDA graphs and replayed; None for where there
            is CUDA and the model can be captured. ``padded`` runs what would be captured, on any device.
        audit: Check the pool's books after every pass, for tests.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        *,
        max_batch: int = 256,
        pool_bytes: int | None = None,
        page_tokens: int = 16,
        token_budget: int = 4096,
        fuse: bool = True,
        cuda_graphs: bool | Literal["padded"] | None = None,
        audit: bool = False,
    ) -> None:
        self.models = dict(models)
        self._lanes = {name: _lane(name, self.models) if fuse else name for name in models}
        self._bases = {name: _base(name, self.models) for name, model in models.items() if model.invocation}
        self.max_batch = max_batch
        self.pool_bytes = pool_bytes
        self.page_tokens = page_tokens
        self.token_budget = token_budget
        self.cuda_graphs = cuda_graphs
        self.audit = audit
        self.stats = EngineStats()
        self._memories: dict[torch.device, _Memory] = {}
        self._released: dict[torch.device, int] = {}

    def generate(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Draw ``params.n`` completions of each prompt.

        Args:
            name: Which model.
            prompts: Token ids.
            params: How to draw.
            seeds: One a prompt; derived from ``params.seed`` and the prompt's index when absent. Completion k of a
                prompt draws from (its seed, k): the result does not depend on batching.

        Returns:
            One list of n completions a prompt. What cannot be run, or raises on the way, has completions whose
            ``finish_reason`` is ``error``; the others are not affected.

        Raises:
            Exception: The device has failed, or the engine is set up wrongly: nothing can be computed. No page is held.
        """
        seeds = _seeds(params, len(prompts)) if seeds is None else seeds
        groups = [siblings(name, prompt, params, seeds[i], (i,)) for i, prompt in enumerate(prompts)]
        self._run([name], itertools.chain.from_iterable(groups), lambda _: [])
        return [[completed(sequence) for sequence in group] for group in groups]

    def run_chains(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        rewrite: SamplingParams,
        to_target: ToTarget,
        respond: SamplingParams,
        seeds: Sequence[int] | None = None,
        policy: str = "policy",
        target: str = "target",
    ) -> list[list[Chain]]:
        """x → ``rewrite.n`` rewrites by `policy` → ``respond.n`` responses of `target` to each.

        A rewrite that ends is answered at once. Response m to rewrite k of a prompt draws from (the prompt's seed,
        "respond", k, m). Where a rewrite has failed or ``to_target`` raises, that chain's responses are errors which say
        what.
        """
        seeds = _seeds(rewrite, len(prompts)) if seeds is None else seeds
        run = ChainRun(policy, target, rewrite, respond, to_target, seeds)
        self._run([policy, target], run.first(prompts), run.after)
        return run.result()

    def weights_updated(self, name: str) -> None:
        """Forget what was computed with a model's weights, which have changed.

        Raises:
            RuntimeError: It is generating.
        """
        self.models[name].weights_changed()
        for memory in self._memories.values():
            memory.tree.drop(name)

    def release(self, keep: Collection[str] = ()) -> None:
        """Give the memory of the pools back, and with it what is cached; the next run takes it again.

        Args:
            keep: Models whose prompts stay, in the memory that they need: those whose weights do not change meanwhile.

        Raises:
            ValueError: A model to be kept is not one of the engine's.
            RuntimeError: A run is under way.
        """
        if unknown := set(keep) - set(self.models):
            raise ValueError(f"release: keep names {min(unknown)!r}, and the models are {', '.join(self.models)}")
        if locked := sum(memory.tree.locked for memory in self._memories.values()):
            raise RuntimeError(f"{locked} pages are in use: the pools cannot be given back while a run is under way")
        for device, memory in self._memories.items():
            memory.tree.evict_all(keep)
            # Of a second release in a row, the first one's size counts.
            before = memory.pool.shrink(memory.tree.pages())
            self._released[device] = max(before, self._released.get(device, 0))
            if memory.graphs:
                memory.graphs.clear()

    def resume(self) -> None:
        """Take the memory that `release` gave back now, and not in the course of the next run."""
        for device, pages in self._released.items():
            self._memories[device].pool.take(pages)
        self._released.clear()

    def _run(self, stages: Sequence[str], sequences: Iterable[SampledSequence], follow: _Follow) -> None:
        """Run sequences and what they lead to until all have ended; stages on other devices one after the other."""
        started = perf_counter()
        waiting = list(sequences)
        while waiting:
            device = self.models[waiting[0].model].device
            here = [name for name in stages if self.models[name].device == device]
            batch = [sequence for sequence in waiting if sequence.model in here]
            waiting = [sequence for sequence in waiting if sequence.model not in here]
            waiting += self._run_here(self._memory(device), here, batch, follow)
        self.stats.run_seconds += perf_counter() - started

    def _run_here(
        self, memory: _Memory, stages: Sequence[str], sequences: Sequence[SampledSequence], follow: _Follow
    ) -> list[SampledSequence]:
        """Run the sequences of models on one device; returns those that they lead to elsewhere."""
        lanes = list(dict.fromkeys(self._lanes[name] for name in stages))
        scheduler = Scheduler(memory.pool, memory.tree, lanes, max_batch=self.max_batch, token_budget=self.token_budget)
        if memory.graphs:
            memory.graphs.begin({name: self.models[name] for name in lanes})
        passes = Passes(self.models, memory.pool, scheduler, self.stats, memory.graphs)
        elsewhere: list[SampledSequence] = []
        ran: list[SampledSequence] = []
        new = deque(sequences)
        try:
            while True:
                while new:  # what has just come about
                    sequence = new.popleft()
                    if sequence.model not in stages:
                        elsewhere.append(sequence)
                        continue
                    self._refuse_or_prepare(memory.pool, sequence)
                    if sequence.completion is None:
                        ran.append(sequence)
                        scheduler.add(sequence)
                    else:
                        new.extend(follow(sequence))
                tick = scheduler.next_tick()
                ended = scheduler.take_refused()
                if tick is None and not ended:
                    break
                if tick is not None:
                    ended += passes.carry_out(tick)
                self.stats.note_pages(memory.pool.used)
                for sequence in ended:
                    scheduler.finish(sequence)
                    new.extend(follow(sequence))
                if self.audit:
                    scheduler.audit()
        finally:
            scheduler.abort()
        self.stats.preemptions += scheduler.preemptions
        self.stats.cache_hit_tokens += scheduler.hits
        self.stats.note_floor([(*sequence.cache_key, len(sequence.drawn)) for sequence in ran])
        return elsewhere

    def _refuse_or_prepare(self, pool: KVPool, sequence: SampledSequence) -> None:
        """Fail a sequence that cannot run; put the places of a soft prompt before the prompt of one that can."""
        if sequence.completion is not None:
            return
        model, sequence.lane = self.models[sequence.model], self._lanes[sequence.model]
        problem = _refusal(model, sequence.prompt, sequence.params)
        if problem is None and model.invocation:
            sequence.base = self._bases[sequence.model]
            try:
                sequence.shared = invoked_at(sequence.prompt, model.invocation)
            except DataError as error:
                problem = str(error)
        if problem is None:
            sequence.prompt = (-1,) * model.virtual_tokens + sequence.prompt
            pages = pool.pages_for(sequence.model, sequence.shared)
            pages += pool.pages_for(sequence.model, len(sequence.prompt) - sequence.shared)
            pages += pool.pages_for(sequence.model, sequence.params.max_tokens - 1)
            if pages > pool.total:
                problem = (
                    f"{len(sequence.prompt)} prompt tokens and {sequence.params.max_tokens} new ones take {pages} pages, "
                    f"and the engine's pool has {pool.total}: give it more memory (pool_bytes)"
                )
        if problem is not None:
            sequence.fail(problem)

    def _memory(self, device: torch.device) -> _Memory:
        """The pool of a device and what is in it, made on first use."""
        if device not in self._memories:
            models = {name: model for name, model in self.models.items() if model.device == device}
            geometries = {name: probe_geometry(model) for name, model in models.items()}
            geometries |= {base: geometries[name] for name, base in self._bases.items() if name in models}
            pool = KVPool(geometries, device, page_tokens=self.page_tokens)
            longest = max(pool.pages_for(n, m.context_length + m.virtual_tokens) for n, m in models.items())
            available = _default_bytes(device) if self.pool_bytes is None else self.pool_bytes
            pool.total = available // pool.page_bytes
            if self.pool_bytes is None:
                pool.total = min(pool.total, self.max_batch * (longest + 1))
            graphs = self._decode_graphs(pool, device)
            self._memories[device] = _Memory(pool, pool.total, PrefixTree(pool), graphs)
        memory = self._memories[device]
        memory.pool.total = memory.pages  # what a run before could not have may be free now
        if device in self._released:  # at once, not page by page: the arena stays where it is then, as graphs need
            memory.pool.try_take([self._released.pop(device)])
        return memory

    def _decode_graphs(self, pool: KVPool, device: torch.device) -> DecodeGraphs | None:
        if self.cuda_graphs == "padded":
            return DecodeGraphs(pool, device, capture=False)
        if self.cuda_graphs and device.type != "cuda":
            raise ConfigError(f"engine: cuda_graphs=True needs a GPU, and a model is on {device}: leave it out there")
        if self.cuda_graphs or (self.cuda_graphs is None and device.type == "cuda" and torch.version.cuda):
            return DecodeGraphs(pool, device, required=self.cuda_graphs is True)
        return None


def _lane(name: str, models: Mapping[str, LanguageModel]) -> str:
    """The model in whose forward passes a model runs: that with the adapter, for its base; else its own."""
    model = models[name]
    whole = (other for other, each in models.items() if not each.is_base and each.shares_weights(model))
    return next(whole, name) if model.is_base else name


def _base(name: str, models: Mapping[str, LanguageModel]) -> str:
    """What the base of an activated LoRA is called: it need not be among the models."""
    model = models[name]
    bases = (other for other, each in models.items() if each.is_base and each.shares_weights(model))
    return next(bases, f"base of {name}")


def _default_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_POOL
    free, _ = torch.accelerator.get_memory_info(device)
    return int(GPU_SHARE * free)


def _seeds(params: SamplingParams, count: int) -> list[int]:
    return [derive_seed(params.seed, i) for i in range(count)]


def _refusal(model: LanguageModel, prompt: Sequence[int], params: SamplingParams) -> str | None:
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
