"""A process that buys from a toy server and may be killed at any moment; `test_ledger_kills` runs it.

The server is a function of this process that first appends what it sells to a log of its own, synced to disk, as a real
server's meter would have it. What the caller was handed goes to a second log: from then on it must never be bought again.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
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
DRAWS = 400


def write_durably(descriptor: int, record: object) -> None:
    os.write(descriptor, json.dumps(record).encode() + b"\n")
    os.fsync(descriptor)


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
        write_durably(served, [draw, usage.input, usage.output, text])
        await asyncio.sleep(random.random() / 200)
        if outcome == "lost":
            await books.write_off(purchase, "reset")
            continue
        (found,) = await books.settle(purchase, [Answer(text, "stop")], usage)
    write_durably(handed, [draw, found.text])


async def main(directory: Path, usd: str, seed: int) -> None:
    served, handed = (
        os.open(directory / name, os.O_CREAT | os.O_APPEND | os.O_WRONLY) for name in ("served", "handed")
    )
    with Ledger(directory / "ledger.sqlite") as ledger:
        books = LedgerBooks(ledger, BudgetConfig(usd=Decimal(usd)), PRICES, "run")
        random = Random(seed)
        draws = list(range(1, DRAWS + 1))
        random.shuffle(draws)
        print("buying", flush=True)
        done = await asyncio.gather(
            *(buy(books, draw, random, served, handed) for draw in draws), return_exceptions=True
        )
        for error in done:
            if error is not None and not isinstance(error, BudgetError):
                raise error
        print("exhausted" if any(done) else "complete", flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
