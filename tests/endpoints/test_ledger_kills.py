"""Kills at random moments: no answer that was handed out is lost or bought again, all that was sold is charged."""

from __future__ import annotations

import json
import multiprocessing
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import buyer
import pytest
from purchases import key

from alignpro.config import BudgetConfig
from alignpro.endpoints.books import LedgerBooks
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.ledger_check import verify


def read_log(path: Path) -> list[list[Any]]:
    """Return the records of a log."""
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def run_buyer(directory: Path, draws: int, usd: str, seed: int, sales: int | None = None) -> str:
    """Let a buyer run, kill it a moment after so many sales unless that is None, and return how it ended if it did."""
    before, said = len(read_log(directory / "served")), directory / "said"
    said.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=buyer.run, args=(directory, draws, usd, seed))
    process.start()
    if sales is not None:
        while process.is_alive() and len(read_log(directory / "served")) < before + sales:
            time.sleep(0.002)
        time.sleep(Random(seed).random() / 50)
        process.kill()
    process.join()
    return said.read_text() if said.exists() else ""


def check(directory: Path, draws: int, usd: str) -> int:
    """Compare the ledger with the logs of the server and of the buyer; return the number of sales without an answer."""
    served, handed = read_log(directory / "served"), read_log(directory / "handed")
    with Ledger(directory / "ledger.sqlite") as ledger:
        spending = LedgerBooks(ledger, BudgetConfig(), buyer.PRICES, "run").spending()
        found = ledger.find([key(draw) for draw in range(1, draws + 1)]).result()
        charges = list(ledger.charges("run"))
    verify(directory / "ledger.sqlite")
    texts = {draw: answer.text for draw, answer in enumerate(found, 1) if answer is not None}
    for draw, text in handed:
        assert texts[draw] == text
    sold: dict[int, list[str]] = {}
    for draw, _, _, text in served:
        sold.setdefault(draw, []).append(text)
    for draw, text in texts.items():
        assert sold[draw][-1] == text  # nothing is bought after the answer that is on record
    price = buyer.PRICES["m"]
    bill = sum(
        (Fraction(price.input) * input + Fraction(price.output) * output) / 10**6 + Fraction(price.request)
        for _, input, output, _ in served
    )
    assert bill <= Fraction(spending.usd) <= Fraction(Decimal(usd))
    unknown = sum(len(each) for each in sold.values()) - len(texts)  # sold, but no answer on record
    assert unknown <= spending.unknown == sum(charge.unknown for charge in charges)
    assert len(served) <= spending.requests == len(charges)
    return unknown


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_lose_no_answer_and_buy_none_twice(tmp_path: Path, kills: int) -> None:
    random, draws = Random(1), 100 + 5 * kills
    for kill in range(kills):
        run_buyer(tmp_path, draws, "100", seed=kill, sales=random.randrange(8))
        unknown = check(tmp_path, draws, "100")
    assert unknown > 0  # or no kill has hit a request in flight, and this proves nothing
    assert run_buyer(tmp_path, draws, "100", seed=kills) == "complete"
    check(tmp_path, draws, "100")


def test_a_budget_holds_across_kills(tmp_path: Path) -> None:
    """The limit is less than the answers cost: whenever the run is killed, it ends with an error of the budget."""
    for kill in range(5):
        run_buyer(tmp_path, 100, "0.08", seed=kill, sales=6 * kill)
        check(tmp_path, 100, "0.08")
    assert run_buyer(tmp_path, 100, "0.08", seed=9) == "exhausted"
    check(tmp_path, 100, "0.08")
