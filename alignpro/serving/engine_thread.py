"""The thread that generates: one engine with all models of the process, stepped while requests come and go.

| owns | does not own |
|---|---|
| the engine, its thread, which generations are pending, when it has failed | prompts, templates, deadlines |

Everything that touches an engine runs on its thread; the event loop sends it calls, which it makes between two steps. So a new
request joins the next batch, and a cancelled one is gone before it.

A set of models is replaced by another engine with the new set: what is pending ends on the old one, which is then dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue

import torch

from alignpro.config import EngineConfig
from alignpro.engine import Completion, Engine, Request, SamplingParams, TokenLogprobs
from alignpro.engine.sequence import SampledSequence
from alignpro.errors import AlignProError
from alignpro.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Steps that fail without a completion between them, after which the engine counts as broken."""


class EngineFailedError(AlignProError):
    """The engine generates no more: it is broken or closed, or it does not have the model."""


class Generation:
    """A request to the engine, as the event loop sees it.

    Args:
        model: Name of the model.
        prompt: Token ids.
        params: Sampling parameters.
        seed: Draw k takes (``seed``, k).
        draws: The seeds of the draws themselves, in place of ``seed``.
        streamed: Whether tokens are wanted before the end.
    """

    def __init__(
        self,
        model: str,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        draws: Sequence[int] | None,
        streamed: bool,
    ) -> None:
        self.model, self.prompt, self.params, self.seed, self.draws, self.streamed = (
            model,
            prompt,
            params,
            seed,
            draws,
            streamed,
        )
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[list[Completion]] = self.loop.create_future()
        self.request: Request | None = None
        """Set on the engine's thread, which may be changing what it holds."""
        self._tokens: list[list[int]] | None = None  # those that nobody has read
        self._changed = asyncio.Event()
        self.done.add_done_callback(lambda _: self._changed.set())

    async def updates(self) -> AsyncIterator[list[list[int]]]:
        """The tokens of each draw so far, whenever there are more, until all have ended; `done` has the completions."""
        while not self.done.done():
            await self._changed.wait()
            self._changed.clear()
            if self._tokens is not None and not self.done.done():
                tokens, self._tokens = self._tokens, None
                yield tokens

    def model_logprobs(self, draw: int) -> Sequence[TokenLogprobs]:
        """The log-probabilities of a draw's sampled tokens, of at least those that `updates` gave, if they are recorded."""
        return () if self.request is None else tuple(self.request.sequences[draw].model_logprobs)

    def note_tokens(self, tokens: list[list[int]]) -> None:
        """Keep the tokens so far for `updates`."""
        self._tokens = tokens
        self._changed.set()

    def finish(self, outcome: list[Completion] | EngineFailedError) -> None:
        """End it, unless it was cancelled."""
        if self.done.done():
            return
        if isinstance(outcome, EngineFailedError):
            self.done.set_exception(outcome)
            self.done.exception()  # nobody may be waiting any more, which is no error
        else:
            self.done.set_result(outcome)


Outcomes = list[tuple[Generation, list[Completion] | EngineFailedError]]


