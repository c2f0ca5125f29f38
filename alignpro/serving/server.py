"""The process of `alignpro serve`: its parts are opened, HTTP is served, signals reload and drain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import importlib
import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from alignpro.config import ModelConfig, ServeConfig
from alignpro.environments.finished_run import require_finished_run
from alignpro.errors import AlignProError, ConfigError
from alignpro.serving.app import build_app
from alignpro.serving.connections import limited_protocol
from alignpro.serving.contract import ServedTarget
from alignpro.serving.http_target import HttpTarget
from alignpro.serving.service import ServedRuns, Service

_LOGGER = logging.getLogger(__name__)
_BACKLOG = 2048
_LAST_WORDS_SECONDS = 1.0
"""For answers that are cut off at the end of the drain to say so."""


def serve(config: ServeConfig, reread: Callable[[], ServeConfig] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then let requests in flight end.

    Args:
        config: What is served.
        reread: Reads the configuration anew at a reload.

    Raises:
        AlignProError: Something of the configuration is not there, or the port is taken.
    """
    allow_files(2 * config.limits.connections + 256)
    asyncio.run(_serve(config, reread))


async def _serve(config: ServeConfig, reread: Callable[[], ServeConfig] | None) -> None:
    listener = bind(config)
    with contextlib.closing(listener):
        service = await open_service(config, reread)
        gc.collect()
        gc.freeze()  # what is loaded stays: to search it again and again for garbage would hold up requests
        try:
            await ProxyServer(service).serve(sockets=[listener])
        finally:
            gc.unfreeze()  # libraries that check at the end that they were freed would complain
            await service.close()


async def open_service(config: ServeConfig, reread: Callable[[], ServeConfig] | None = None) -> Service:
    """Open target and runs.

    Raises:
        AlignProError: One of them is not there.
    """
    for run in config.runs:
        require_finished_run(run)  # before anything large is loaded
    target: ServedTarget | None = HttpTarget(config) if config.url is not None else None
    if target is not None and not config.runs:
        return Service(config, target, None, reread)
    runs, local = await _open_runs(config, target)
    served = target or local
    assert served is not None  # because one of the two is configured
    return Service(config, served, runs, reread)


async def _open_runs(config: ServeConfig, target: ServedTarget | None) -> tuple[ServedRuns, ServedTarget | None]:
    """The prompters, and the target if it is a model: both run in one engine. Loads torch."""
    models = [str(run) for run in config.runs] + ([config.target] if target is None else [])
    _LOGGER.info("loading %s; requests that come meanwhile wait", " and ".join(models))
    module = await asyncio.to_thread(importlib.import_module, "alignpro.serving.rewriting")
    model = ModelConfig(path=config.target) if target is None else None
    opened: Any = await module.Rewriting.open(config.rewriting, config.runs, model, answers=target)
    return opened, opened.target


def bind(config: ServeConfig) -> socket.socket:
    """The socket that listens.

    Raises:
        ConfigError: The address is not this machine's, or the port is taken.
    """
    host, port = config.listen.host, config.listen.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        reason = "it is in use: choose another one (--port), or 0 for a free one" if is_taken else str(error)
        raise ConfigError(f"listen: {host} port {port} cannot be served: {reason}") from None


def allow_files(count: int) -> None:
    """Raise the limit of open files as far as it goes: each request has a connection to either side."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if soft != resource.RLIM_INFINITY and max(soft, wanted) < count:
        _LOGGER.warning("at most %d open files are allowed, fewer than limits.connections needs (%d)", wanted, count)


class ProxyServer(uvicorn.Server):
    """uvicorn with the proxy's limits, signals and drain.

    Args:
        service: The proxy's parts.
    """

    def __init__(self, service: Service) -> None:
        config, limits = service.config, service.config.limits
        super().__init__(
            uvicorn.Config(
                build_app(service),
                http=limited_protocol(limits, service.metrics.count_refused),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=limits.keep_alive_seconds,
                timeout_graceful_shutdown=limits.drain_seconds,
            )
        )
        logging.getLogger("uvicorn.error").setLevel(
            logging.CRITICAL
        )  # what it tells of requests, the log and metrics tell
        self._service = service
        self._reloads: set[asyncio.Task[None]] = set()
        self._target = config.url or config.target

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            named = f"[{host}]" if ":" in host else host
            runs = ", ".join(self._service.rewriter.runs) or "none: requests pass as they are"
            _LOGGER.info("serving http://%s:%d/v1 in front of %s; runs: %s", named, port, self._target, runs)
            if self._service.config.page.enabled:
                _LOGGER.info("a page to try prompts: http://%s:%d/", named, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no further connections, and let requests in flight end."""
        self._service.is_stopping = True
        await super().shutdown(sockets)
        if self.server_state.tasks:  # they were cancelled at the end of the drain
            await asyncio.wait(list(self.server_state.tasks), timeout=_LAST_WORDS_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """SIGTERM and SIGINT drain, a second SIGINT ends at once, SIGHUP reloads."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for stop in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(stop, self.handle_exit, stop, None)
        loop.add_signal_handler(signal.SIGHUP, self._reload_later)
        try:
            yield
        finally:
            for handled in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(handled)

    def _reload_later(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            runs = await self._service.reload()
        except AlignProError as error:
            _LOGGER.error("reload: nothing has changed: %s", error)
        else:
            _LOGGER.info("reloaded; runs: %s", ", ".join(runs) or "none")
