"""Communication between the processes of a job other than gradients and weights: counts, metrics, errors.

All of these are small and on the CPU, so they use a process group of their own (gloo), whatever carries the gradients.
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

from alignpro.errors import PeerError

T = TypeVar("T")


class Ranks:
    """The ranks of a job, seen from one of them. Without a group there is only one rank, and no method waits.

    Every method except `assign_balanced`, `enter_phase` and `raised_on_all` is a collective: all ranks must call it, in the
    same order.

    Args:
        group: A gloo group of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.phase = "startup"
        """This rank's current phase, for messages."""
        self.on_phase: Callable[[str], None] | None = None
        """Called with each phase that this rank enters."""
        self._raised_on_all: BaseException | None = None

    def enter_phase(self, phase: str) -> None:
        """Set this rank's current phase and pass it to `on_phase`."""
        self.phase = phase
        if self.on_phase is not None:
            self.on_phase(phase)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the rank that writes files and messages."""
        return self.rank == 0

    def all_gather_object(self, value: T) -> list[T]:
        """Gather a value from each rank, in rank order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, value: float) -> float:
        """Return the sum of a number over ranks."""
        return value if self.group is None else float(self._all_reduce(value, torch.float64, dist.ReduceOp.SUM))

    def reduce_max(self, number: int) -> int:
        """Return the maximum of a number over ranks."""
        return number if self.group is None else int(self._all_reduce(number, torch.int64, dist.ReduceOp.MAX))

    def barrier(self) -> None:
        """Wait until all ranks have come.

        On the CPU: DeepSpeed binds all groups to a GPU, where torch's own barrier would allocate, even of a gloo group and
        after a lack of memory.
        """
        self.reduce_max(0)

    def lockstep(self, passes: Sequence[T], empty: T) -> list[T]:
        """Append empty passes until all ranks have the same number: with sharded weights each pass is a collective."""
        return [*passes, *[empty] * (self.reduce_max(len(passes)) - len(passes))]

    def all_gather(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Concatenate the rows of all ranks, (n, …) → (Σ n, …) for each name, in one collective.

        With several ranks the results are on the CPU, where all compute the same bits from them: what they decide by these,
        such as who takes which prompt, must not depend on the order in which a GPU sums.

        Args:
            rows: Name → tensor, of dtypes that NumPy has; the same names on all ranks.
        """
        if self.group is None:
            return dict(rows)
        # As arrays, which are pickled in a tenth of the time of tensors, and without the rest of a view's storage.
        parts = self.all_gather_object({name: tensor.detach().cpu().numpy() for name, tensor in rows.items()})
        return {name: torch.cat([torch.from_numpy(part[name]) for part in parts]) for name in rows}

    def mean(self, metrics: Mapping[str, float], weight: float) -> dict[str, float]:
        """Average metrics over ranks, each rank's with its ``weight``; one that only other ranks have counts as 0 there."""
        if self.group is None:
            return dict(metrics)
        parts = [(values, count) for values, count in self.all_gather_object((dict(metrics), weight)) if count > 0]
        total = sum(count for _, count in parts)
        names = dict.fromkeys(name for values, _ in parts for name in values)
        return {name: sum(values.get(name, 0.0) * count for values, count in parts) / total for name in names}

    def assign_balanced(self, costs: Sequence[float]) -> list[int]:
        """Indices of this rank's pieces of work, ascending; total costs are nearly even, and rank 0 has piece 0.

        Pieces are assigned in order of decreasing cost, each to the rank with the lowest total so far (Graham, 1969): the
        highest total is at most 4/3 of the optimum. Every rank has a piece if there are enough.
        """
        if self.size == 1:
            return list(range(len(costs)))
        loads = [(0.0, rank) for rank in range(self.size)]
        owners = [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            load, rank = heapq.heappop(loads)
            owners[piece] = rank
            # The minimum cost makes a rank without a piece come first, even if pieces cost nothing.
            heapq.heappush(loads, (load + max(costs[piece], 1e-9), rank))
        swap = {0: owners[0], owners[0]: 0} if owners else {}
        return [piece for piece, rank in enumerate(owners) if swap.get(rank, rank) == self.rank]

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Context in which an error on one rank is raised on all: on that rank itself, elsewhere as a `PeerError`.

        The context must not contain collectives in which a failing rank would leave the others waiting.

        Raises:
            PeerError: Another rank failed. If several did, the lowest of them keeps its own error.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.group is None:
            if error is not None:
                raise error
            return
        report = None if error is None else (isinstance(error, PeerError), f"{type(error).__name__}: {error}")
        failed = {rank: each for rank, each in enumerate(self.all_gather_object(report)) if each is not None}
        if not failed:
            return
        # A rank with a `PeerError` only repeats the error of another rank, so it is not the source.
        source = min((rank for rank, (repeats, _) in failed.items() if not repeats), default=min(failed))
        if error is None or not (self.rank == source or isinstance(error, PeerError)):
            error = PeerError(f"rank {source}: {failed[source][1]}")
        self._raised_on_all = error
        raise error

    def require_equal(self, value: T, error: Callable[[int, T, T], Exception]) -> None:
        """Raise an error on all ranks unless all have the same value.

        Args:
            value: This rank's value.
            error: Called with the lowest rank whose value differs from rank 0's, its value, and rank 0's value; returns the
                error to raise.

        Raises:
            PeerError: On all ranks but rank 0, which raises the error itself.
        """
        first, *others = self.all_gather_object(value)
        with self.raise_together():
            for rank, other in enumerate(others, 1):
                if other != first:
                    raise error(rank, other, first)

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0 alone; all ranks get its result, or an error if it fails.

        Raises:
            PeerError: The action failed on rank 0.
        """
        result: T | None = None
        with self.raise_together():
            if self.is_rank_zero:
                result = action()
        return self.all_gather_object(result)[0]  # type: ignore[return-value]

    def write_directory(
        self, create: Callable[[Callable[[Path], None]], object], write_part: Callable[[Path], None]
    ) -> None:
        """Write a directory together: rank 0 creates it, every rank writes its part, and rank 0 renames it into place.

        Args:
            create: Called on rank 0 with a function, which it must call with the directory once that exists and is empty.
            write_part: Writes this rank's part; may itself be a collective.

        Raises:
            PeerError: Another rank failed. Nothing is renamed into place then.
        """
        announced = False

        def write(directory: Path | None) -> None:
            nonlocal announced
            announced = True
            shared = self.all_gather_object(directory)[0]
            if shared is not None:  # otherwise rank 0 failed before creating it
                with self.raise_together():
                    write_part(shared)

        with self.raise_together():
            try:
                if self.is_rank_zero:
                    create(write)
            finally:
                if not announced:
                    write(None)

    def _all_reduce(self, number: float, dtype: torch.dtype, operation: dist.ReduceOp.RedOpType) -> float:
        """Reduce a number over ranks, in one collective of a single element."""
        value = torch.tensor([number], dtype=dtype)
        dist.all_reduce(value, operation, group=self.group)
        return value.item()

    def raised_on_all(self, error: BaseException) -> bool:
        """Whether all ranks have raised this error together, so that they are at the same point and collectives still work.

        It may have been translated since (``raise … from error``), as one of the disk is.
        """
        found: BaseException | None = error
        while found is not None:
            if self.group is None or found is self._raised_on_all or isinstance(found, PeerError):
                return True
            found = found.__cause__
        return False


def is_collective_failure(error: BaseException) -> bool:
    """Whether a collective raised this error because other ranks did not join it: no later collective can succeed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
