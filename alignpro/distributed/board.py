"""A board on which every rank writes what it is at, so that one which waits in vain can say for whom, and where they are."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from alignpro.distributed.ranks import Ranks


class Board:
    """Notes of all ranks, in a store beside their collectives; the first rank keeps it.

    Args:
        ranks: All ranks; what is noted there (`Ranks.note`) is written here.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        if ranks.first:
            self._store = _store(0, keeps=True)
            ranks.exchange(self._store.port)
        else:
            self._store = _store(ranks.exchange(0)[0], keeps=False)
        ranks.on_note = self._write
        self._write("the start")

    def leave(self, problem: str) -> None:
        """End this process at once, with a message unless another rank has given one: the others cannot be waited for."""
        if self._first_to_tell():
            print(f"error: {problem}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # not sys.exit: taking down the process group would wait for the others

    def others(self) -> str:
        """What the other ranks wrote last, and how long ago."""
        return "; ".join(self._read(rank) for rank in range(self._ranks.size) if rank != self._ranks.rank)

    def _write(self, doing: str) -> None:
        self._store.set(str(self._ranks.rank), json.dumps({"doing": doing, "since": time.time()}))

    def _read(self, rank: int) -> str:
        try:
            told = json.loads(self._store.get(str(rank)))
        except RuntimeError:  # the rank that keeps the store is dead
            return f"rank {rank} cannot be asked"
        return f"rank {rank} came to {told['doing']} {time.time() - told['since']:.0f} s ago"

    def _first_to_tell(self) -> bool:
        try:
            return int(self._store.add("told", 1)) == 1
        except RuntimeError:
            return True


def _store(port: int, *, keeps: bool) -> dist.TCPStore:  # type: ignore[name-defined]
    """A store at a port (0: any that is free), kept by this rank or by another."""
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=30)
    return dist.TCPStore(host, port, is_master=keeps, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
