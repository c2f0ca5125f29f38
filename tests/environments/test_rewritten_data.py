"""`alignpro rewrite --data`: rows that do not fit are skipped, and an interrupted job is continued."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from test_rewriter import Directory, finished_run

from alignpro.cli import main
from alignpro.environments.rewriter import Rewriter
from alignpro.environments.rewritten_data import rewrite_data
from alignpro.errors import DataError

TEXTS = ["explain dns", "word " * 60, "explain tcp", "sort these letters"]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture
def rewriter(model_directory: Directory, tmp_path: Path) -> Rewriter:
    finished_run(tmp_path / "run", model_directory)
    return Rewriter.load(tmp_path / "run")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_that_does_not_fit_is_skipped_and_counted(
    rewriter: Rewriter, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.jsonl"
    with caplog.at_level(logging.WARNING):
        rewrite_data(rewriter, source, out, n=2, temperature=1.0)
    assert [row["prompt"] for row in rows(out)] == [TEXTS[0], TEXTS[2], TEXTS[3]]
    assert "1 of 4 prompts cannot be rewritten (the first: " in caplog.text
    assert "prompts.jsonl:2" in caplog.text
    assert "do not fit in the context of 128 tokens" in caplog.text
    # The others draw as they would without it.
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"prompt": TEXTS[0]}) + "\n")
    rewrite_data(rewriter, str(short), tmp_path / "alone.jsonl", n=2, temperature=1.0)
    assert rows(tmp_path / "alone.jsonl") == rows(out)[:1]


@pytest.mark.parametrize("template", ["prompter", "target"])
def test_a_row_that_a_chat_template_refuses_is_skipped(
    template: str, model_directory: Directory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finished_run(tmp_path / "run", model_directory)
    rewriter = Rewriter.load(tmp_path / "run", with_target=True)
    assert rewriter.environment is not None
    for chat in (
        [rewriter.environment.prompter.chat, rewriter.prompter.chat]
        if template == "prompter"
        else [rewriter.environment.target.template.chat]
    ):
        source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        chat._source = source + chat._source
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a", "system": "be kind"}\n{"prompt": "b"}\n')
    rewrite_data(rewriter, str(data), tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows(tmp_path / "out.jsonl")] == ["b"]
    assert "1 of 2 prompts cannot be rewritten" in caplog.text
    assert "refuses a conversation of system, user: System role not supported" in caplog.text


def test_an_interrupted_job_is_continued(
    rewriter: Rewriter, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignpro.environments.rewritten_data.CHUNK", 2)
    settings = {"n": 2, "temperature": 1.0, "seed": 3}
    rewrite_data(rewriter, source, tmp_path / "whole.jsonl", **settings)
    out, calls = tmp_path / "out.jsonl", []
    sample = rewriter.rewrite_each

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(rewriter, "rewrite_each", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rewrite_data(rewriter, source, out, **settings)
    assert len(rows(out)) == 1
    out.write_text(out.read_text() + '{"id": "half a li')
    with pytest.raises(DataError, match=r"out\.jsonl: was begun with other settings \(n was 2\); repeat those"):
        rewrite_data(rewriter, source, out, **settings | {"n": 1})
    rewrite_data(rewriter, source, out, **settings)
    assert rows(out) == rows(tmp_path / "whole.jsonl")
    with pytest.raises(DataError, match="already exists"):
        rewrite_data(rewriter, source, out, **settings)
    assert sorted(path.name for path in tmp_path.glob("*.job.json")) == []


def test_a_source_without_any_usable_row_is_an_error(rewriter: Rewriter, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": TEXTS[1]}) + "\n")
    for _ in range(2):  # nothing is left that would keep a second call from running
        with pytest.raises(DataError, match="1 of 1 prompts cannot be rewritten"):
            rewrite_data(rewriter, str(data), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_empty_prompt_is_an_error(rewriter: Rewriter, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="is empty: there is nothing to rewrite"):
        rewriter.rewrite(["a", " "])
    with pytest.raises(SystemExit):
        main(["rewrite", "", "--run", "nowhere"])
    assert capsys.readouterr().err == "error: rewrite: a prompt is empty: there is nothing to rewrite\n"
