"""What the processes of a job say to each other beside gradients and weights: counts, metrics, errors.

All of it is small and lies on the CPU, so it goes over a group of its own (gloo), whatever carries the gradients.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alignpro.errors import PeerError as PeerError

T = TypeVar("T")


class Ranks:
    """The ranks of a job, seen from one of them. Without a group there is one, and nothing is ever waited for.

    Every method but `share`, `note` and `agreed_on` is a collective: all ranks call it, in the same order.

    Args:
        group: A gloo group of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.doing = "the start"
        """What this rank is at, for messages."""
        self.on_note: Callable[[str], None] | None = None
        """Told of what this rank comes to next."""
        self.midway = False
        """Whether the others are in collectives that this rank has yet to make: what fails now cannot be agreed on."""
        self._agreed: BaseException | None = None

    def note(self, doing: str) -> None:
        """Remember what this rank is at from now on, and let others know; no collective."""
        self.doing = doing
        if self.on_note is not None:
            self.on_note(doing)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and messages."""
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """What each rank gives, in the order of ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, value: float) -> float:
        """The sum of a number over ranks."""
        return value if self.group is None else float(self._reduced(value, torch.float64, dist.ReduceOp.SUM))

    def most(self, number: int) -> int:
        """The greatest of a number."""
        return number if self.group is None else int(self._reduced(number, torch.int64, dist.ReduceOp.MAX))

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.most(int(flag)))

    def differing(self, value: object) -> int | None:
        """The lowest rank that gives another value than rank 0; None where there is none."""
        first, *others = self.exchange(value)
        return next((rank for rank, other in enumerate(others, 1) if other != first), None)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, on the device of this rank's: (n, …) → (Σ n, …)."""
        if self.group is None:
            return rows
        return torch.cat(self.exchange(rows.detach().cpu())).to(rows.device)

    def mean(self, metrics: Mapping[str, float], weight: float) -> dict[str, float]:
        """Metrics that are means, over what ``weight`` counts, as means over all ranks; a rank with weight 0 may have none."""
        if self.group is None:
            return dict(metrics)
        parts = [(values, count) for values, count in self.exchange((dict(metrics), weight)) if count > 0]
        total = sum(count for _, count in parts)
        names = parts[0][0] if parts else {}
        return {name: sum(values[name] * count for values, count in parts) / total for name in names}

    def share(self, costs: Sequence[float]) -> list[int]:
        """Which of some pieces of work are this rank's, ascending: sums of costs are nearly even, and rank 0 has piece 0.

        The dearest first, each to the rank with the least so far (Graham, 1969): at most 4/3 of the best possible. Every
        rank has one, where there are enough.
        """
        if self.size == 1:
            return list(range(len(costs)))
        loads = [(0.0, rank) for rank in range(self.size)]
        owners = [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            load, rank = heapq.heappop(loads)
            owners[piece] = rank
            # An idle rank comes before any other, even where a piece costs nothing.
            heapq.heappush(loads, (load + max(costs[piece], 1e-9), rank))
        swap = {0: owners[0], owners[0]: 0} if owners else {}
        return [piece for piece, rank in enumerate(owners) if swap.get(rank, rank) == self.rank]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank in here fails on all: with its own error there, as `PeerError` elsewhere.

        There may be no collective inside that a rank which fails would leave the others waiting in, but where `midway` says
        so: such an error is this rank's alone, which can only end.

        Raises:
            PeerError: Another rank failed. Where several did, the lowest keeps its error.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.midway:
                raise
            error = caught
        if self.group is None:
            if error is not None:
                raise error
            return
        told = None if error is None else (isinstance(error, PeerError), f"{type(error).__name__}: {error}")
        problems = self.exchange(told)
        failed = {rank: problem for rank, problem in enumerate(problems) if problem is not None}
        if not failed:
            return
        # A rank that only repeats what another one said does not speak for it.
        source = min((rank for rank, (repeats, _) in failed.items() if not repeats), default=min(failed))
        if error is None or not (self.rank == source or isinstance(error, PeerError)):
            error = PeerError(f"rank {source}: {failed[source][1]}")
        self._agreed = error
        raise error

    def on_first(self, action: Callable[[], T]) -> T:
        """Do something on rank 0 alone; its result, or its failure, is that of all ranks.

        Raises:
            PeerError: It failed there.
        """
        result: T | None = None
        with self.together():
            if self.first:
                result = action()
        return self.exchange(result)[0]  # type: ignore[return-value]

    def fill(self, make: Callable[[Callable[[Path], None]], object], part: Callable[[Path], None]) -> None:
        """Write a directory together: rank 0 makes it and puts it in place, and every rank writes its part in between.

        Args:
            make: Called on rank 0 with a function that is to be called with the directory, once it is there and empty.
            part: Writes this rank's part; may itself be a collective.

        Raises:
            PeerError: It failed on another rank. Nothing is put in place then.
        """
        told = False

        def write(directory: Path | None) -> None:
            nonlocal told
            told = True
            shared = self.exchange(directory)[0]
            if shared is not None:  # else rank 0 has failed before it was there
                with self.together():
                    part(shared)

        with self.together():
            try:
                if self.first:
                    make(write)
            finally:
                if not told:
                    write(None)

    def _reduced(self, number: float, dtype: torch.dtype, operation: dist.ReduceOp.RedOpType) -> float:
        """A number of each rank made one, in one collective of a single element."""
        value = torch.tensor([number], dtype=dtype)
        dist.all_reduce(value, operation, group=self.group)
        return value.item()

    def agreed_on(self, error: BaseException) -> bool:
        """Whether every rank has failed with this, so that all are at the same place and collectives still work."""
        return self.group is None or error is self._agreed or isinstance(error, PeerError)


def lost_ranks(error: BaseException) -> bool:
    """Whether a collective has raised this, since other ranks did not come to it: no other one will succeed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
