"""docs/serving.md is correct: its commands and requests are valid, its tables are the code's, its figures the recorded ones."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from document import ROOT, Document, recorded
from settings_table import settings
from typer.main import get_command

from alignpro.cli import app
from alignpro.config import ServeConfig, ServeLimitsConfig, load_config, validate_config
from alignpro.config.serving_rewriting import RewritingConfig
from alignpro.serving import headers
from alignpro.serving.contract import Outcome
from alignpro.serving.openapi import openapi_document
from alignpro.serving.prompt_writer import UNUSABLE
from alignpro.serving.refusals import refusal_of_status
from alignpro.serving.request_body import parse

DOCUMENT = Document("serving.md")
TEXT = " ".join(DOCUMENT.text.split())
LINES = [line for _, block in DOCUMENT.blocks("sh") for line in block.replace("\\\n", " ").splitlines()]


def test_its_links_resolve() -> None:
    DOCUMENT.check_links()


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("alignpro serve")])
def test_its_commands_are_valid(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    command.make_context("serve", shlex.split(line)[2:])


def test_its_requests_are_understood() -> None:
    bodies = [shlex.split(line)[-1] for line in LINES if "/chat/completions" in line]
    assert len(bodies) == 1
    document = parse(bodies[0].encode(), "chat")
    assert document.wishes.give == "body"
    assert json.loads(document.raw)["model"] == "target"


def test_its_program_is_one_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, code),) = DOCUMENT.blocks("python")
    compile(code, "serving.md", "exec")
    assert ServeConfig.model_fields["listen"].default.port == 8000
    assert f"127.0.0.1:{ServeConfig.model_fields['listen'].default.port}/v1" in code


def test_its_configuration_is_valid() -> None:
    ((_, block),) = DOCUMENT.blocks("yaml")
    config = validate_config(ServeConfig, yaml.safe_load(block))
    assert (config.rewriting.percent, config.page.recent_requests) == (10, 50)


def test_every_setting_is_in_the_table_with_its_default() -> None:
    told = {cells[0]: cells[1] for cells in DOCUMENT.rows("Settings")}
    expected = dict(settings(ServeConfig, ("rewriting.engine.", "rewriting.guards")))
    assert told == expected | {"rewriting.engine": "", "rewriting.guards": ""}


def _tables(heading: str) -> list[list[list[str]]]:
    """The tables under a heading, each as rows of cells."""
    section = DOCUMENT.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    rows = [[line.strip("|").split("|") for line in table.splitlines()[2:]] for table in tables]
    return [[[cell.strip().replace("`", "") for cell in row] for row in table] for table in rows]


def test_every_reason_is_in_the_table() -> None:
    told = {
        word
        for row in _tables("Never worse than without")[0]
        for word in re.findall(r"^[\w:, ]+", row[0])[0].split(", ")
    }
    words = (ROOT / "alignpro/serving/page/rewrite.js").read_text().split("const REASONS = {")[1].split("};")[0]
    known = set(re.findall(r"^  (\w+):", words, flags=re.MULTILINE))
    assert told - {"guard:KIND", "refused in an answer with an error"} == known
    assert known >= UNUSABLE


def test_the_guards_are_the_default_ones() -> None:
    told = [
        (kind, low and float(low), high and float(high))
        for kind, low, high, _ in _tables("Never worse than without")[1]
    ]
    shown = [(guard.kind, guard.low, guard.high) for guard in RewritingConfig().guards]
    assert told == [(kind, "" if low is None else low, "" if high is None else high) for kind, low, high in shown]


def test_every_header_is_in_the_table() -> None:
    answers, requests = _tables("Headers and fields")
    told = {row[0] for row in answers}
    outcome = Outcome(b"", None, "a", "b", "run", 0.1)
    made = {name.decode() for name, _ in [*headers.of_outcome(outcome), *headers.rewritten("b")]}
    assert told == made | {headers.REQUEST_ID.decode(), headers.UPSTREAM_REQUEST_ID.decode()}
    named = " ".join(row[0] for row in requests)
    assert all(name.decode() in named for name in (headers.OPT_OUT, headers.RUN))
    assert f"up to {headers.LONGEST_REWRITTEN:,} bytes" in TEXT


def test_every_route_is_in_the_table() -> None:
    told = {row[0] for row in _tables("Operations")[0]}
    paths: dict[str, Any] = openapi_document()["paths"]
    assert told - {"/openapi.json"} == {path for path in paths if not path.startswith("/v1/")}
    assert (ROOT / "launch" / "serving").is_dir()


def _own_errors() -> set[tuple[str, str]]:
    """Status and code of each error that the proxy makes, but those of the page's own routes."""
    found = {(str(status), refusal_of_status(status).body()) for status in (404, 405)}
    pairs = {(status, json.loads(body)["error"]["code"]) for status, body in found}
    for file in (ROOT / "alignpro" / "serving").glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id == "Refusal" and file.name != "page_routes.py":
                status, _, code = call.args[:3]
                if isinstance(status, ast.Constant) and isinstance(code, ast.Constant):
                    pairs.add((str(status.value), str(code.value)))
    return pairs | {("401", "missing_token"), ("401", "invalid_token"), ("502", "target_failed")}


