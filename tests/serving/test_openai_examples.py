"""Example programs of the official client run unchanged: with the proxy's base URL in their environment they get answers.

OPENAI_EXAMPLES names the folder ``examples`` of the client's source distribution
(``pip download --no-deps --no-binary openai openai``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxies import Proxy, running
from rewriting_runs import save_run
from tiny_models import save_tiny

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


@pytest.mark.parametrize(("program", "chats"), [("demo.py", 3), ("async_demo.py", 1), ("streaming.py", 2)])
def test_a_program_gets_its_answers(proxy: Proxy, program: str, chats: int) -> None:
    examples = os.environ.get("OPENAI_EXAMPLES")
    if not examples:
        pytest.skip("OPENAI_EXAMPLES does not say where the client's example programs are")
    source = (Path(examples) / program).read_text()
    assert f'model="{MODEL}"' in source, "the programs ask for another model now"
    applied = 'alignpro_rewrites_total{run="run"}'
    before = proxy.metric(applied)
    named = {"OPENAI_BASE_URL": proxy.url, "OPENAI_API_KEY": "unused", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(Path(examples) / program)]
    done = subprocess.run(command, env=os.environ | named, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert proxy.metric(applied) - before == chats
