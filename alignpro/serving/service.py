"""What the routes of the proxy share: target, rewriter, tokens, admission, metrics and log; and the reload of what can change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from alignpro.config import ServeConfig
from alignpro.errors import ConfigError
from alignpro.serving.access_log import AccessLog
from alignpro.serving.admission import Admission
from alignpro.serving.authentication import admin_tokens, client_tokens
from alignpro.serving.contract import Asked, Outcome, RequestRewriter, ServedTarget
from alignpro.serving.metrics import Metrics
from alignpro.serving.recent_requests import RecentRequests

_READY_SECONDS = 2.0
"""How long an answer of the target to "are you there" holds."""


class ServedRuns(Protocol):
    """The prompters that are loaded."""

    @property
    def rewriter(self) -> RequestRewriter: ...

    @property
    def failure(self) -> str | None:
        """Why nothing is rewritten any longer; None while it is."""

    @property
    def waiting(self) -> int:
        """Rewrites that wait for the prompter."""

    async def serve(self, paths: Sequence[Path]) -> Sequence[str]:
        """Serve the runs in directories, the default first, in place of those before; what is in flight ends.

        Returns:
            Their ids.

        Raises:
            AlignProError: One cannot be loaded; what is served has not changed.
        """

    async def close(self) -> None:
        """End it."""


class PassThrough:
    """The rewriter of a proxy without a run."""

    @property
    def runs(self) -> tuple[str, ...]:
        return ()

    async def rewrite(self, asked: Asked) -> Outcome:
        """The request as it came."""
        return Outcome(asked.raw, "no_run")

    async def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class Readiness:
    """Whether requests can be served."""

    problems: tuple[str, ...]
    runs: tuple[str, ...]

    @property
    def is_ready(self) -> bool:
        return not self.problems

    def document(self) -> dict[str, Any]:
        """For `/ready`."""
        state = "ready" if self.is_ready else "not ready"
        return {"status": state, "problems": list(self.problems), "runs": list(self.runs)}


class Service:
    """A proxy's parts.

    Args:
        config: Its configuration.
        target: Where requests go.
        runs: The prompters; None without any.
        reread: Reads the configuration anew, for a reload.

    Raises:
        ConfigError: Tokens or the log's file are not there.
    """

    def __init__(
        self,
        config: ServeConfig,
        target: ServedTarget,
        runs: ServedRuns | None = None,
        reread: Callable[[], ServeConfig] | None = None,
    ) -> None:
        self.config, self.target, self._runs, self._reread = config, target, runs, reread
        self.rewriter: RequestRewriter = PassThrough() if runs is None else runs.rewriter
        self.tokens, self.admin = client_tokens(config.access), admin_tokens(config.access)
        self.admission = Admission(config.limits)
        self.log = AccessLog(config.log)
        self.recent = RecentRequests(config.page)
        self.run_paths = _absolute(config.runs)
        """The directories of the runs; the last part of each is the run's id."""
        self.metrics = Metrics(
            {
                "alignpro_in_flight": ("Requests at the prompter or the target.", lambda: self.admission.running),
                "alignpro_queued": ("Requests that wait for a place.", lambda: self.admission.waiting),
                "alignpro_prompter_queue": (
                    "Rewrites that wait for the prompter.",
                    lambda: runs.waiting if runs else 0,
                ),
                "alignpro_runs": ("Runs that are served.", lambda: len(self.rewriter.runs)),
            }
        )
        self.is_stopping = False
        self._expects_runs = bool(config.runs)
        self._reloading = asyncio.Lock()
        self._reach = _Remembered(target.reachable, _READY_SECONDS)

    def note_later(self, request_id: str, reason: str | None, outcome: Outcome) -> None:
        """Record what a rewrite that was not waited for became.

        Args:
            request_id: Of its request.
            reason: Why the request did not use it; a rewrite that has no other problem would have been applied.
            outcome: What became of it.
        """
        if outcome.skipped == reason:
            outcome = replace(outcome, skipped=None)
        self.metrics.count_later(outcome)
        self.log.write_later(request_id, outcome)

    async def readiness(self) -> Readiness:
        """Whether runs are loaded, the prompter works and the target answers."""
        problems = ["The proxy stops."] if self.is_stopping else []
        if self._runs is not None:
            if self._runs.failure is not None:
                problems.append(self._runs.failure)
            elif self._expects_runs and not self.rewriter.runs:
                problems.append("No run is loaded.")
        if (unreachable := await self._reach()) is not None:
            problems.append(unreachable)
        return Readiness(tuple(problems), self.rewriter.runs)

    async def reload(self) -> Sequence[str]:
        """Read the configuration anew, and serve its runs and tokens; requests in flight end with what they began with.

        Returns:
            The ids of the runs.

        Raises:
            AlignProError: Something cannot be read or loaded, or what changed takes a restart: what was served before is served
                further.
        """
        async with self._reloading:
            config = self.config if self._reread is None else await asyncio.to_thread(self._reread)
            if changed := _takes_restart(self.config, config):
                raise ConfigError(
                    f"{', '.join(changed)}: a change of this takes a restart; runs and tokens alone are reloaded"
                )
            tokens, admin = client_tokens(config.access), admin_tokens(config.access)
            self.log.reopen()
            if self._runs is not None:
                await self._runs.serve(config.runs)
            self.tokens, self.admin = tokens, admin
            self._expects_runs = bool(config.runs)
            self.run_paths = _absolute(config.runs)
            return self.rewriter.runs

    async def close(self) -> None:
        """End it."""
        if self._runs is not None:
            await self._runs.close()
        await self.target.close()
        self.log.close()


def _takes_restart(before: ServeConfig, now: ServeConfig) -> list[str]:
    """The keys that differ, of those that are read at the start alone: a proxy must not lose its tokens and keep its address."""
    old, new = before.model_dump(), now.model_dump()
    for each in (old, new):
        del each["runs"]
        for name in ("tokens_env", "tokens_file", "admin_tokens_env", "anyone"):
            del each["access"][name]
    found = []
    for key, value in new.items():
        if isinstance(value, dict):
            found += [f"{key}.{name}" for name in value if value[name] != old[key].get(name)]
        elif value != old[key]:
            found.append(key)
    had_tokens, has_tokens = (bool(each.access.tokens_env or each.access.tokens_file) for each in (before, now))
    if had_tokens and not has_tokens:
        found.append("access without tokens")
    if before.access.admin_tokens_env and not now.access.admin_tokens_env:
        found.append("access without admin_tokens_env")
    return found


def _absolute(paths: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(path.absolute() for path in paths)


class _Remembered:
    """An answer that holds for a while; those who ask at the same time share it."""

    def __init__(self, ask: Callable[[], Awaitable[str | None]], seconds: float) -> None:
        self._ask, self._seconds = ask, seconds
        self._answer: str | None = None
        self._until = 0.0
        self._lock = asyncio.Lock()

    async def __call__(self) -> str | None:
        async with self._lock:
            if time.monotonic() >= self._until:
                self._answer = await self._ask()
                self._until = time.monotonic() + self._seconds
            return self._answer
