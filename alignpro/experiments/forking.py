"""Commands of `alignpro` in processes that are forked from one in which the libraries are loaded already."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from alignpro.errors import TrainingError
from alignpro.experiments.process import (
    SECONDS_BETWEEN_LOOKS,
    THIS_PYTHON,
    end_with_parent,
    run_command,
    signal_session,
)

logger = logging.getLogger(__name__)

Runner = Callable[[Sequence[str], Sequence[str], Path, Callable[[], int | None]], int]
"""What runs a command; see `run_command`."""


LOADED = ("alignpro.cli", "alignpro.training.jobs", "alignpro.evaluation.several_targets")
"""What is loaded before the commands: by name, as it is the command line's, which this package must not import."""


class ForkingRunner:
    """A `Runner` whose commands are forked from one process, which is started with the first of them.

    What another starter than `THIS_PYTHON` starts, such as a launcher of several processes, is a new process.

    Args:
        program: The module that is run with the arguments of a command, as by ``python -m``.
        loaded: The modules that are loaded once.
    """

    def __init__(self, program: str = "alignpro", loaded: Sequence[str] = LOADED) -> None:
        self._program, self._loaded = program, loaded
        self._server: _Server | None = None

    def __call__(
        self, starter: Sequence[str], arguments: Sequence[str], log: Path, stopped: Callable[[], int | None]
    ) -> int:
        """Run a command to its end; see `run_command`.

        Raises:
            TrainingError: The libraries cannot be loaded; the message has the reason.
        """
        if tuple(starter) != THIS_PYTHON:
            return run_command(starter, arguments, log, stopped)
        if self._server is None:
            logger.info("Cells run in processes forked from one that has loaded the libraries.")
            self._server = _Server([self._program, *self._loaded])
        status = self._server.run(arguments, log, stopped)
        if status is None:
            why = self._server.close()
            self._server = None
            raise TrainingError(f"the process that runs the cells ended: {why}; the same command goes on")
        return status

    def close(self) -> None:
        """End the process that was forked."""
        if self._server is not None:
            self._server.close()
            self._server = None


class _Server:
    """`alignpro.experiments.fork_server` in a process of its own."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._process = subprocess.Popen(
            [*THIS_PYTHON, "alignpro.experiments.fork_server", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        self._unread = b""

    def run(self, arguments: Sequence[str], log: Path, stopped: Callable[[], int | None]) -> int | None:
        """Run a command, and return its exit status; None if the server has ended."""
        request = json.dumps({"arguments": list(arguments), "log": os.fspath(log)}) + "\n"
        assert self._process.stdin is not None  # a pipe
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        child, status, passed_on = None, None, False
        try:
            while status is None:
                line = self._reply()
                if line == "":
                    return None
                if line is not None and child is None:
                    child = int(line)
                elif line is not None:
                    status = int(line)
                if child is not None and stopped() is not None and not passed_on:
                    passed_on = True
                    signal_session(child, signal.SIGTERM)
        finally:
            if child is not None and status is None:  # a second signal: nothing is waited for
                signal_session(child, signal.SIGKILL)
        return status

    def _reply(self) -> str | None:
        """The next line; empty if there will be none, None if there is none yet."""
        assert self._process.stdout is not None  # a pipe
        line, found, rest = self._unread.partition(b"\n")
        if not found:
            ready, _, _ = select.select([self._process.stdout], [], [], SECONDS_BETWEEN_LOOKS)
            if not ready:
                return None
            more = os.read(self._process.stdout.fileno(), 1024)
            self._unread += more
            return self._reply() if more else ""
        self._unread = rest
        return line.decode()

    def close(self) -> str:
        """End the process, and return why it had ended before, if it had."""
        with suppress(BrokenPipeError):
            assert self._process.stdin is not None  # a pipe
            self._process.stdin.close()
        with suppress(ProcessLookupError):
            self._process.terminate()
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        assert self._process.stdout is not None  # a pipe
        self._process.stdout.close()
        return lines[-1] if lines else f"exit status {status}"
