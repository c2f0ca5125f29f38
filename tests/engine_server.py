"""What a server of the tests answers with: a model of this project on its own engine, which takes ``n`` and ``seed``.

A request for n draws is a request of the engine, with its seed; a request without ``n`` is one sequence, with that seed. So the
answers are those of the same target in the process of a run.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tiny_server import Choice, TinyServer, _Connection

from alignpro.config import ModelConfig
from alignpro.data import Message
from alignpro.engine import Completion, Engine, Request, SamplingParams
from alignpro.models.loading import load_language_model
from alignpro.prompting.chat_template import ChatTemplate


class EngineModel:
    """Completes the requests of a `TinyServer`; those of several threads in common batches.

    Args:
        path: The model's directory.
    """

    def __init__(self, path: Path) -> None:
        model = load_language_model(ModelConfig(path=str(path), device="cpu"))
        self._template = ChatTemplate(model.tokenizer, stop_token_ids=model.end_token_ids)
        self._engine = Engine({"target": model})
        self._last = threading.local()
        self._inbox: SimpleQueue[tuple[list[int], SamplingParams, int | None, bool, Future[list[Completion]]]]
        self._inbox = SimpleQueue()
        threading.Thread(target=self._run, name="engine of the server", daemon=True).start()

    def __call__(self, request: Mapping[str, Any], seed: int | None, index: int) -> Choice:
        if getattr(self._last, "request", None) is not request:
            self._last.request, self._last.completions = request, self._complete(request, seed)
        completion: Completion = self._last.completions[index]
        text = self._template.decode(completion.text_tokens)
        return Choice(text, completion.finish_reason, len(completion.tokens))

    def _complete(self, request: Mapping[str, Any], seed: int | None) -> list[Completion]:
        prompt = self._template.encode([Message(turn["role"], turn["content"]) for turn in request["messages"]])
        params = SamplingParams(
            max_tokens=request["max_tokens"],
            temperature=request["temperature"],
            top_p=request.get("top_p", 1.0),
            top_k=request.get("top_k", 0),
            min_p=request.get("min_p", 0.0),
            stop=tuple(request.get("stop", ())),
            n=request.get("n", 1),
            stop_token_ids=self._template.stop_token_ids,
        )
        done: Future[list[Completion]] = Future()
        self._inbox.put((prompt, params, seed, "n" in request, done))
        return done.result()

    def _run(self) -> None:
        torch.set_num_threads(1)
        waiting: dict[Request, Future[list[Completion]]] = {}
        while True:
            while not waiting or not self._inbox.empty():
                prompt, params, seed, several, done = self._inbox.get()
                submitted = self._engine.submit("target", prompt, params, seed or 0)
                if not several and seed is not None:
                    submitted.sequences[0].seed = seed
                waiting[submitted] = done
            for finished in self._engine.step():
                waiting.pop(finished).set_result(finished.completions)


class BatchingServer(TinyServer):
    """A `TinyServer` that computes the answers to many requests at the same time."""

    def _listen(self) -> None:
        self._pool = ThreadPoolExecutor(64)
        create = self._loop.create_server(lambda: _Batched(self, self._loop), "127.0.0.1", self.port, backlog=1024)
        self._server = self._loop.run_until_complete(create)
        self.port = self._server.sockets[0].getsockname()[1]


class _Batched(_Connection):
    async def serve(self, path: str, headers: Mapping[str, str], request: Mapping[str, Any]) -> None:
        assert isinstance(self.server, BatchingServer)
        loop = asyncio.get_running_loop()
        self.server.count += 1
        self.send(*await loop.run_in_executor(self.server._pool, self.server.answer, path, headers, request))
