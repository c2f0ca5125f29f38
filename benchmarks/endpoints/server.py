"""python -m benchmarks.endpoints.server LATENCY: a server that gives chats the same answer, cut to what they ask for, at once.

Prints its base URL.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

WORDS = 64
"""Of an answer, unless fewer tokens are asked for."""
_MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens"\s*:\s*(\d+)')


@lru_cache(maxsize=64)
def _answer(words: int) -> bytes:
    message = {"role": "assistant", "content": " ".join(["word"] * words)}
    document = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "bench",
        "system_fingerprint": "fp",
        "choices": [
            {"index": 0, "message": message, "finish_reason": "stop" if words == WORDS else "length", "logprobs": None}
        ],
        "usage": {"prompt_tokens": 32, "completion_tokens": words, "total_tokens": 32 + words},
    }
    body = json.dumps(document).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class _Connection(asyncio.Protocol):
    def __init__(self, latency: float) -> None:
        self.latency, self.buffer = latency, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end >= 0:
            length = int(self.buffer[:end].lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(self.buffer) >= end + 4 + length:
                asked = _MAX_TOKENS.search(self.buffer, end)
                answer = _answer(min(int(asked[1]), WORDS) if asked else WORDS)
                self.buffer = self.buffer[end + 4 + length :]
                asyncio.get_running_loop().call_later(self.latency, self.transport.write, answer)


async def _serve(latency: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(latency), "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


@contextmanager
def running(latency: float) -> Iterator[str]:
    """Run the server in a process of its own; yields its base URL."""
    arguments = [sys.executable, "-m", "benchmarks.endpoints.server", str(latency)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
