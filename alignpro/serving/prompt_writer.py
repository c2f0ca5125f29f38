"""Writes the rewrite of one prompt with the prompter of a run: its input, the engine, what is wrong with the result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import ParamSpec, TypeVar

from alignpro.config.serving_rewriting import RewritingConfig
from alignpro.data import Prompt
from alignpro.engine import derive_seed
from alignpro.environments.trained_prompter import TrainedPrompter
from alignpro.errors import AlignProError
from alignpro.rewards.guards import Guard
from alignpro.serving.candidates import CandidateChooser
from alignpro.serving.contract import Asked
from alignpro.serving.engine_thread import EngineFailedError, EngineThread
from alignpro.serving.prompt_span import Conversation
from alignpro.serving.recent import Recent

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

INLINE_CHARACTERS = 4000
"""Texts up to this length are encoded and compared on the event loop: it takes less than a change of threads."""
UNUSABLE = frozenset({"refused", "empty", "truncated", "unchanged", "too_long"})
"""Reasons not to use a rewrite that hold for the prompt whenever it comes; so do those of guards."""


@dataclass(frozen=True)
class ServedRun:
    """A run whose prompter is loaded."""

    id: str
    name: str
    """Of its prompter in the engine; another one each time that the run is loaded."""
    prompter: TrainedPrompter
    chooser: CandidateChooser | None = None
    """Chooses among several rewrites."""


@dataclass(frozen=True)
class Written:
    """What became of a rewrite."""

    rewrite: str | None
    problem: str | None = None
    """Why it is not used."""
    details: Mapping[str, float] = field(default_factory=dict)


class PromptWriter:
    """Writes rewrites.

    Args:
        config: Sampling, deadline, guards, and the sizes of cache and queue.
        engine: Has the prompters under the names of their runs.

    Raises:
        ModelError: The encoder of a guard cannot be used.
    """

    def __init__(self, config: RewritingConfig, engine: EngineThread) -> None:
        self._config, self._engine = config, engine
        self._guards = [(guard.kind, Guard(guard)) for guard in config.guards]
        self._cache: Recent[tuple[str, str], Written] = Recent(config.cached_rewrites)
        self._thread = ThreadPoolExecutor(1, "texts of the proxy")

    async def write(self, run: ServedRun, conversation: Conversation, asked: Asked, began: float) -> Written:
        """Rewrite the last turn of a conversation; whatever goes wrong is a problem of the result.

        Args:
            run: Whose prompter writes it.
            conversation: Of the request.
            asked: The request.
            began: Time of the event loop from which the deadline counts.
        """
        prompt = conversation.prompt
        assert prompt is not None and conversation.last is not None  # or there is nothing to rewrite
        if (known := self._cache.get((run.name, prompt.id))) is not None:
            return Written(known.rewrite, known.problem, {**known.details, "cached": 1.0})
        if len(prompt.text) > self._config.max_characters:
            return Written(None, "too_long")
        if self._engine.waiting(run.name) >= self._config.max_waiting:
            return Written(None, "queue_full")
        try:
            async with asyncio.timeout_at(began + self._config.deadline_ms / 1000):
                written = await self._write(run, conversation, prompt, asked)
        except TimeoutError:
            return Written(None, "deadline")
        except EngineFailedError as error:
            logger.error("request %s: a rewrite failed: %s", asked.request_id, error)
            return Written(None, "engine_failed")
        except AlignProError as error:  # whose message may hold the prompt, which logs must not
            logger.warning("request %s: a rewrite failed: %s", asked.request_id, type(error).__name__)
            logger.debug("request %s", asked.request_id, exc_info=error)
            return Written(None, "error")
        if written.problem is None or written.problem in UNUSABLE or written.problem.startswith("guard:"):
            self._cache.put((run.name, prompt.id), written)
        return written

    def close(self) -> None:
        """End its thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _write(self, run: ServedRun, conversation: Conversation, prompt: Prompt, asked: Asked) -> Written:
        config = self._config.candidates if run.chooser else None
        params = run.prompter.params(*((config.count, config.temperature) if config else (1, self._config.temperature)))
        try:
            tokens = await self._run(len(prompt.text), run.prompter.encode, prompt, params.max_tokens)
        except AlignProError as error:
            logger.debug("request %s: the prompter cannot have it: %s", asked.request_id, error)
            return Written(None, "refused")
        began = perf_counter()
        samples = await self._engine.complete(run.name, tokens, params, derive_seed(self._config.seed, prompt.id))
        details = {
            "prompter_seconds": perf_counter() - began,
            "prompter_input_tokens": float(len(tokens)),
            "prompter_tokens": float(sum(len(sample.tokens) for sample in samples)),
        }
        texts = []
        for sample in samples:
            if sample.error is not None:
                logger.error("request %s: a rewrite failed: %s", asked.request_id, sample.error)
                return Written(None, "error", details)
            truncated = sample.finish_reason == "length" and self._config.skip_truncated
            texts.append((run.prompter.text(prompt, sample), "truncated" if truncated else None))
        judged = await self._run(sum(len(text) for text, _ in texts), self._judge, prompt, texts)
        if run.chooser is None:
            (chosen,) = judged
            return Written(chosen.rewrite, chosen.problem, {**details, **chosen.details})
        return await self._choose(run.chooser, conversation, asked, judged, details)

    async def _choose(
        self,
        chooser: CandidateChooser,
        conversation: Conversation,
        asked: Asked,
        judged: Sequence[Written],
        details: Mapping[str, float],
    ) -> Written:
        """Choose among the rewrites that can be used."""
        usable = [each for each in judged if each.problem is None]
        if not usable:
            return Written(judged[0].rewrite, judged[0].problem, {**details, **judged[0].details})
        choice = await chooser.choose(asked, conversation, [each.rewrite or "" for each in usable])
        chosen = usable[choice.index]
        measures = {"candidates": float(len(usable)), "candidates_reward": choice.reward}
        return Written(chosen.rewrite, None, {**details, **chosen.details, **measures})

    def _judge(self, prompt: Prompt, texts: Sequence[tuple[str, str | None]]) -> list[Written]:
        return [self._judge_one(prompt, text, problem) for text, problem in texts]

    def _judge_one(self, prompt: Prompt, text: str, problem: str | None) -> Written:
        if not text.strip():
            return Written(text, "empty")
        if problem is None and text == prompt.text:
            problem = "unchanged"
        measures: dict[str, float] = {}
        for kind, guard in self._guards:
            measures[guard.name] = value = guard.measure([prompt], [text])[0]
            if problem is None and not guard.allows(value):
                problem = f"guard:{kind}"
        return Written(text, problem, measures)

    async def _run(self, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function, on another thread if its texts are long."""
        if size <= INLINE_CHARACTERS:
            return function(*args, **kwargs)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))
