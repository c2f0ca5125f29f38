"""The generation engine: sampling from one model, and chains of two (prompter → target), on one KV pool per device.

A prefix is computed once for all sequences that share it, whether they arrive together, later, or in another call.
Batching is continuous: requests are submitted and cancelled between any two steps, and `Engine.step` runs one batch.
`Engine.generate` and `Engine.run_chains` submit requests and step until they have finished. The parts are in `worker`,
`scheduler`, `prefix_tree`, `attention_plan` and `pool`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import index
from time import perf_counter
from types import MappingProxyType
from typing import Literal

import torch

from alignpro.config import EngineConfig
from alignpro.engine.chains import ChainRun, OnChain, ToTarget
from alignpro.engine.faults import describe
from alignpro.engine.pool import KVPool
from alignpro.engine.sampler import derive_seed
from alignpro.engine.sequence import OnCompletion, Request, SampledSequence
from alignpro.engine.stats import EngineStats
from alignpro.engine.types import Chain, Completion, SamplingParams, token_ids
from alignpro.engine.worker import Worker
from alignpro.errors import ConfigError
from alignpro.models.language_model import LanguageModel

_DEFAULTS = EngineConfig()


class Engine:
    """Samples from a set of named models.

    Models on one device share one pool. The pool lives as long as the engine; a cached prompt stays in it until its
    pages are needed or `weights_updated` invalidates it.

    A model with a LoRA and its base (`LanguageModel.without_adapter`) run in the same forward passes. The tokens before the
    invocation of an activated LoRA are computed once for both models, and stay cached when the LoRA's weights change.

    Args:
        models: Name → model, in the order in which chains pass through them. These are the trainer's own modules, never
            copies.
        max_batch: Maximum number of sequences of a model that run at the same time.
        pool_bytes: Memory for keys and values on each device. By default, enough for ``max_batch`` sequences of the full
            context length, but at most 1 GiB on a CPU and 40 % of the free memory on an accelerator.
        page_tokens: Page size in tokens of the largest model.
        token_budget: Maximum number of tokens per forward pass; the rest of a long prompt waits for the next pass.
        cuda_graphs: Whether decode-only passes are captured as CUDA graphs and replayed. None enables this where CUDA is
            available and the model can be captured. ``padded`` pads passes as for capture but runs them eagerly, on any
            device.
        async_scheduling: Whether a pass is launched before the tokens of the pass before it have arrived, so that the
            device does not wait for the host. None enables this on CUDA devices.
        audit: Check the bookkeeping of the pool after every pass; meant for tests.

    Raises:
        ConfigError: A number is below 1.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        *,
        max_batch: int = _DEFAULTS.max_batch,
        pool_bytes: int | None = _DEFAULTS.pool_bytes,
        page_tokens: int = _DEFAULTS.page_tokens,
        token_budget: int = _DEFAULTS.token_budget,
        cuda_graphs: bool | Literal["padded"] | None = _DEFAULTS.cuda_graphs,
        async_scheduling: bool | None = _DEFAULTS.async_scheduling,
        audit: bool = False,
    ) -> None:
        sizes = {
            "max_batch": max_batch,
            "page_tokens": page_tokens,
            "token_budget": token_budget,
            "pool_bytes": pool_bytes,
        }
        for key, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(f"engine.{key}={size}: expected at least 1")
        self.models = MappingProxyType(dict(models))
        self.max_batch = max_batch
        self.pool_bytes = pool_bytes
        self.page_tokens = page_tokens
        self.token_budget = token_budget
        self.cuda_graphs = cuda_graphs
        self.async_scheduling = async_scheduling
        self.audit = audit
        self.stats = EngineStats()
        self._workers: dict[torch.device, Worker] = {}
        self._worker_of: dict[str, Worker] = {}  # by the name of a model
        self._arrivals = itertools.count()
        self._ended: deque[SampledSequence] = deque()  # their callbacks have not been called yet
        self._submitted: dict[Request, None] = {}  # by `submit`, unfinished
        self._finished: list[Request] = []  # to be returned by `step`
        self._changing = False  # stays True if an interrupt stopped a change before it could be undone
        self._calling_back = False

    @property
    def workers(self) -> Mapping[torch.device, Worker]:
        """What generates on each device. Made on first use, which runs each model on one token to learn its geometry."""
        if not self._workers:
            devices = {name: model.device for name, model in self.models.items()}
            self._workers = {device: self._new_worker(device) for device in dict.fromkeys(devices.values())}
            self._worker_of = {name: self._workers[device] for name, device in devices.items()}
        return self._workers

    @property
    def pools(self) -> dict[torch.device, KVPool]:
        """The pages of each device, for keys and values."""
        return {device: worker.pool for device, worker in self.workers.items()}

    @property
    def num_unfinished_requests(self) -> int:
        """Requests submitted by `submit` that `step` has not returned yet, without cancelled ones."""
        return len(self._submitted) + len(self._finished)

    def submit(self, name: str, prompt: Sequence[int], params: SamplingParams, seed: int = 0) -> Request:
        """Queue a request, which runs in the next calls of `step`, together with all others.

        Args:
            name: Name of the model.
            prompt: Token ids.
            params: Sampling parameters; its ``seed`` is not used.
            seed: Completion k draws from (seed, k), whatever else runs at the same time.

        Returns:
            The request. Its ``completions`` can be read once it has ``finished``. If it cannot run, or its computation
            raises, the ``finish_reason`` of its completions is ``error``, and the other requests are not affected.
        """
        tokens, number = token_ids(prompt), _plain([seed])[0]
        self._worker(name)  # these raise before anything changes
        with _Change(self):
            request = self._submit(name, tokens, params, number, next(self._arrivals))
            if request.finished:
                self._finished.append(request)
            else:
                self._submitted[request] = None
        return request

    def cancel(self, request: Request) -> None:
        """End a request now and free its pages, in whatever state it is.

        Its sequences that have not ended get the ``finish_reason`` ``cancelled`` and keep the tokens sampled so far.
        `step` does not return it. If the request has finished, nothing happens.
        """
        with _Change(self):
            if not request.finished:
                self._worker(request.model).cancel(request, self.stats)
                self._submitted.pop(request, None)
                self._worker(request.model).count(self.stats)

    def step(self) -> list[Request]:
        """Run one batch: the next token of each running sequence of a model, and parts of prompts up to the budget.

        Returns:
            The submitted requests that have finished since the last call, each exactly once; an empty list, immediately,
            if none is pending.

        Raises:
            Exception: The device has failed, or the engine is misconfigured, so that nothing can be computed. All pending
                requests have failed then, with the reason in their completions, all pages are free and no prompt is
                cached; the next call returns the requests. An interrupt (`BaseException`), which can arrive anywhere,
                has the same effect, in whichever method.
        """
        with self._timed(), _Change(self):
            self._step()
        finished, self._finished = self._finished, []
        return finished

    def generate(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Draw ``params.n`` completions of each prompt.

        Args:
            name: Name of the model.
            prompts: Token ids of each prompt.
            params: Sampling parameters.
            seeds: One seed per prompt; by default derived from ``params.seed`` and the prompt's index. Completion k of a
                prompt draws from (its seed, k), so the result does not depend on batching.
            on_completion: Called with the index of the prompt, k and the completion as soon as that has ended. Whatever it
                raises ends the call.

        Returns:
            A list of n completions per prompt. A prompt that cannot be run, or whose computation raises, gets completions
            whose ``finish_reason`` is ``error``; the other prompts are not affected.

        Raises:
            Exception: As for `step`.
        """
        tokens = list(map(token_ids, prompts))
        seeds = _seeds(params, len(prompts)) if seeds is None else _plain(seeds)
        self._check_call([name], seeds, len(prompts))
        arrival = next(self._arrivals)
        with self._timed(), _Change(self):
            requests = [
                self._submit(name, each, params, seeds[i], arrival, on_completion and partial(on_completion, i))
                for i, each in enumerate(tokens)
            ]
            self._finish(requests)
        return [request.completions for request in requests]

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
        on_chain: OnChain | None = None,
    ) -> list[list[Chain]]:
        """Draw ``rewrite.n`` rewrites of each prompt from `policy`, and ``respond.n`` responses of `target` to each rewrite.

        A rewrite is passed to the target as soon as it ends. Response m to rewrite k of a prompt draws from (the prompt's
        seed, "respond", k, m). If a rewrite fails or ``to_target`` raises, the responses of that chain are errors that
        state the reason. ``to_target`` gets the prompt's index and the rewrite, and returns an object whose ``tokens``
        are the target's prompt; the chain carries that object as ``target_prompt``. ``on_chain`` is called with the prompt's
        index and a chain as soon as its responses have ended; whatever it raises ends the call.

        Raises:
            Exception: As for `step`.
        """
        tokens = list(map(token_ids, prompts))
        seeds = _seeds(rewrite, len(prompts)) if seeds is None else _plain(seeds)
        self._check_call([policy, target], seeds, len(prompts))
        arrival = next(self._arrivals)
        run = ChainRun(target, respond, to_target, seeds, partial(self._submit, arrival=arrival), on_chain)
        with self._timed(), _Change(self):
            self._finish(
                [
                    self._submit(policy, each, rewrite, seeds[i], arrival, partial(run.add_sample, i))
                    for i, each in enumerate(tokens)
                ]
            )
            self._finish(run.responses)
        return run.result()

    def _check_call(self, names: Sequence[str], seeds: Sequence[int], prompts: int) -> None:
        """Refuse a call before anything changes: what is raised later ends all requests.

        Raises:
            KeyError: The engine does not have a model.
            ValueError: There is not one seed for each prompt.
        """
        for name in names:
            self._worker(name)
        if len(seeds) != prompts:
            raise ValueError(f"{len(seeds)} seeds for {prompts} prompts: give one for each")

    def weights_updated(self, name: str) -> None:
        """Drop everything cached for a model whose weights have changed.

        Raises:
            RuntimeError: Requests to the model are pending.
        """
        if not self._workers:
            self.models[name].weights_updated()
            return
        worker = self._worker(name)
        with _Change(self):
            # Sequences whose end has not been told count as pending.
            sequences = (*worker.scheduler.pending, *self._ended)
            if pending := sum(name in (each.model, each.request.base) for each in sequences):
                raise PendingError(
                    f"model {name}: its weights cannot change while it generates ({pending} sequences are pending)"
                )
            worker.weights_updated(name)

    def release(self, keep: Collection[str] = ()) -> None:
        """Free the memory of the pools, including the cached prompts; the next request allocates it again.

        Args:
            keep: Models whose cached prompts stay, in just the memory they need. Meant for models whose weights do not
                change in the meantime.

        Raises:
            ValueError: ``keep`` names a model that the engine does not have.
            RuntimeError: Requests are pending.
        """
        if unknown := set(keep) - set(self.models):
            raise ValueError(f"release: keep names {min(unknown)!r}, and the models are {', '.join(self.models)}")
        with _Change(self):
            if pending := sum(len(each.scheduler.pending) for each in self._workers.values()) + len(self._ended):
                raise PendingError(f"{pending} sequences are pending: the memory of the pools is in use")
            for worker in self._workers.values():
                worker.release(keep)

    def _worker(self, name: str) -> Worker:
        _ = self.workers
        return self._worker_of[name]

    def _new_worker(self, device: torch.device) -> Worker:
        return Worker(
            {name: model for name, model in self.models.items() if model.device == device},
            max_batch=self.max_batch,
            pool_bytes=self.pool_bytes,
            page_tokens=self.page_tokens,
            token_budget=self.token_budget,
            cuda_graphs=self.cuda_graphs,
            async_scheduling=self.async_scheduling,
            audit=self.audit,
        )

    def _submit(
        self,
        name: str,
        prompt: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        arrival: int,
        on_completion: OnCompletion | None = None,
    ) -> Request:
        request = self._worker(name).submit(name, prompt, params, seed, arrival, on_completion)
        self._ended += [sequence for sequence in request.sequences if sequence.completion is not None]
        return request

    def _finish(self, requests: Iterable[Request]) -> None:
        """Step until the requests have finished; more may be appended in the meantime."""
        self._call_back()  # for those that were refused, even if nothing runs
        for request in requests:
            while not request.finished:
                self._step()

    def _step(self) -> None:
        """Run one batch on the device whose requests arrived first; then call back for the sequences that have ended."""
        self._call_back()
        workers = [worker for worker in self._workers.values() if not worker.scheduler.idle]
        if workers:
            worker = min(workers, key=lambda each: each.scheduler.oldest)
            self._ended += worker.step(self.stats)
            self._call_back()
            worker.count(self.stats)

    def _call_back(self) -> None:
        while self._ended:
            sequence = self._ended.popleft()
            request, completion = sequence.request, sequence.completion
            assert completion is not None
            if request.on_completion is not None:
                within = self._calling_back
                try:
                    self._calling_back = True
                    request.on_completion(sequence.index, completion)
                finally:
                    self._calling_back = within
            if request in self._submitted and request.finished:
                self._finished.append(request)
                del self._submitted[request]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = perf_counter()
        try:
            yield
        finally:
            self.stats.run_seconds += perf_counter() - started

    def _start_anew(self, reason: str) -> None:
        """Fail the pending requests and empty pools and caches. It may be interrupted and repeated."""
        self._calling_back = False
        for worker in self._workers.values():
            worker.clear()
        for request in self._submitted:
            for sequence in request.sequences:
                if sequence.completion is None:
                    sequence.fail(reason)
        self._ended.clear()
        self._finished = list(dict.fromkeys([*self._finished, *self._submitted]))
        self._submitted.clear()
        self._changing = False


class PendingError(RuntimeError):
    """What was asked for cannot be done while sequences are pending; nothing has changed."""


class _Change:
    """The context of a change of the bookkeeping. If anything but a `PendingError` leaves it, the engine starts anew.

    An interrupt can arrive between any two instructions, even of these methods, so a change that was neither completed nor
    undone is undone by the next one. (With `contextlib.contextmanager` the undoing could also come when the generator is
    collected, in the middle of that next one.)
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._nested = engine._calling_back  # within another change, which undoes both

    def __enter__(self) -> None:
        if not self._nested:
            if self._engine._changing:
                self._engine._start_anew("generation was interrupted")
            self._engine._changing = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._nested:
            return
        if error is None or isinstance(error, PendingError):
            self._engine._changing = False
        else:
            self._engine._start_anew(describe("generation", error))


def _plain(seeds: Iterable[int]) -> list[int]:
    """Seeds as plain integers."""
    try:
        return list(map(index, seeds))
    except TypeError as error:
        raise TypeError(f"seeds: expected integers: {error}") from None


def _seeds(params: SamplingParams, count: int) -> list[int]:
    return [derive_seed(params.seed, i) for i in range(count)]