class EngineThread:
    """Generates on a thread of its own.

    Args:
        models: Name → model.
        config: Memory and batch sizes.
    """

    def __init__(self, models: Mapping[str, LanguageModel], config: EngineConfig) -> None:
        self.failure: str | None = None
        """Why nothing is generated any more."""
        self._config = config
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()  # between `failure` and what is put into the queue
        self._waiting: Counter[str] = Counter()  # on the event loop
        # The rest belongs to the thread.
        self._engines = [self._new_engine(models)]  # the newest last
        self._retired = 0  # so many of the oldest are dropped once they are idle
        self._pending: dict[Request, tuple[Engine, Generation]] = {}
        self._requests: dict[Generation, Request] = {}
        self._failures = 0
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def waiting(self, model: str) -> int:
        """Generations of a model that have not ended."""
        return self._waiting[model]

    def start(
        self,
        model: str,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int = 0,
        *,
        draws: Sequence[int] | None = None,
        streamed: bool = False,
    ) -> Generation:
        """Begin a generation, on the running event loop. Whoever begins one calls `cancel` if it is not awaited to its end.

        Raises:
            EngineFailedError: The engine is broken or closed.
        """
        generation = Generation(model, prompt, params, seed, draws, streamed)
        self._call(partial(self._start, generation))
        self._waiting[model] += 1
        generation.done.add_done_callback(lambda _: self._count_out(model))
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a generation now, before the next step; nothing happens if it has ended."""
        if not generation.done.done():
            generation.done.cancel()
        if self.failure is None:
            self._calls.put(partial(self._cancel, generation))

    async def complete(
        self,
        model: str,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int = 0,
        *,
        draws: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Generate; cancelling the call ends the work on it.

        Raises:
            EngineFailedError: The engine is or becomes broken or closed.
        """
        generation = self.start(model, prompt, params, seed, draws=draws)
        try:
            return await generation.done
        except asyncio.CancelledError:
            self.cancel(generation)
            raise

    async def replace(self, models: Mapping[str, LanguageModel], then: Callable[[], None]) -> None:
        """Change the models, without an effect on what is pending.

        Args:
            models: Name → model, of all.
            then: Called on the event loop once the new models are there. The ones that are gone can be used until it has
                returned.

        Raises:
            EngineFailedError: The engine is broken or closed.
            Exception: The new models cannot be run; the engine goes on with the old ones.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._call(partial(self._replace, models, loop, done))
        await done
        then()
        self._call(self._retire)

    async def close(self) -> None:
        """End the thread; what is pending fails."""
        if self.failure is None:
            self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    def _call(self, call: Callable[[], None]) -> None:
        with self._lock:
            if self.failure is not None:
                raise EngineFailedError(self.failure)
            self._calls.put(call)

    def _count_out(self, model: str) -> None:
        self._waiting[model] -= 1
        if not self._waiting[model]:
            del self._waiting[model]

    # On the thread.

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP counts by thread
        try:
            while self._take_calls():
                for engine in tuple(self._engines):
                    if engine.num_unfinished_requests:
                        self._step(engine)
                self._drop_retired()
            self._end("the engine is closed")
        except BaseException as error:
            logger.error("the engine's thread ends", exc_info=error)
            self._end(f"the engine has failed: {type(error).__name__}: {error}")

    def _take_calls(self) -> bool:
        """Make the calls of the event loop, waiting for one if there is nothing else to do; False ends the thread."""
        wait = not any(engine.num_unfinished_requests for engine in self._engines)
        while True:
            try:
                call = self._calls.get(block=wait)
            except Empty:
                return True
            if call is None:
                return False
            call()
            wait = False

    def _start(self, generation: Generation) -> None:
        if generation.done.done():  # given up before its turn came
            return
        engine = next((each for each in reversed(self._engines) if generation.model in each.models), None)
        if engine is None:
            reason = self.failure or f"the engine has no model {generation.model} any more"
            self._tell([(generation, EngineFailedError(reason))])
            return
        try:
            request = engine.submit(generation.model, generation.prompt, generation.params, generation.seed)
        except Exception as error:
            self._note_failure(error)
            self._tell([(generation, EngineFailedError(f"the engine: {type(error).__name__}: {error}"))])
            return
        if generation.draws is not None:  # before anything is drawn
            for sequence, seed in zip(request.sequences, generation.draws, strict=True):
                sequence.seed = seed
        generation.request = request
        self._pending[request] = engine, generation
        self._requests[generation] = request

    def _cancel(self, generation: Generation) -> None:
        request = self._requests.pop(generation, None)
        if request is not None:
            engine, _ = self._pending.pop(request)
            engine.cancel(request)

    def _step(self, engine: Engine) -> None:
        try:
            finished = engine.step()
        except Exception as error:  # the pending requests have failed, and the next step returns them
            self._note_failure(error)
            return
        outcomes: Outcomes = []
        for request in finished:
            if (entry := self._pending.pop(request, None)) is not None:
                del self._requests[entry[1]]
                outcomes.append((entry[1], request.completions))
        if any(completion.error is None for request in finished for completion in request.completions):
            self._failures = 0
        self._tell(outcomes, self._streamed(engine))

    def _streamed(self, engine: Engine) -> list[tuple[Generation, list[list[int]]]]:
        return [
            (generation, [_tokens_so_far(sequence) for sequence in request.sequences])
            for request, (own, generation) in self._pending.items()
            if generation.streamed and own is engine
        ]

    def _replace(
        self, models: Mapping[str, LanguageModel], loop: asyncio.AbstractEventLoop, done: asyncio.Future[None]
    ) -> None:
        try:
            if self.failure is not None:
                raise EngineFailedError(self.failure)
            self._engines.append(self._new_engine(models))
        except Exception as error:
            _on(loop, partial(_fail, done, error))
        else:
            _on(loop, partial(_succeed, done))

    def _retire(self) -> None:
        self._retired = len(self._engines) - 1

    def _drop_retired(self) -> None:
        for engine in self._engines[: self._retired]:
            if not engine.num_unfinished_requests:
                engine.release()
                self._engines.remove(engine)
                self._retired -= 1

    def _new_engine(self, models: Mapping[str, LanguageModel]) -> Engine:
        engine = Engine(models, **self._config.model_dump())
        _ = engine.workers  # each model is tried now, not with the first request
        return engine

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        logger.error("generation failed (%d of %d)", self._failures, MAX_FAILURES, exc_info=error)
        if self._failures >= MAX_FAILURES or isinstance(error, torch.AcceleratorError):
            raise error

    def _end(self, reason: str) -> None:
        """Fail everything that is pending or comes later."""
        with self._lock:
            self.failure = reason
        self._tell([(generation, EngineFailedError(reason)) for generation in self._requests])
        self._engines.clear()
        while True:
            try:
                call = self._calls.get(block=False)
            except Empty:
                return
            if call is not None:
                call()  # which finds no engine

    def _tell(self, outcomes: Outcomes, streamed: Sequence[tuple[Generation, list[list[int]]]] = ()) -> None:
        """Tell the event loops, each by one call."""
        calls: defaultdict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = defaultdict(list)
        for generation, outcome in outcomes:
            calls[generation.loop].append(partial(generation.finish, outcome))
        for generation, tokens in streamed:
            calls[generation.loop].append(partial(generation.note_tokens, tokens))
        for loop, own in calls.items():
            _on(loop, partial(_make_all, own))


def _tokens_so_far(sequence: SampledSequence) -> list[int]:
    """The tokens of a draw's text; once it has ended, without those of what ended it."""
    return list(sequence.output_ids) if sequence.completion is None else sequence.completion.text_tokens


def _make_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _on(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Make a call on an event loop, unless that has been closed, and whoever waited with it."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _fail(done: asyncio.Future[None], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)


def _succeed(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
