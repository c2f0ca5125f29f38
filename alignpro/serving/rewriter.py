"""Decides for each request whether and how its prompt is rewritten, and writes the body that the target gets.

| owns | does not own |
|---|---|
| the runs, who is in the share, the rewrites of earlier turns, shadow mode | how a rewrite is made and judged |

Earlier turns that were rewritten are rewritten the same way again, whatever becomes of the last one: the target's answers
below them are answers to the rewrites, and its prefix cache holds those.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from time import perf_counter
from typing import Any

from alignpro.config.serving_rewriting import RewritingConfig
from alignpro.serving.contract import Asked, Outcome
from alignpro.serving.engine_thread import EngineThread
from alignpro.serving.prompt_span import Conversation, Turn, read_conversation, replaced
from alignpro.serving.prompt_writer import PromptWriter, ServedRun
from alignpro.serving.recent import Recent

logger = logging.getLogger(__name__)

INLINE_BYTES = 1 << 18
"""Bodies up to this size are read and written on the event loop; larger ones, with images, on another thread."""


class PromptRewriter:
    """Rewrites the prompts of requests; see `RequestRewriter`.

    Args:
        config: When a prompt is rewritten, and what is kept.
        engine: Has the prompters.
        runs: The runs, the default first.
    """

    def __init__(self, config: RewritingConfig, engine: EngineThread, runs: Sequence[ServedRun]) -> None:
        self.served = tuple(runs)
        self._config, self._engine = config, engine
        self._writer = PromptWriter(config, engine)
        self._history: Recent[tuple[str, str | None, str], str] = Recent(config.cached_turns)
        self._later: set[asyncio.Task[Outcome]] = set()
        self._closed = False

    @property
    def runs(self) -> tuple[str, ...]:
        """The ids of the runs, the default first."""
        return tuple(run.id for run in self.served)

    async def rewrite(self, asked: Asked) -> Outcome:
        """What to send to the target."""
        started = perf_counter()
        try:
            outcome = await self._rewrite(asked)
        except Exception:
            if not self._closed:
                logger.exception("request %s: rewriting failed", asked.request_id)
            outcome = Outcome(asked.raw, "closed" if self._closed else "error")
        return replace(outcome, seconds=perf_counter() - started)

    async def close(self) -> None:
        """End it; unfinished rewrites in shadow mode are skipped."""
        self._closed = True
        for task in tuple(self._later):
            task.cancel()
        self._writer.close()

    async def _rewrite(self, asked: Asked) -> Outcome:
        run = next((each for each in self.served if asked.run in (None, each.id)), None)
        if asked.opt_out or self._closed or run is None:
            reason = "opt_out" if asked.opt_out else "closed" if self._closed else "unknown_run"
            if asked.opt_out and run is not None and (last := read_conversation(asked).last) is not None:
                self._history.drop((run.id, asked.user, last.digest))  # the target answers the original this time
            return Outcome(asked.raw, reason if self.served or reason != "unknown_run" else "no_run")
        began = asyncio.get_running_loop().time()
        large = len(asked.raw) > INLINE_BYTES
        conversation = await asyncio.to_thread(read_conversation, asked) if large else read_conversation(asked)
        last = conversation.last
        original = None if last is None else last.text
        treated = self._in_share(asked, conversation)
        if not treated or self._config.shadow:
            reason = "shadow" if treated else "canary"
            later = None
            if last is not None and (treated or self._config.compare):
                later = self._in_background(lambda: self._write(asked, run, conversation, reason, began))
            return Outcome(asked.raw, reason, original, run=run.id, details={"treated": float(treated)}, later=later)
        outcome = await self._write(asked, run, conversation, None, began)
        with_history = partial(self._with_history, asked, run, conversation, outcome)
        return await asyncio.to_thread(with_history) if large else with_history()

    async def _write(
        self,
        asked: Asked,
        run: ServedRun,
        conversation: Conversation,
        unused: str | None,
        began: float,
    ) -> Outcome:
        """Rewrite the last turn; ``unused`` is why the rewrite is not sent in any case."""
        if conversation.last is None:
            return Outcome(asked.raw, conversation.reason, run=run.id)
        original = conversation.last.text
        if self._engine.failure is not None:
            return Outcome(asked.raw, "closed" if self._closed else "engine_failed", original, run=run.id)
        written = await self._writer.write(run, conversation, asked, began)
        problem = "closed" if written.problem == "engine_failed" and self._closed else written.problem
        details = {**written.details, "treated": float(unused != "canary")}
        return Outcome(asked.raw, problem or unused, original, written.rewrite, run.id, details=details)

    def _with_history(self, asked: Asked, run: ServedRun, conversation: Conversation, outcome: Outcome) -> Outcome:
        """The outcome with its body: the rewrite and those of earlier turns in their places."""
        texts: list[tuple[Turn, str]] = []
        for turn in conversation.earlier:
            if (known := self._history.get((run.id, asked.user, turn.digest))) is not None:
                texts.append((turn, known))
        details = {**(outcome.details or {}), "history": float(len(texts))}
        last = conversation.last
        rewrite = outcome.rewrite if outcome.skipped is None else None
        if last is not None and rewrite is not None:
            texts.append((last, rewrite))
        body = asked.raw
        if texts:
            try:
                body = replaced(asked.raw, asked.api, texts)
            except ValueError as error:
                logger.warning("request %s: its text cannot be replaced: %s", asked.request_id, error)
                rewrite, outcome = None, replace(outcome, skipped="encoding")
        if last is not None and rewrite is not None:
            self._history.put((run.id, asked.user, last.digest), rewrite)
        elif last is not None:
            self._history.drop((run.id, asked.user, last.digest))  # the target answers the original this time
        return replace(outcome, body=body, details=details)

    def _in_share(self, asked: Asked, conversation: Conversation) -> bool:
        """Whether the prompts of this user, or without one of this conversation, are rewritten."""
        if self._config.percent >= 100:
            return True
        turns = [*conversation.earlier, *([conversation.last] if conversation.last else [])]
        whose = asked.user if asked.user is not None else turns[0].digest if turns else ""
        number = int.from_bytes(sha256(f"{self._config.seed}:{whose}".encode()).digest()[:8], "big")
        return number / 2**64 * 100 < self._config.percent

    def _in_background(self, work: Callable[[], Coroutine[Any, Any, Outcome]]) -> asyncio.Future[Outcome]:
        """Rewrite without anyone waiting."""
        started = perf_counter()
        later: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def finish(task: asyncio.Task[Outcome]) -> None:
            self._later.discard(task)
            if task.cancelled():
                outcome = Outcome(b"", "closed")
            elif (error := task.exception()) is not None:
                logger.error("rewriting in shadow mode failed", exc_info=error)
                outcome = Outcome(b"", "error")
            else:
                outcome = task.result()
            if not later.done():
                later.set_result(replace(outcome, seconds=perf_counter() - started))

        task = asyncio.create_task(work())
        self._later.add(task)
        task.add_done_callback(finish)
        return later
