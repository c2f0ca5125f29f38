"""A target in this process, behind the same API as a server: chat and plain completions of a model on the engine.

With ``n``, draw k of a request takes (seed, k), as in `Engine.generate`; without it, the only draw takes the seed itself. So a
client that forwards the seeds of an evaluation gets its responses.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from alignpro.config.serving_rewriting import LocalTargetConfig
from alignpro.data import replace_lone_surrogates
from alignpro.engine import Completion
from alignpro.errors import AlignProError
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.serving.chat_request import ModelRequest, RefusedRequestError, read_request
from alignpro.serving.contract import Api, TargetFailure, TargetRequest
from alignpro.serving.engine_thread import EngineFailedError, EngineThread, Generation
from alignpro.serving.text_stream import TextStream
from alignpro.serving.token_logprobs import AnswerLogprobs, TokenTexts

APIS: dict[str, Api] = {"/chat/completions": "chat", "/completions": "completions"}
Headers = tuple[tuple[bytes, bytes], ...]
_JSON = (b"content-type", b"application/json")
_EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")


class LocalResponse:
    """A response of a model in this process; see `TargetResponse`."""

    def __init__(
        self, status: int, headers: Headers, content: AsyncIterator[bytes], close: Callable[[], None] = lambda: None
    ) -> None:
        self.status, self.headers = status, headers
        self._content, self._close = content, close

    def chunks(self) -> AsyncIterator[bytes]:
        """The body."""
        return self._content

    async def close(self) -> None:
        """End what is still generated."""
        self._close()


class LocalServedTarget:
    """Answers requests with a model on the engine; see `ServedTarget`.

    Args:
        model: The model.
        engine: Has it as ``target``.
        template: Its chat template.
        name: Its name for clients.
        config: Limits.
    """

    def __init__(
        self, model: LanguageModel, engine: EngineThread, template: ChatTemplate, name: str, config: LocalTargetConfig
    ) -> None:
        self.model = name
        self._model, self._engine, self._template, self._config = model, engine, template, config
        self._created = int(time.time())
        self._texts = TokenTexts(model.tokenizer)

    def refuses(self, api: Api, body: bytes) -> bool:
        """Whether a field of the request cannot be honoured."""
        try:
            self._read(api, body)
        except RefusedRequestError:
            return True
        return False

    async def send(self, request: TargetRequest) -> LocalResponse:
        """Answer a request; what cannot be honoured gets an error in OpenAI's form."""
        if self._engine.failure is not None:
            raise TargetFailure(f"the model {self.model} cannot answer: {self._engine.failure}")
        path = unquote(request.path.partition("?")[0]).rstrip("/")
        try:
            if (api := APIS.get(path)) is not None:
                _require(request.method, "POST")
                return await self._answer(api, request.body)
            if path in ("/models", f"/models/{self.model}"):
                _require(request.method, "GET")
                return _whole(200, self._listed(whole=path == "/models"))
            if path.startswith("/models/"):
                raise RefusedRequestError(f"there is no other model than {self.model}", None, "model_not_found", 404)
            served = "/v1/chat/completions, /v1/completions and /v1/models"
            raise RefusedRequestError(f"/v1{path} is not served: {served} are", None, "not_found", 404)
        except RefusedRequestError as error:
            more = ((b"retry-after", b"1"),) if error.status == 429 else ()
            return _whole(error.status, _error(str(error), error.param, error.code, error.status), more)

    async def reachable(self) -> str | None:
        """Why the engine cannot generate, if it cannot."""
        return self._engine.failure

    async def close(self) -> None:
        """Nothing: the engine is closed by its owner."""

    def _listed(self, *, whole: bool) -> dict[str, Any]:
        own = {"id": self.model, "object": "model", "created": self._created, "owned_by": "alignpro"}
        return {"object": "list", "data": [own]} if whole else own

    async def _answer(self, api: Api, content: bytes) -> LocalResponse:
        request = self._read(api, content)
        if self._engine.waiting("target") >= self._config.max_waiting:
            raise RefusedRequestError(
                f"the model {self.model} has {self._config.max_waiting} requests to answer: try again later",
                code="overloaded",
                status=429,
            )
        tokens = self._encode(request)
        generation = self._start(request, tokens)
        answer = _Answer(self.model, request, len(tokens), lambda each: self._decode(api, each), self._texts)
        if request.stream:
            return LocalResponse(
                200, (_EVENTS,), answer.events(generation), close=lambda: self._engine.cancel(generation)
            )
        try:
            completions = await generation.done
        except asyncio.CancelledError:
            self._engine.cancel(generation)
            raise
        except EngineFailedError as error:
            raise TargetFailure(f"the model {self.model} cannot answer: {error}") from None
        if failed := next((each.error for each in completions if each.error is not None), None):
            return _whole(500, _error(failed, status=500))
        return _whole(200, answer.whole(completions))

    def _read(self, api: Api, content: bytes) -> ModelRequest:
        limits = {"max_tokens": self._config.max_tokens, "max_draws": self._config.max_draws}
        return read_request(api, content, self.model, **limits)

    def _start(self, request: ModelRequest, tokens: Sequence[int]) -> Generation:
        room = self._model.context_length - len(tokens)
        params = request.params
        if room < (params.max_tokens if request.max_tokens_asked else 1):
            raise RefusedRequestError(
                f"{len(tokens)} tokens of the prompt and {params.max_tokens} of the response are more than the maximum context "
                f"length of {self._model.context_length} tokens",
                "messages" if request.api == "chat" else "prompt",
                "context_length_exceeded",
            )
        params = replace(params, max_tokens=min(params.max_tokens, room), stop_token_ids=self._template.stop_token_ids)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        draws = [seed] if request.draws_itself else None
        try:
            return self._engine.start("target", tokens, params, seed, draws=draws, streamed=request.stream)
        except EngineFailedError as error:
            raise TargetFailure(f"the model {self.model} cannot answer: {error}") from None

    def _encode(self, request: ModelRequest) -> list[int]:
        if request.api == "completions":
            return list(self._model.tokenizer(replace_lone_surrogates(request.messages[0].content))["input_ids"])
        try:
            return self._template.encode(request.messages)
        except AlignProError as error:
            raise RefusedRequestError(str(error), "messages") from None

    def _decode(self, api: Api, tokens: Sequence[int]) -> str:
        if api == "chat":
            return self._template.decode(tokens)
        ends = self._template.stop_token_ids
        kept = [token for token in tokens if token not in ends]
        return str(self._model.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Answer:
    """The JSON of an answer, in one piece or as a stream of events."""

    def __init__(
        self,
        name: str,
        request: ModelRequest,
        num_prompt_tokens: int,
        decode: Callable[[Sequence[int]], str],
        texts: TokenTexts,
    ) -> None:
        self._request, self._num_prompt_tokens, self._decode = request, num_prompt_tokens, decode
        self._logprobs = [AnswerLogprobs(request.api, texts, decode) for _ in range(request.params.n)]
        self._chat = request.api == "chat"
        self._common = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self._choice(k, self._decode(each.text_tokens), each.finish_reason, self._whole(k, each))
            for k, each in enumerate(completions)
        ]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": self._usage(completions)}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        streams = [TextStream(self._decode, self._request.params.stop) for _ in range(self._request.params.n)]
        if self._chat:
            for k in range(len(streams)):
                yield self._event([self._delta(k, {"role": "assistant", "content": ""})])
        async for tokens in generation.updates():
            for k, (stream, own) in enumerate(zip(streams, tokens, strict=True)):
                if piece := stream.push(own):
                    logprobs = self._logprobs[k].within(stream.sent, own, generation.model_logprobs(k))
                    yield self._event([self._piece(k, piece, logprobs)])
        try:
            completions = await generation.done
        except EngineFailedError as error:
            yield _event(_error(str(error), status=500))
            return
        for k, (stream, completion) in enumerate(zip(streams, completions, strict=True)):
            if completion.error is not None:
                yield _event(_error(completion.error, status=500))
                return
            piece, logprobs = stream.finish(self._decode(completion.text_tokens)), self._rest(k, completion)
            if piece or logprobs:
                yield self._event([self._piece(k, piece, logprobs)])
            end = self._delta(k, {}) if self._chat else self._choice(k, "", None)
            yield self._event([{**end, "finish_reason": completion.finish_reason}])
        if self._request.usage_in_stream:
            yield self._event([], usage=self._usage(completions))
        yield b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return _event({**self._common, "object": kind, "choices": choices, **more})

    def _whole(self, k: int, completion: Completion) -> dict[str, Any] | None:
        """The log-probabilities of draw k, if they were asked for."""
        if self._request.params.top_logprobs is None:
            return None
        return self._logprobs[k].whole(completion.text_tokens, completion.model_logprobs)

    def _rest(self, k: int, completion: Completion) -> dict[str, Any] | None:
        """The log-probabilities of draw k that have not been given."""
        return self._logprobs[k].rest(completion.text_tokens, completion.model_logprobs)

    def _piece(self, k: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        if self._chat:
            return self._delta(k, {"content": text}, logprobs)
        return self._choice(k, text, None, logprobs)

    def _delta(self, k: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": k, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _choice(self, k: int, text: str, reason: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        own = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return {"index": k, **own, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self, completions: Sequence[Completion]) -> dict[str, int]:
        drawn = sum(len(each.tokens) for each in completions)
        own = self._num_prompt_tokens
        return {"prompt_tokens": own, "completion_tokens": drawn, "total_tokens": own + drawn}


def _require(method: str, expected: str) -> None:
    if method != expected:
        raise RefusedRequestError(f"{method} is not allowed here: use {expected}", None, "method_not_allowed", 405)


def _error(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


def _whole(status: int, content: dict[str, Any], more: Headers = ()) -> LocalResponse:
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")

    async def pieces() -> AsyncIterator[bytes]:
        yield body

    return LocalResponse(status, (_JSON, (b"content-length", str(len(body)).encode()), *more), pieces())
