"""The generation engine: sampling from one model, and chains of two (prompter → target), on one KV pool per device.

A prefix is computed once for all sequences that share it, whether they arrive together, later, or in another call.
Batching is continuous: sequences join and leave between any two steps. The parts are in `scheduler`, `prefix_tree`,
`attention` and `pool`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch

from alignpro.engine.attention_plan import probe_geometry
from alignpro.engine.fault_isolation import Executor
from alignpro.engine.graphs import DecodeGraphs
from alignpro.engine.pool import KVPool
from alignpro.engine.prefix_tree import PrefixTree
from alignpro.engine.sampler import derive_seed
from alignpro.engine.scheduler import Scheduler
from alignpro.engine.sequence import ChainRun, SampledSequence, ToTarget, completed, siblings
from alignpro.engine.types import Chain, Completion, EngineStats, SamplingParams
from alignpro.errors import ConfigError, DataError
from alignpro.models.language_model import LanguageModel
from alignpro.models.token_lora import invocation_start

CPU_POOL = 1 << 30
"""Upper limit of the default pool size on the CPU, in bytes."""
GPU_SHARE = 0.4
"""Upper limit of the default pool size on an accelerator, as a share of its free memory."""

_Follow = Callable[[SampledSequence], list[SampledSequence]]


@dataclass(frozen=True)
class _Memory:
    """The pages on one device, the prompts cached in them, and the CUDA graphs that read them."""

    pool: KVPool
    pages: int
    """Configured size of the pool; ``pool.total`` is smaller if the device has too little memory."""
    tree: PrefixTree
    graphs: DecodeGraphs | None


class Engine:
    """Samples from a set of named models.

    Models on one device share one pool. The pool lives as long as the engine; a cached prompt stays in it until its
    pages are needed or `weights_updated` invalidates it.

    A model with a LoRA and its base (`LanguageModel.base`) run in the same forward passes. The tokens before the
    invocation of an activated LoRA are computed once for both models, and stay cached when the LoRA's weights change.

    Args:
        models: Name → model. These are the trainer's own modules, never copies.
        max_batch: Maximum number of sequences of a model that run at the same time.
        pool_bytes: Memory for keys and values on each device. By default, enough for ``max_batch`` sequences of the full
            context length, but at most 1 GiB on a CPU and 40 % of the free memory on an accelerator.
        page_tokens: Page size in tokens of the largest model.
        token_budget: Maximum number of tokens per forward pass; the rest of a long prompt waits for the next pass.
        fuse: Whether models that differ only in an adapter run in one forward pass. The sampled tokens are the same.
        cuda_graphs: Whether decode-only passes are captured as CUDA graphs and replayed. None enables this where CUDA is
            available and the model can be captured. ``padded`` pads passes as for capture but runs them eagerly, on any
            device.
        audit: Check the bookkeeping of the pool after every pass; meant for tests.
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
            name: Name of the model.
            prompts: Token ids of each prompt.
            params: Sampling parameters.
            seeds: One seed per prompt; by default derived from ``params.seed`` and the prompt's index. Completion k of a
                prompt draws from (its seed, k), so the result does not depend on batching.

        Returns:
            A list of n completions per prompt. A prompt that cannot be run, or whose computation raises, gets completions
            whose ``finish_reason`` is ``error``; the other prompts are not affected.

        Raises:
            Exception: The device has failed, or the engine is misconfigured, so that nothing can be computed. All pages
                have been freed then.
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
        """Draw ``rewrite.n`` rewrites of each prompt from `policy`, and ``respond.n`` responses of `target` to each rewrite.

        A rewrite is passed to the target as soon as it ends. Response m to rewrite k of a prompt draws from (the prompt's
        seed, "respond", k, m). If a rewrite fails or ``to_target`` raises, the responses of that chain are errors that
        state the reason.
        """
        seeds = _seeds(rewrite, len(prompts)) if seeds is None else seeds
        run = ChainRun(policy, target, rewrite, respond, to_target, seeds)
        self._run([policy, target], run.first(prompts), run.after)
        return run.result()

    def weights_updated(self, name: str) -> None:
        """Drop everything cached for a model whose weights have changed.

        Raises:
            RuntimeError: The model is generating.
        """
        self.models[name].weights_changed()
        for memory in self._memories.values():
            memory.tree.drop(name)

    def release(self, keep: Collection[str] = ()) -> None:
        """Free the memory of the pools, including the cached prompts; the next run allocates it again.

        Args:
            keep: Models whose cached prompts stay, in just the memory they need. Meant for models whose weights do not
                change in the meantime.

        Raises:
            ValueError: ``keep`` names a model that the engine does not have.
            RuntimeError: A run is in progress.
        """
        if unknown := set(keep) - set(self.models):
            raise ValueError(f"release: keep names {min(unknown)!r}, and the models are {', '.join(self.models)}")
        if locked := sum(memory.tree.num_locked for memory in self._memories.values()):
            raise RuntimeError(f"{locked} pages are in use: the pools cannot be given back while a run is under way")
        for device, memory in self._memories.items():
            memory.tree.evict_all(keep)
            # On a second release in a row, the size before the first one counts.
            before = memory.pool.compact(memory.tree.pages())
            self._released[device] = max(before, self._released.get(device, 0))
            if memory.graphs:
                memory.graphs.clear()

    def resume(self) -> None:
        """Allocate the memory that `release` freed now, rather than during the next run."""
        for device, pages in self._released.items():
            self._memories[device].pool.resize(pages)
        self._released.clear()

    def _run(self, stages: Sequence[str], sequences: Iterable[SampledSequence], follow: _Follow) -> None:
        """Run sequences and their follow-ups until all have ended. Stages on different devices run one after the other."""
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
        """Run the sequences of the models on one device. Returns the follow-up sequences that run on other devices."""
        lanes = list(dict.fromkeys(self._lanes[name] for name in stages))
        scheduler = Scheduler(memory.pool, memory.tree, lanes, max_batch=self.max_batch, token_budget=self.token_budget)
        if memory.graphs:
            memory.graphs.prepare({name: self.models[name] for name in lanes})
        executor = Executor(self.models, memory.pool, scheduler, self.stats, memory.graphs)
        elsewhere: list[SampledSequence] = []
        ran: list[SampledSequence] = []
        new = deque(sequences)
        try:
            while True:
                while new:
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
                batch = scheduler.schedule()
                ended = scheduler.take_refused()
                if batch is None and not ended:
                    break
                if batch is not None:
                    ended += executor.execute(batch)
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
        self.stats.note_floor([(*sequence.cache_key, len(sequence.output_ids)) for sequence in ran])
        return elsewhere

    def _refuse_or_prepare(self, pool: KVPool, sequence: SampledSequence) -> None:
        """Fail a sequence that cannot run; otherwise prepend placeholders for a soft prompt to its prompt."""
        if sequence.completion is not None:
            return
        model, sequence.forward_model = self.models[sequence.model], self._lanes[sequence.model]
        problem = _refusal(model, sequence.prompt, sequence.params)
        if problem is None and model.invocation:
            sequence.base = self._bases[sequence.model]
            try:
                sequence.num_base_tokens = invocation_start(sequence.prompt, model.invocation)
            except DataError as error:
                problem = str(error)
        if problem is None:
            sequence.prompt = (-1,) * model.virtual_tokens + sequence.prompt
            pages = pool.pages_for(sequence.model, sequence.num_base_tokens)
            pages += pool.pages_for(sequence.model, len(sequence.prompt) - sequence.num_base_tokens)
            pages += pool.pages_for(sequence.model, sequence.params.max_tokens - 1)
            if pages > pool.total:
                problem = (
                    f"{len(sequence.prompt)} prompt tokens and {sequence.params.max_tokens} new ones take {pages} pages, "
                    f"and the engine's pool has {pool.total}: give it more memory (pool_bytes)"
                )
        if problem is not None:
            sequence.fail(problem)

    def _memory(self, device: torch.device) -> _Memory:
        """The memory of a device, created on first use."""
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
        memory.pool.total = memory.pages  # memory that an earlier run could not get may be free now
        if device in self._released:  # all at once: growing page by page would move the arena and invalidate graphs
            memory.pool.try_resize([self._released.pop(device)])
        return memory

    def _decode_graphs(self, pool: KVPool, device: torch.device) -> DecodeGraphs | None:
        if self.cuda_graphs == "padded":
            return DecodeGraphs(pool, device, capture=False)
        if self.cuda_graphs and device.type != "cuda":
            raise ConfigError(
                f"engine: cuda_graphs=True needs a GPU, but a model is on {device}: leave cuda_graphs unset"
            )
        if self.cuda_graphs or (self.cuda_graphs is None and device.type == "cuda" and torch.version.cuda):
            return DecodeGraphs(pool, device, required=self.cuda_graphs is True)
        return None


def _lane(name: str, models: Mapping[str, LanguageModel]) -> str:
    """The model in whose forward passes a model runs: for a base, the model with the adapter; otherwise itself."""
    model = models[name]
    whole = (other for other, each in models.items() if not each.is_base and each.shares_weights(model))
    return next(whole, name) if model.is_base else name


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
