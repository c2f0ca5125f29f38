"""Kills at random moments: no answer that was handed out is lost or bought again, all that was sold is charged."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
from buyer import DRAWS, PRICES
from purchases import key

from alignpro.config import BudgetConfig
from alignpro.endpoints.books import LedgerBooks
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.ledger_check import verify


def read_log(path: Path) -> list[list[Any]]:
    """Return the complete records of a log; a kill may have cut the last."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def run_buyer(directory: Path, usd: str, seed: int, seconds: float | None) -> str:
    """Let a buyer run, kill it after a while unless ``seconds`` is None, and return what it said last."""
    command = [sys.executable, str(Path(__file__).with_name("buyer.py")), str(directory), usd, str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as buyer:
        assert buyer.stdout is not None and buyer.stdout.readline() == "buying\n"
        if seconds is not None:
            time.sleep(seconds)
            buyer.kill()
        return buyer.stdout.read()


def check(directory: Path, usd: str) -> int:
    """Compare the ledger with the logs of the server and of the buyer; return the number of unknown outcomes."""
    served, handed = read_log(directory / "served"), read_log(directory / "handed")
    with Ledger(directory / "ledger.sqlite") as ledger:
        spending = LedgerBooks(ledger, BudgetConfig(), PRICES, "run").spending()
        found = ledger.find([key(draw) for draw in range(1, DRAWS + 1)]).result()
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
    price = PRICES["m"]
    bill = sum(
        (Fraction(price.input) * input + Fraction(price.output) * output) / 10**6 + Fraction(price.request)
        for _, input, output, _ in served
    )
    assert bill <= Fraction(spending.usd) <= Fraction(Decimal(usd))
    unknown = sum(len(each) for each in sold.values()) - len(texts)  # sold, but no answer on record
    assert unknown <= spending.unknown == sum(charge.unknown for charge in charges)
    assert len(served) <= spending.requests == len(charges)
    return unknown


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_lose_no_answer_and_buy_none_twice(tmp_path: Path, kills: int) -> None:
    random, unknown = Random(1), 0
    for kill in range(kills):
        run_buyer(tmp_path, "100", kill, seconds=random.random() / (4 if kills < 10 else 20))
        unknown = check(tmp_path, "100")
    assert unknown > 0  # or no kill has hit a request in flight, and this proves nothing
    assert run_buyer(tmp_path, "100", kills, seconds=None) == "complete\n"
    check(tmp_path, "100")


def test_a_budget_holds_across_kills(tmp_path: Path) -> None:
    """The limit is less than the answers cost: whenever the run is killed, it ends with an error of the budget."""
    for kill in range(4):
        run_buyer(tmp_path, "0.2", kill, seconds=0.05 * kill)
        check(tmp_path, "0.2")
    assert run_buyer(tmp_path, "0.2", 9, seconds=None) == "exhausted\n"
    check(tmp_path, "0.2")
