"""A process that buys from a toy server and may be killed at any moment; `test_ledger_kills` runs it.

The server is a function of this process that first appends what it sells to a log of its own, as a real server's meter would
have it. What the caller was handed goes to a second log: from then on it must never be bought again. What one call has written
survives a SIGKILL.
"""

from __future__ import annotations

import asyncio
import json
import os
from decimal import Decimal
from pathlib import Path
from random import Random

from purchases import BOUND, key

from alignpro.config import BudgetConfig, PriceConfig
from alignpro.endpoints.books import LedgerBooks
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.types import Answer, Usage
from alignpro.errors import BudgetError

PRICES = {"m": PriceConfig(input=Decimal("0.15"), output=Decimal("0.6"), request=Decimal("0.001"))}


def write(descriptor: int, record: object) -> None:
    os.write(descriptor, json.dumps(record).encode() + b"\n")


async def buy(books: LedgerBooks, draw: int, random: Random, served: int, handed: int) -> None:
    """Ask for one draw, of a server that fails at times, until it has been answered."""
    (found,) = await books.find([key(draw)])
    while found is None:
        purchase = await books.reserve([key(draw)], BOUND)
        outcome = random.choice(["answer", "answer", "answer", "refused", "lost"])
        await asyncio.sleep(random.random() / 200)
        if outcome == "refused":
            await books.refund(purchase, "429")
            continue
        usage = Usage(random.randrange(101), random.randrange(51))
        text = f"{os.getpid()}/{purchase.id}"
        write(served, [draw, usage.input, usage.output, text])
        await asyncio.sleep(random.random() / 200)
        if outcome == "lost":
            await books.write_off(purchase, "reset")
            continue
        (found,) = await books.settle(purchase, [Answer(text, "stop")], usage)
    write(handed, [draw, found.text])


async def main(directory: Path, draws: int, usd: str, seed: int) -> None:
    served, handed = (
        os.open(directory / name, os.O_CREAT | os.O_APPEND | os.O_WRONLY) for name in ("served", "handed")
    )
    with Ledger(directory / "ledger.sqlite") as ledger:
        books = LedgerBooks(ledger, BudgetConfig(usd=Decimal(usd)), PRICES, "run")
        random = Random(seed)
        order = list(range(1, draws + 1))
        random.shuffle(order)
        slots = asyncio.Semaphore(8)

        async def one(draw: int) -> None:
            async with slots:
                await buy(books, draw, random, served, handed)

        done = await asyncio.gather(*map(one, order), return_exceptions=True)
        for error in done:
            if error is not None and not isinstance(error, BudgetError):
                raise error
        (directory / "said").write_text("exhausted" if any(done) else "complete")


def run(directory: Path, draws: int, usd: str, seed: int) -> None:
    """Buy so many draws within a budget, in whatever order, and write how it ended."""
    asyncio.run(main(directory, draws, usd, seed))
