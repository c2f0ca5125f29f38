"""python -m benchmarks.serving.upstream LATENCY: a target that gives every chat the same answer after a fixed time.

A chat that asks for a stream gets EVENTS events, one every LATENCY. Prints its base URL.
"""

from __future__ import annotations

import asyncio
import json
import sys

EVENTS = 40
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"word "}}]}\n\n'
STREAM = EVENT * EVENTS + b"data: [DONE]\n\n"
WORDS = 64
"""Of an answer."""


def _answer() -> bytes:
    message = {"role": "assistant", "content": " ".join(["word"] * WORDS)}
    document = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "bench",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 32, "completion_tokens": WORDS, "total_tokens": 32 + WORDS},
    }
    body = json.dumps(document).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class _Connection(asyncio.Protocol):
    def __init__(self, answer: bytes, latency: float) -> None:
        self.answer, self.latency, self.buffer = answer, latency, b""
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = int(self.buffer[:end].lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(self.buffer) < end + 4 + length:
            return
        is_stream = b'"stream": true' in self.buffer
        self.buffer = self.buffer[end + 4 + length :]
        self.loop.call_later(self.latency, self._stream if is_stream else self._whole)

    def _whole(self) -> None:
        self.transport.write(self.answer)

    def _stream(self) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self._event(EVENTS)

    def _event(self, left: int) -> None:
        data = EVENT if left else b"data: [DONE]\n\n"
        if self.transport.is_closing():
            return
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        if left:
            self.loop.call_later(self.latency, self._event, left - 1)
        else:
            self.transport.write(b"0\r\n\r\n")


async def _serve(latency: float) -> None:
    loop, answer = asyncio.get_running_loop(), _answer()
    server = await loop.create_server(lambda: _Connection(answer, latency), "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
