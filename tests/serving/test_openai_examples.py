"""Example programs of the official client run unchanged: with the proxy's base URL in their environment they get answers.

OPENAI_EXAMPLES names the folder ``examples`` of the client's source distribution
(``pip download --no-deps --no-binary openai openai``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxies import Proxy, Shouting, proxied, running
from rewriting_runs import save_run
from tiny_models import save_tiny
from upstream import DONE, Upstream, chat_answer

from alignpro.config import ServeConfig, validate_config
from alignpro.serving.server import open_service

pytestmark = [pytest.mark.slow, pytest.mark.server]

MODEL = "gpt-5.5"
"""The one that the programs ask for."""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Return a proxy of a random prompter before a random target, which has the name of the programs' model."""
    folder = tmp_path_factory.mktemp("serving")
    run, target = save_run(folder / "run"), save_tiny("llama", folder / "target")
    rewriting: dict[str, Any] = {"guards": [], "skip_truncated": False, "deadline_ms": 60_000}
    rewriting |= {"engine": {"pool_bytes": 1 << 22}, "target": {"name": MODEL, "max_tokens": 20}}
    common = {"listen": {"port": 0}, "log": {"requests": False}, "rewriting": rewriting}
    config = validate_config(ServeConfig, {"target": str(target), "runs": [str(run)], **common})
    with running(config, lambda: open_service(config), 120) as served:
        yield served


def run_program(name: str, proxy: Proxy, model: str) -> str:
    """Run an example program; returns what it printed."""
    examples = os.environ.get("OPENAI_EXAMPLES")
    if not examples:
        pytest.skip("OPENAI_EXAMPLES does not say where the client's example programs are")
    program = Path(examples) / name
    assert f'model="{model}"' in program.read_text(), "the programs ask for another model now"
    named = {"OPENAI_BASE_URL": proxy.url, "OPENAI_API_KEY": "unused", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, env=os.environ | named, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("program", "chats"), [("demo.py", 3), ("async_demo.py", 1), ("streaming.py", 2)])
def test_a_program_gets_its_answers(proxy: Proxy, program: str, chats: int) -> None:
    applied = 'alignpro_rewrites_total{run="run"}'
    before = proxy.metric(applied)
    assert run_program(program, proxy, MODEL)
    assert proxy.metric(applied) - before == chats


SOLVED = '{"steps": [{"explanation": "Subtract 31.", "output": "8x = -29"}], "final_answer": "x = -29/8"}'
QUERY = (
    '{"table_name": "orders", "columns": ["id"], "conditions": [{"column": "status", "operator": "=", "value": "late"}],'
    ' "order_by": "asc"}'
)


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments}}


def events(*deltas: dict[str, Any], finish_reason: str = "stop") -> list[bytes]:
    """The events of a stream that has these deltas."""
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish_reason})
    return [b"data: %b\n\n" % json.dumps(common | {"choices": [choice]}).encode() for choice in choices] + [DONE]


WEATHER = [{"index": 0, **call("get_weather", '{"city": "SF", ')}]
REST = [{"index": 0, "function": {"arguments": '"country": "US"}'}}]


@pytest.mark.parametrize(
    ("program", "answer", "passed", "printed"),
    [
        ("parsing.py", chat_answer(SOLVED), "response_format", "answer:  x = -29/8"),
        (
            "parsing_stream.py",
            events({"role": "assistant", "content": SOLVED[:50]}, {"content": SOLVED[50:]}),
            "response_format",
            "answer: x = -29/8",
        ),
        ("parsing_tools.py", chat_answer("", tool_calls=[call("Query", QUERY)]), "tools", "Table.orders"),
        (
            "parsing_tools_stream.py",
            events({"role": "assistant", "tool_calls": WEATHER}, {"tool_calls": REST}, finish_reason="tool_calls"),
            "tools",
            "GetWeather(city='SF', country='US')",
        ),
    ],
)
def test_a_program_parses_what_the_target_answers(
    upstream: Upstream, program: str, answer: bytes | list[bytes], passed: str, printed: str
) -> None:
    """Its tools and formats reach the target beside the rewrite, and the answer is what the client takes."""
    model = "gpt-4o-2024-08-06"
    upstream.answers[model] = answer
    with proxied(upstream.url, Shouting()) as proxy:
        assert printed in run_program(program, proxy, model)
    (received,) = upstream.received
    asked = json.loads(received.body)
    assert asked[passed]
    assert asked["messages"][-1]["content"].isupper()