def test_every_error_is_in_the_table() -> None:
    (rows,) = _tables("Bad input")
    told = [(status, code) for _, status, code in rows]
    assert told == sorted(told, key=lambda row: row[0])
    assert set(told) == _own_errors()
    assert len(set(told)) == len(told)
    replies = openapi_document()["paths"]["/v1/chat/completions"]["post"]["responses"]
    of_all_routes = {status for status, _ in told} - {"405", "409", "500"}
    assert of_all_routes == replies.keys() - {"200", "default"}


def test_its_figures_are_the_recorded_ones() -> None:
    document = recorded("serving")
    overhead, streams, gone = document["overhead"], document["streams"], document["disconnects"]
    rows = _tables("Figures")[0]
    for row, name in zip(rows, ("p50_ms", "p99_ms"), strict=False):
        values = [overhead[way][name] for way in ("direct", "proxy", "overhead")]
        assert row[1:] == [f"{value:.1f} ms" for value in values]
    assert f"{overhead['proxy']['cpu_ms_per_chat']['proxy']:.1f} ms of CPU time a chat" in TEXT
    assert f"load average before it was {document['run']['load_average']:.1f}" in TEXT
    assert f"{streams['streams']:,} slow streams" in TEXT
    assert streams["equal"] == streams["streams"]
    assert f"{streams['mib_before']:.0f} to {streams['mib_most']:.0f} MiB" in TEXT
    assert f"{streams['mib_growth_in_second_half']:.1f} MiB of them in the second half" in TEXT
    assert f"{gone['disconnects']:,} requests whose clients left" in TEXT
    assert f"from {gone['before']['files']} open files to {gone['after']['files']}" in TEXT
    assert f"{gone['before']['mib']:.0f} to {gone['after']['mib']:.0f} MiB" in TEXT
    crowd = document["overload"]
    assert (
        f"Of {crowd['chats']:,} chats at once where {crowd['places']} have a place and {crowd['queued']} may wait"
        in TEXT
    )
    assert (
        f"{crowd['answered']} are answered and {crowd['refused_with_retry_after']} get 429 with `retry-after`" in TEXT
    )
    assert (
        crowd["refused"] == crowd["refused_with_retry_after"] and crowd["other"] == 0 and crowd["answered_after"] == 10
    )


def test_its_figures_of_rewriting_are_the_recorded_ones() -> None:
    rewriting = recorded("serving_rewriting")
    assert f"had a load average of {rewriting['run']['load_average']:.1f}" in TEXT
    assert rewriting["run"]["command"].startswith("chrt -f 10 ")
    shown = {row[0]: row[1:] for row in _tables("Figures")[1]}
    for arm in rewriting["arms"]:
        if arm["arm"] != "direct":
            spent = arm["cpu_ms_per_chat"]
            values = [arm["added"]["median_ms"], arm["added"]["p99_ms"], spent["http"], spent["engine"]]
            assert shown.pop(arm["arm"]) == [f"{value:.1f} ms" for value in values]
    assert not shown
    late = next(arm for arm in rewriting["arms"] if arm["arm"] == "deadline of 20 ms")
    assert f"{late['skipped']['deadline']} of its {late['chats']} prompts went as they were" in TEXT


def test_its_limits_are_those_of_the_examples(tmp_path: Path) -> None:
    config = load_config(ServeConfig, [str(ROOT / "launch/serving/serve.yaml")])
    assert config.limits == ServeLimitsConfig()
