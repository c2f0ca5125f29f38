"""A store of every rank's current phase, so that a rank whose collective fails can say where the others are."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from alignpro.distributed.ranks import Ranks

PATIENCE = 5.0
"""Seconds for which rank 0 waits for the others before it closes the store."""


class PhaseStore:
    """The current phase of every rank, in a TCP store that is independent of their collectives and hosted by rank 0.

    Args:
        ranks: All ranks; each phase that they enter (`Ranks.enter_phase`) is written to the store.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        if ranks.is_rank_zero:
            self._store = _tcp_store(0, is_master=True)
            ranks.all_gather_object(self._store.port)
        else:
            self._store = _tcp_store(ranks.all_gather_object(0)[0], is_master=False)
        ranks.on_phase = self._write
        self._write(ranks.phase)

    def abort(self, problem: str) -> None:
        """End this process at once, without waiting for other ranks; print the problem if no other rank has printed one."""
        if self._is_first_to_abort():
            print(f"error: {problem}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self.leave()
        os._exit(1)  # not sys.exit: taking down the process group would wait for the others

    def leave(self) -> None:
        """Say that this rank no longer needs the store; rank 0, whose end closes it, waits until all others have.

        It waits `PATIENCE` seconds at most, since another rank may be waiting in a collective, or have been killed.
        """
        try:
            left = self._store.add("left", 1)
            deadline = time.monotonic() + PATIENCE
            while self._ranks.is_rank_zero and left < self._ranks.size and time.monotonic() < deadline:
                time.sleep(0.01)
                left = self._store.add("left", 0)
        except RuntimeError:
            return  # rank 0 has ended

    def describe_peers(self) -> str:
        """Describe the last phase that the other ranks entered, and how long ago; ranks in the same phase together."""
        found: dict[str | None, dict[int, float]] = {}
        for rank in range(self._ranks.size):
            if rank != self._ranks.rank:
                phase, entered = self._read(rank)
                found.setdefault(phase, {})[rank] = entered
        # The rank that keeps the others waiting entered its phase first.
        return "; ".join(
            _describe(phase, found[phase]) for phase in sorted(found, key=lambda p: min(found[p].values()))
        )

    def _write(self, phase: str) -> None:
        self._store.set(str(self._ranks.rank), json.dumps({"phase": phase, "entered": time.time()}))

    def _read(self, rank: int) -> tuple[str | None, float]:
        """Return a rank's phase, and when it entered that by its own clock; None and infinity if they are unknown."""
        try:
            found = json.loads(self._store.get(str(rank)))
        except RuntimeError:  # rank 0, which hosts the store, has ended
            return None, math.inf
        return found["phase"], found["entered"]

    def _is_first_to_abort(self) -> bool:
        try:
            return int(self._store.add("aborted", 1)) == 1
        except RuntimeError:
            return True


def _describe(phase: str | None, entered: dict[int, float]) -> str:
    """Describe ranks in one phase by when they entered it; ``phase`` is None if it is unknown."""
    ranks = f"rank{'' if len(entered) == 1 else 's'} {_ranges(sorted(entered))}"
    if phase is None:
        return f"the state of {ranks} is unknown"
    ages = [max(time.time() - each, 0.0) for each in entered.values()]  # clocks of nodes differ
    between = f"{min(ages):.0f}" if round(min(ages)) == round(max(ages)) else f"{min(ages):.0f} to {max(ages):.0f}"
    return f"{ranks} entered {phase} {between} s ago"


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers with consecutive ones as ranges: 0, 2-5, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _tcp_store(port: int, *, is_master: bool) -> dist.TCPStore:  # type: ignore[name-defined]
    """Host the store on this rank, or connect to it; port 0 means any free port."""
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=30)
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=is_master, wait_for_workers=False, timeout=timeout
    )
