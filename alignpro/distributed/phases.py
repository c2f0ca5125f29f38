"""A board where ranks post their current phase, so that a rank whose collective fails can say where the others are."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from alignpro.distributed.ranks import Ranks


class Board:
    """The current phase of every rank, in a TCP store that is independent of their collectives and hosted by rank 0.

    Args:
        ranks: All ranks; the phases that they note (`Ranks.note`) are posted here.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        if ranks.is_rank_zero:
            self._store = _store(0, keeps=True)
            ranks.all_gather_object(self._store.port)
        else:
            self._store = _store(ranks.all_gather_object(0)[0], keeps=False)
        ranks.on_note = self._write
        self._write("startup")

    def leave(self, problem: str) -> None:
        """End this process at once, without waiting for other ranks; print the problem if it is the first of any rank."""
        if self._first_to_tell():
            print(f"error: {problem}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # not sys.exit: taking down the process group would wait for the others

    def others(self) -> str:
        """Describe the last phase that each other rank posted, and how long ago."""
        return "; ".join(self._read(rank) for rank in range(self._ranks.size) if rank != self._ranks.rank)

    def _write(self, doing: str) -> None:
        self._store.set(str(self._ranks.rank), json.dumps({"doing": doing, "since": time.time()}))

    def _read(self, rank: int) -> str:
        try:
            told = json.loads(self._store.get(str(rank)))
        except RuntimeError:  # rank 0, which hosts the store, has ended
            return f"the state of rank {rank} is unknown"
        return f"rank {rank} entered {told['doing']} {time.time() - told['since']:.0f} s ago"

    def _first_to_tell(self) -> bool:
        try:
            return int(self._store.add("told", 1)) == 1
        except RuntimeError:
            return True


def _store(port: int, *, keeps: bool) -> dist.TCPStore:  # type: ignore[name-defined]
    """Create the store on this rank, or connect to that of another; port 0 means any free port."""
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=30)
    return dist.TCPStore(host, port, is_master=keeps, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
