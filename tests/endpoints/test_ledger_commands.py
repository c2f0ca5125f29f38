"""`alignpro ledger`: show, export, verify and purge, also while a run uses the ledger."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from purchases import BOUND, answer, key

from alignpro.cli import main
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.types import Answer, DrawKey, Usage
from alignpro.errors import LedgerError

SECRETS = (
    "the question nobody may see",
    "the answer nobody may see",
    "the thought nobody may see",
    "quoted by the server",
)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["ledger", *map(str, arguments)])
    return int(stopped.value.code or 0)


def fill(ledger: Ledger) -> None:
    asked = [key(draw, body=json.dumps({"messages": SECRETS[0]})) for draw in (1, 2)]
    purchase = ledger.intend("run", asked, BOUND, 7).result()
    ledger.settle(purchase, asked, [Answer(SECRETS[1], "stop", SECRETS[2], "m-1"), None], Usage(3, 2), 5).result()
    ledger.refund(ledger.intend("run", [key(3)], BOUND, 7).result(), "429").result()
    ledger.write_off(ledger.intend("run", [key(4)], BOUND, 7).result(), f"reset \x1b[31m {SECRETS[3]}").result()
    unpriced = DrawKey("http://localhost/v1", "big", "chat", "{}", 5)
    purchase = ledger.intend("run", [unpriced], BOUND, None).result()
    ledger.settle(purchase, [unpriced], [answer()], None, None).result()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        fill(ledger)
    return tmp_path / "ledger.sqlite"


def test_show(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", path.parent) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == (
        f"ledger {path}: 4 requests; 2 answers; $0.000000000012; 1 requests without a price; 1 of unknown outcome, "
        "charged at their bound"
    )
    assert [line.split() for line in lines[2:7]] == [
        ["model", "state", "requests", "draws", "input", "output", "cost"],
        ["big", "settled", "1", "1", "100", "50", "$0.00", "+", "?"],
        ["m", "refunded", "1", "1", "0", "0", "$0.00"],
        ["m", "settled", "1", "2", "3", "2", "$0.000000000005"],
        ["m", "written_off", "1", "1", "100", "50", "$0.000000000007"],
    ]
    assert [line.split()[2] for line in lines[9:]] == ["settled", "written_off", "refunded", "settled"]
    assert "\x1b" not in shown and "reset �[31m quoted" in shown


def test_an_empty_ledger_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    assert run("show", tmp_path) == 0
    assert capsys.readouterr().out == f"ledger {tmp_path}/ledger.sqlite: 0 requests; 0 answers; $0.00\n"


def test_export(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert run("export", path, "--out", out) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["state"] for record in records] == ["settled", "refunded", "written_off", "settled"]
    first = records[0]
    assert first["draws"] == [1, 2] and first["charged"] == {"input": 3, "output": 2, "usd": "5E-12"}
    assert json.loads(first["body"]) == {"messages": SECRETS[0]} and first["model"] == "m"
    assert [(each["draw"], each["text"], each["reasoning"]) for each in first["answers"]] == [(1, *SECRETS[1:3])]
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert run("export", path, "--out", out) == 1
    assert f"{out}: exists already; --force replaces it" in capsys.readouterr().err
    assert run("export", path, "--out", out, "--force") == 0
    assert run("export", path, "--out", tmp_path / "nowhere" / "out.jsonl") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_ledger_in_use_can_be_read_but_not_purged(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Ledger(path) as ledger:
        ledger.intend("run", [key(9)], BOUND, 7).result()
        for command in (["show", path], ["verify", path], ["export", path, "--out", path.parent / "out"]):
            assert run(*command) == 0
        assert "1 in flight, or left so" in capsys.readouterr().out
        assert run("purge", path, "--yes") == 1
        assert f"ledger {path}: is in use by process {os.getpid()} on " in capsys.readouterr().err
        ledger.intend("run", [key(10)], BOUND, 7).result()


def test_purging_removes_the_texts_from_every_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(secret.encode() in path.read_bytes() for secret in SECRETS)
    assert run("purge", path, "--yes") == 0
    assert capsys.readouterr().out == f"ledger {path}: 2 answers purged\n"
    for file in path.parent.iterdir():
        assert not any(secret.encode() in file.read_bytes() for secret in SECRETS), file
    assert run("verify", path) == 0
    assert run("show", path) == 0
    assert "$0.000000000012; 1 requests without a price" in capsys.readouterr().out


def test_a_purge_asks_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    before = path.read_bytes()
    assert run("purge", path) == 1
    assert path.read_bytes() == before


def test_a_purged_answer_is_bought_again_and_then_kept(path: Path) -> None:
    assert run("purge", path, "--yes") == 0
    asked = key(1, body=json.dumps({"messages": SECRETS[0]}))
    with Ledger(path) as ledger:
        assert ledger.find([asked]).result() == [None]
        purchase = ledger.intend("run", [asked], BOUND, 7).result()
        assert ledger.settle(purchase, [asked], [answer("new")], Usage(3, 2), 5).result() == [answer("new")]
        (found,) = ledger.find([asked]).result()
        assert found is not None and found.text == "new"
    assert run("verify", path) == 0


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            "UPDATE answers SET text = 'other' WHERE draw = 1",
            "answer to question 1, draw 1: its text is not what its hash",
        ),
        ("UPDATE questions SET body = '{}' WHERE id = 1", "question 1: its body is not what its hash says"),
        ("UPDATE questions SET model = 'x' WHERE id = 1", "question 1: its body is not what its hash says"),
        ("DELETE FROM answers WHERE draw = 1", "purchase 1: is settled, and the answer to draw 1 is missing"),
        ("UPDATE purchases SET missing = '[7]' WHERE id = 1", "purchase 1: misses draws that it was not for"),
        ("UPDATE purchases SET state = 'refunded' WHERE id = 1", "purchase 1: was refunded, and is charged"),
        ("UPDATE purchases SET state = 'refunded' WHERE id = 1", "answer to question 1, draw 1: was never bought"),
        (
            "UPDATE purchases SET input = 0 WHERE id = 3",
            "purchase 3: its usage is unknown, and it is not charged at its",
        ),
        (
            "UPDATE purchases SET cost = 0 WHERE id = 3",
            "purchase 3: its usage is unknown, and it is not charged at its",
        ),
        ("DELETE FROM questions WHERE id = 2", "what it refers to in questions is missing"),
    ],
)
def test_verify_says_what_is_wrong(path: Path, capsys: pytest.CaptureFixture[str], change: str, problem: str) -> None:
    assert run("verify", path) == 0
    assert capsys.readouterr().out == f"ledger {path}: intact\n"
    connection = sqlite3.connect(path)
    connection.execute(change.replace("'other'", "x'6f74686572'").replace("'{}'", "x'7b7d'").replace("'x'", "x'78'"))
    connection.commit()
    connection.close()
    assert run("verify", path) == 1
    error = capsys.readouterr().err
    assert f"error: ledger {path}: is damaged:\n" in error and problem in error


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], lambda content: content[:5000] + b"?" * 4000 + content[9000:]],
)
def test_verify_finds_damage_to_the_file(
    path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    path.write_bytes(damage(path.read_bytes()))
    assert run("verify", path) == 1
    error = capsys.readouterr().err
    assert f"ledger {path}" in error and "Traceback" not in error


def test_what_is_no_ledger_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["show"], ["verify"], ["export", "--out", tmp_path / "out"], ["purge", "--yes"]):
        assert run(*command, tmp_path / "nowhere") == 1
        assert f"ledger {tmp_path}/nowhere: there is no such file" in capsys.readouterr().err
        assert run(*command, tmp_path) == 1
        assert f"run directory {tmp_path}: has no ledger.sqlite" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").touch()
    assert run("show", tmp_path / "empty") == 1
    assert "empty: is empty" in capsys.readouterr().err


def test_texts_that_a_reader_holds_back_are_said_to_be_there_still(path: Path) -> None:
    from alignpro.endpoints.ledger_purge import purge
    from alignpro.endpoints.ledger_schema import open_for_reading

    with open_for_reading(path) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM answers").fetchone()
        reader.execute("PRAGMA busy_timeout = 0")
        with pytest.raises(LedgerError, match="another process reads it, so its texts are still there"):
            purge(path)
    assert purge(path) == 0
    assert not any(secret.encode() in file.read_bytes() for file in path.parent.iterdir() for secret in SECRETS)
