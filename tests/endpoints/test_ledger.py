"""The ledger: what is committed is there, what is damaged is said, and one process writes at a time."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from purchases import BOUND, answer, key

from alignpro.endpoints.group_commit import GroupCommit
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.ledger_schema import VERSION
from alignpro.endpoints.types import Answer, Usage
from alignpro.errors import LedgerError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as connection:
        return connection.execute(query).fetchall()


def buy(ledger: Ledger, *draws: int, text: str = "stone") -> None:
    keys = [key(draw) for draw in draws]
    purchase = ledger.intend("run", keys, BOUND, 7).result()
    ledger.settle(purchase, keys, [answer(f"{text} {draw}") for draw in draws], Usage(3, 2), 5).result()


# ------------------------------------------------------------------------------------------------------------- records


def test_an_answer_is_found_after_reopening(path: Path) -> None:
    with Ledger(path) as ledger:
        buy(ledger, 1, 2**63 - 1)
    with Ledger(path) as ledger:
        found = ledger.find([key(2**63 - 1), key(2), key(1), key(1, body="{}"), key(1, model="other")]).result()
    texts = [None if each is None else each.text for each in found]
    assert texts == [f"stone {2**63 - 1}", None, "stone 1", None, None]
    assert found[2] == Answer("stone 1", "stop", "hm", "m-1", "fp", replayed=True)


@pytest.mark.parametrize("text", ["", "\ud800 alone", "nul \0 inside", "ﷺ 😀", "x" * 10**6])
def test_any_text_comes_back_as_it_was(path: Path, text: str) -> None:
    with Ledger(path) as ledger:
        purchase = ledger.intend("run", [key(body=text)], BOUND, None).result()
        ledger.settle(purchase, [key(body=text)], [answer(text)], None, None).result()
        (found,) = ledger.find([key(body=text)]).result()
    assert found is not None and found.text == text


@pytest.mark.parametrize("reason", ["filtered", "overflow", "length"])
def test_outcomes_are_replayed_as_what_they_are(path: Path, reason: Any) -> None:
    with Ledger(path) as ledger:
        purchase = ledger.intend("run", [key()], BOUND, None).result()
        ledger.settle(purchase, [key()], [Answer("", reason)], Usage(3, 0), None).result()
        (found,) = ledger.find([key()]).result()
    assert found == Answer("", reason, replayed=True)


def test_a_draw_that_did_not_come_back_can_be_bought_again(path: Path) -> None:
    with Ledger(path) as ledger:
        keys = [key(1), key(2)]
        first = ledger.intend("run", keys, BOUND, None).result()
        assert ledger.settle(first, keys, [answer(), None], Usage(3, 2), None).result() == [answer(), None]
        assert [each is None for each in ledger.find(keys).result()] == [False, True]
        buy(ledger, 2)
        assert None not in ledger.find(keys).result()
    assert rows(path, "SELECT missing FROM purchases") == [("[2]",), ("[]",)]


def test_of_two_answers_to_a_draw_the_first_stays_and_is_returned(path: Path) -> None:
    with Ledger(path) as ledger:
        first, second = (ledger.intend("run", [key(0)], BOUND, None).result() for _ in range(2))
        ledger.settle(first, [key(0)], [answer("first")], None, None).result()
        (kept,) = ledger.settle(second, [key(0)], [answer("second")], None, None).result()
        assert kept is not None and kept.text == "first" and kept.replayed
        assert ledger.find([key(0)]).result() == [kept]


def test_a_purchase_is_closed_once(path: Path) -> None:
    with Ledger(path) as ledger:
        purchase = ledger.intend("run", [key()], BOUND, 7).result()
        ledger.refund(purchase, "429").result()
        with pytest.raises(ValueError, match="not open"):
            ledger.write_off(purchase, "reset").result()
        assert list(ledger.charges("run")) == []


def test_charges_are_those_of_the_run(path: Path) -> None:
    with Ledger(path) as ledger:
        buy(ledger, 1)
        ledger.write_off(ledger.intend("run", [key(2)], BOUND, 7).result(), "reset").result()
        ledger.intend("run", [key(3)], BOUND, 7).result()
        ledger.write_off(ledger.intend("other", [key(4)], BOUND, 7).result(), "reset").result()
        charges = [(each.model, each.usage, each.cost, each.unknown) for each in ledger.charges("run")]
    assert charges == [("m", Usage(3, 2), 5, False), ("m", BOUND, 7, True)]


def test_a_purchase_left_open_is_written_off_at_its_bound(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Ledger(path) as ledger:
        ledger.intend("run", [key()], BOUND, 7).result()
    with Ledger(path) as ledger:
        assert [(each.usage, each.cost, each.unknown) for each in ledger.charges("run")] == [(BOUND, 7, True)]
    assert f"ledger {path}: 1 requests were in flight" in caplog.text
    assert rows(path, "SELECT state FROM purchases") == [("written_off",)]


def test_absurd_usage_is_stored(path: Path) -> None:
    with Ledger(path) as ledger:
        purchase = ledger.intend("run", [key()], BOUND, 7).result()
        ledger.settle(purchase, [key()], [answer()], Usage(10**30, 1), 10**40).result()
        (charge,) = ledger.charges("run")
        assert charge.usage.input == charge.cost == 2**62


# ---------------------------------------------------------------------------------------------------- file, lock, damage


def test_all_its_files_are_readable_by_their_owner_only(path: Path) -> None:
    before = os.umask(0)
    try:
        with Ledger(path) as ledger:
            buy(ledger, 1)
            files = list(path.parent.iterdir())
            assert {file.name for file in files} == {path.name + end for end in ("", "-wal", "-shm", ".lock")}
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(before)


def test_a_ledger_that_others_could_read_is_closed_to_them(path: Path) -> None:
    Ledger(path).close()
    path.chmod(0o644)
    Ledger(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_second_writer_gets_one_error_that_names_the_file_and_the_holder(path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom alignpro.endpoints.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\nprint('open', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        with pytest.raises(LedgerError, match=rf"ledger {path}: is in use by process {holder.pid} on "):
            Ledger(path)
        holder.kill()
    Ledger(path).close()


def test_a_ledger_of_a_newer_version_is_refused(path: Path) -> None:
    Ledger(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=rf"ledger {path}: has version {VERSION + 1}, of a newer Align-Pro"):
        Ledger(path)
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_refused(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes(text)")
    with pytest.raises(LedgerError, match=rf"ledger {path}: is a database of another program"):
        Ledger(path)
    assert rows(path, "SELECT name FROM sqlite_master") == [("notes",)]


def test_garbage_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be one" * 100)
    with pytest.raises(LedgerError, match=rf"ledger {path}: is not a ledger"):
        Ledger(path)
    assert path.read_bytes().startswith(b"not a database")


def test_an_empty_file_becomes_a_ledger(path: Path) -> None:
    path.touch()
    with Ledger(path) as ledger:
        buy(ledger, 1)


def test_a_truncated_ledger_is_an_error(path: Path) -> None:
    with Ledger(path) as ledger:
        buy(ledger, *range(1, 200), text="long " * 100)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(LedgerError, match=rf"ledger {path}: is damaged"), Ledger(path) as ledger:
        list(ledger.charges("run"))
        for draw in range(1, 200):
            ledger.find([key(draw)]).result()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=r"file/ledger.sqlite: cannot be locked"):
        Ledger(tmp_path / "file" / "ledger.sqlite")
    with pytest.raises(LedgerError, match="cannot be"):
        Ledger(tmp_path)


def test_a_full_disk_is_an_error_and_loses_nothing(mount_disk: Callable[[str], Path]) -> None:
    path = mount_disk("512k") / "ledger.sqlite"
    bought = 0
    ledger = Ledger(path)
    with pytest.raises(LedgerError, match=rf"ledger {path}: .*(disk is full|cannot be used)"):
        while True:
            buy(ledger, bought + 1, text="long " * 200)
            bought += 1
    found = ledger.find([key(draw + 1) for draw in range(bought)]).result()
    assert bought > 5 and None not in found
    ledger.close()


# ------------------------------------------------------------------------------------------------------- the writer


def test_work_of_many_threads_shares_transactions(tmp_path: Path) -> None:
    path = tmp_path / "db"
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("CREATE TABLE numbers(n)")
    begun: list[str] = []
    connection.set_trace_callback(lambda statement: begun.append(statement) if "BEGIN" in statement else None)
    writer = GroupCommit(connection, lambda error: error)
    blocked = threading.Event()
    first = writer.submit(lambda _: blocked.wait())
    threads = [
        threading.Thread(
            target=lambda start=start: [writer.submit(insert(n)) for n in range(start, start + 100)]  # type: ignore[misc]
        )
        for start in range(0, 800, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocked.set()
    first.result()
    writer.close()
    assert len(begun) == 2
    assert sorted(n for (n,) in rows(path, "SELECT n FROM numbers")) == list(range(800))


def insert(n: int) -> Callable[[sqlite3.Connection], object]:
    return lambda connection: connection.execute("INSERT INTO numbers VALUES (?)", (n,)).rowcount


def test_work_that_fails_leaves_the_rest_of_its_transaction(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "db", isolation_level=None, check_same_thread=False)
    connection.execute("CREATE TABLE numbers(n UNIQUE)")
    writer = GroupCommit(connection, lambda error: LedgerError(f"explained: {error}"))
    blocked = threading.Event()
    writer.submit(lambda _: blocked.wait())
    done: list[Future[object]] = [writer.submit(insert(n)) for n in (1, 2, 1, 3)]
    blocked.set()
    with pytest.raises(LedgerError, match="explained: UNIQUE"):
        done[2].result()
    assert [done[i].result() for i in (0, 1, 3)] == [1, 1, 1]
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(insert(4))


def test_a_result_that_is_no_longer_awaited_is_written_all_the_same(path: Path) -> None:
    async def cancelled(ledger: Ledger) -> None:
        purchase = await asyncio.wrap_future(ledger.intend("run", [key()], BOUND, None))
        settling = asyncio.ensure_future(asyncio.wrap_future(ledger.settle(purchase, [key()], [answer()], None, None)))
        settling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await settling

    with Ledger(path) as ledger:
        asyncio.run(cancelled(ledger))
        assert ledger.find([key()]).result() != [None]


@pytest.mark.slow
def test_a_hundred_thousand_answers_take_no_memory(path: Path) -> None:
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with Ledger(path) as ledger:
        for start in range(0, 100_000, 100):
            buy(ledger, *range(start + 1, start + 101), text="word " * 100)
            if start == 10_000:
                before = peak()
        assert sum(1 for _ in ledger.charges("run")) == 1000
    with Ledger(path) as ledger:
        for start in range(0, 100_000, 1000):
            assert None not in ledger.find([key(draw + 1) for draw in range(start, start + 1000)]).result()
    assert peak() - before < 20_000  # KiB; the answers take 60 MB


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "ledger"]
