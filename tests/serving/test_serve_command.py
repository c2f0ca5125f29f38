"""`alignpro serve` as a command: its options, what it refuses to begin with, and signals."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from upstream import Upstream

from alignpro.cli import main
from alignpro.config import ServeConfig, load_config

TARGET = "http://127.0.0.1:9/v1"


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *arguments])
    return int(stopped.value.code or 0)


def test_options_and_files_make_one_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "serve.yaml").write_text("target: http://a/v1\nlisten: {port: 1}\nlimits: {concurrent: 7}\n")
    options = ["runs/a b", "runs/c", "--target", TARGET, "--model", "1e3", "--port", "2", "--percent", "5", "--shadow"]
    options += ["--deadline-ms", "250"]
    assert _run(*options, "--config", f"{tmp_path}/serve.yaml", "--config", "log.prompts=true", "--dry-run") == 0
    printed = capsys.readouterr().out
    (tmp_path / "all.yaml").write_text(printed)
    config = load_config(ServeConfig, [f"{tmp_path}/all.yaml"])
    assert [str(run) for run in config.runs] == ["runs/a b", "runs/c"]
    assert (config.target, config.model, config.listen.port) == (TARGET, "1e3", 2)
    assert (config.limits.concurrent, config.log.prompts) == (7, True)
    assert (config.rewriting.percent, config.rewriting.shadow, config.rewriting.deadline_ms) == (5, True, 250)
    assert yaml.safe_load(printed)["limits"]["queued"] == 256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "x=1"], "x: unknown key"),
        (["--port", "1"], "target: missing"),
        (["--target", "ftp://a"], "target: expected http://HOST/"),
        (
            ["--target", "localhost:8001/v1"],
            "neither the URL of a server nor a model: did you mean http://localhost:8001/v1?",
        ),
        (["--target", "https://me:key@a/v1"], "holds a user name or password"),
        (["runs/none", "--target", "models/none"], "run directory runs/none: has no config.yaml and model/"),
        (["--target", TARGET, "--host", "0.0.0.0"], "can be reached from other machines: name tokens"),
        (["--target", "models/a", "--api-key-env", "KEY"], "target models/a is a model"),
        (
            [
                "--target",
                TARGET,
                *(f"--config={key}" for key in ("access.forward_authorization=true", "rewriting.candidates.count=4")),
            ],
            "leaves it no key: name one in api_key_env instead",
        ),
        (["--target", "models/a", "--model", "m"], "its name for clients is rewriting.target.name"),
        (
            ["--target", TARGET, "--api-key-env", "NOT_SET"],
            "environment variable NOT_SET, named by api_key_env, is not set",
        ),
        (["--target", TARGET, "--config", "access.tokens_env=NOT_SET"], "environment variable NOT_SET is not set"),
        (["--target", TARGET, "--config", "log.file=/nowhere/log"], "/nowhere/log cannot be written"),
        (
            ["--target", TARGET, "--host", "192.0.2.1", "--config", "access.anyone=true"],
            "192.0.2.1 port 0 cannot be served",
        ),
        (["--target", TARGET, "--config", "forward_headers=[Cookie]"], "cookie is not passed on"),
        (["--target", TARGET, "--config", "forward_headers=['a b']"], "'a b' is no name of a header"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*arguments, "--config", "listen.port=0") == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("part", ["config.yaml", "model/tokenizer.json", "model"])
def test_a_run_directory_without_its_model_is_named(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a run that has not finished nor a part of one is served."""
    run = tmp_path / "run"
    run.mkdir()
    (run / part).parent.mkdir(exist_ok=True)
    (run / part).write_text("run: {}\n")
    assert _run(str(run), "--target", TARGET, "--port", "0") == 1
    said = capsys.readouterr().err
    assert f"run directory {run}: has no config.yaml and model/: it is not a finished run" in said


def test_a_port_that_is_taken_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert _run("--target", TARGET, "--port", str(taken.getsockname()[1])) == 1
    assert "cannot be served: it is in use: choose another one (--port)" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("alignpro.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert _run("--target", TARGET, "--port", "0") == 1
    assert "`alignpro serve` needs uvicorn: pip install 'alignpro[serve]'" in capsys.readouterr().err


def test_signals_reload_and_drain_and_torch_is_not_loaded(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("first\n")
    command = ["alignpro", "serve", "--target", upstream.url, "--port", "0"]
    keys = [f"access.tokens_file={tmp_path}/tokens", f"log.file={tmp_path}/log.jsonl"]
    script = (
        "import atexit, sys\nfrom alignpro.__main__ import main\nsys.argv = sys.argv[1:]\n"
        "atexit.register(lambda: print('torch' in sys.modules))\nmain()"
    )
    arguments = [sys.executable, "-c", script, *command, *(part for key in keys for part in ("--config", key))]
    upstream.pause = 0.2
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        found = re.search(r"serving http://127\.0\.0\.1:(\d+)/v1 in front of .*; runs: none", process.stderr.readline())
        assert found
        assert process.stderr.readline() == f"a page to try prompts: http://127.0.0.1:{found[1]}/\n"

        def ask(token: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
            body = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]})
            connection.request("POST", "/v1/chat/completions", body, {"authorization": f"Bearer {token}"})
            response = connection.getresponse()
            read = response.status, response.read()
            connection.close()
            return read

        assert [ask(token)[0] for token in ("first", "second")] == [200, 401]
        (tmp_path / "tokens").write_text("second\n")
        (tmp_path / "log.jsonl").rename(tmp_path / "old.jsonl")
        process.send_signal(signal.SIGHUP)
        assert process.stderr.readline() == "reloaded; runs: none\n"
        (tmp_path / "tokens").unlink()
        process.send_signal(signal.SIGHUP)
        assert "nothing has changed" in process.stderr.readline()
        streams: list[tuple[int, bytes]] = []
        asking = threading.Thread(target=lambda: streams.append(ask("second")))
        asking.start()
        upstream.wait_for(lambda: len(upstream.received) == 2)
        process.terminate()
        asking.join(20)
        assert process.wait(20) == 0
        assert process.stdout.read() == "False\n"
        assert streams[0][0] == 200
        assert streams[0][1].endswith(b"data: [DONE]\n\n")
    assert [len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("old", "log")] == [2, 1]
