"""A store of every rank's current phase, so that a rank whose collective fails can say where the others are."""

from __future__ import annotations

import json
import os
import sys
import time
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
        """Describe the last phase that each other rank entered, and how long ago."""
        return "; ".join(self._describe(rank) for rank in range(self._ranks.size) if rank != self._ranks.rank)

    def _write(self, phase: str) -> None:
        self._store.set(str(self._ranks.rank), json.dumps({"phase": phase, "entered": time.time()}))

    def _describe(self, rank: int) -> str:
        try:
            found = json.loads(self._store.get(str(rank)))
        except RuntimeError:  # rank 0, which hosts the store, has ended
            return f"the state of rank {rank} is unknown"
        return f"rank {rank} entered {found['phase']} {time.time() - found['entered']:.0f} s ago"

    def _is_first_to_abort(self) -> bool:
        try:
            return int(self._store.add("aborted", 1)) == 1
        except RuntimeError:
            return True


def _tcp_store(port: int, *, is_master: bool) -> dist.TCPStore:  # type: ignore[name-defined]
    """Host the store on this rank, or connect to it; port 0 means any free port."""
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=30)
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=is_master, wait_for_workers=False, timeout=timeout
    )
