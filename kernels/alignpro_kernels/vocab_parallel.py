"""The split of a head's vocabulary over the ranks of a process group, and the communication between the ranks.

This is the output layer under tensor parallelism: rank k of K has a contiguous slice of the head's rows, and hidden
states and targets are the same on all ranks. `vocab_states` has the formulas that merge the distributions of the slices.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from alignpro_kernels.head import statistics_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Fact: TypeAlias = int | float | str | Tensor | None
"""A value that must be the same on all ranks; tensors are compared by a checksum of their bits."""

_FACTS = 14  # facts compared per collective: a fixed number, so that ranks in different operators can still compare
_SOUND, _FAILED = 0, 1


@dataclass(frozen=True)
class VocabShard:
    """How the rows of a head are split over a process group; operators take this rank's slice as their weight.

    The slices are in the order of the group's ranks. `even` makes the split used by Megatron, `gather` collects the sizes
    from the ranks.

    Raises:
        RuntimeError: No process group is initialised.
        ValueError: The number of sizes is not the number of ranks, a size is not positive, or this process is not in the
            group.
    """

    sizes: tuple[int, ...]
    """Number of rows of the head on each rank of the group."""
    group: ProcessGroup | None = None
    """The process group; None for the default group."""

    def __post_init__(self) -> None:
        ranks = _ranks(self.group)
        if len(self.sizes) != ranks:
            raise ValueError(f"vocab_parallel: {len(self.sizes)} sizes for a group of {ranks} ranks: pass one per rank")
        for rank, size in enumerate(self.sizes):
            if size <= 0:
                raise ValueError(
                    f"vocab_parallel: rank {rank} has {size} rows of the head: every rank needs at least one, so split "
                    "the vocabulary over fewer ranks"
                )

    @classmethod
    def even(cls, vocabulary: int, group: ProcessGroup | None = None) -> VocabShard:
        """Split V evenly; if that leaves a remainder, the first ranks get one row more, as in `torch.tensor_split`."""
        ranks = _ranks(group)
        return cls(tuple(vocabulary // ranks + (rank < vocabulary % ranks) for rank in range(ranks)), group)

    @classmethod
    def gather(cls, weight: Tensor, group: ProcessGroup | None = None) -> VocabShard:
        """Build the split from each rank's slice (V_k, D); a collective, which synchronises: call it once on every rank."""
        _ranks(group)
        sizes = gather(torch.tensor([len(weight)], device=weight.device), group)
        return cls(tuple(sizes.flatten().tolist()), group)

    @property
    def rank(self) -> int:
        """The rank of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def start(self) -> int:
        """The vocabulary index of the first row of this rank's slice."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        """The number of rows of this rank's slice."""
        return self.sizes[self.rank]

    @property
    def vocabulary(self) -> int:
        """V, the size of the whole vocabulary."""
        return sum(self.sizes)


def gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """All-gather x; returns (K, ...), in the order of the ranks."""
    x = x.contiguous()
    every = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(every.unbind()), x, group=group)
    return every


def agree(
    shard: VocabShard, operator: str, device: torch.device, facts: Mapping[str, Fact], *, most_rows: int = 0
) -> int:
    """Compare facts across the ranks and return the minimum of ``most_rows``: one small, synchronising collective.

    Without this check, ranks with different inputs would hang or sum unrelated rows.

    Args:
        shard: The split of the call.
        operator: The name of the operator.
        device: The device of its tensors.
        facts: At most 12, by name.
        most_rows: The largest chunk that this rank supports; it is smaller for larger slices.

    Raises:
        ValueError: The ranks disagree, and the message, the same on all ranks, says on what; or an error was raised on a
            rank in `failing_together`.
    """
    everything: dict[str, Fact] = {"the operator": operator, "the sizes of the slices": repr(shard.sizes), **facts}
    numbers = [_number(fact) for fact in everything.values()]
    mine = torch.tensor([_SOUND, most_rows, *numbers, *[0] * (_FACTS - len(numbers))]).to(device)
    for index, fact in enumerate(everything.values(), start=2):
        if isinstance(fact, Tensor):
            mine[index] = checksum(fact)
    states, most, *columns = gather(mine, shard.group).T.tolist()
    assert len(columns) == _FACTS
    if _FAILED in states:
        raise ValueError(f"{operator}: rank {states.index(_FAILED)} of vocab_parallel raised an error: see its message")
    for (name, fact), column in zip(everything.items(), columns, strict=False):
        if len(set(column)) > 1:
            values = f" ({', '.join(map(str, column))})" if isinstance(fact, int) else ""
            raise ValueError(
                f"{operator}: the ranks of vocab_parallel disagree on {name}{values}: everything but the slices of the head "
                "must be the same on every rank"
            )
    return int(min(most))


@contextmanager
def failing_together(shard: VocabShard | None, device: torch.device) -> Iterator[None]:
    """Report an exception raised here to the other ranks, whose next call of `agree` then raises instead of hanging."""
    try:
        yield
    except Exception:
        if shard is not None:
            gather(torch.tensor([_FAILED, *[0] * (_FACTS + 1)]).to(device), shard.group)
        raise


def agree_on_rows(
    shard: VocabShard,
    operator: str,
    hidden: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    facts: Mapping[str, Fact],
    *,
    most_rows: int = 0,
) -> int:
    """`agree` on the arguments that all operators share, for rows (N, D), and on further facts."""
    common: dict[str, Fact] = {
        "the number of rows": len(hidden),
        "the hidden size": hidden.shape[1],
        "the dtype": str(hidden.dtype),
        "temperature": temperature,
        "softcap": None if softcap is None else float(softcap),
    }
    return agree(shard, operator, hidden.device, common | dict(facts), most_rows=most_rows)


def checksum(x: Tensor) -> Tensor:
    """Return a checksum, () int64, that depends on the bits of a tensor and on their order."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    numbers = x.contiguous().view(bits).flatten().to(torch.int64) + 1
    odd = 2 * torch.arange(len(numbers), device=x.device) + 1
    return (numbers * odd).sum()


class Reduction:
    """All-reduces gradients in `statistics_dtype`, overlapping a chunk's communication with the next chunk's computation."""

    def __init__(self, shard: VocabShard) -> None:
        self._group = shard.group
        self._pending: list[tuple[dist.Work, Tensor, Tensor]] = []

    def room(self, into: Tensor) -> Tensor:
        """Return a buffer for this rank's part of a gradient: ``into`` itself if its dtype is wide enough for the sum."""
        dtype = statistics_dtype(into.dtype)
        return into if into.dtype == dtype else torch.empty_like(into, dtype=dtype)

    def begin(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Start summing (part, destination) pairs. Waits for the previous ones, so at most two chunks' buffers exist."""
        self.finish()
        for part, into in parts:
            work = dist.all_reduce(part, group=self._group, async_op=True)
            assert work is not None
            self._pending.append((work, part, into))

    def finish(self) -> None:
        """Wait for the sums and round them into their destinations."""
        for work, part, into in self._pending:
            work.wait()
            if part is not into:
                into.copy_(part)
        self._pending.clear()


def _ranks(group: ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "vocab_parallel: no process group is initialised: call torch.distributed.init_process_group first, or leave "
            "out vocab_parallel in a single process"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("vocab_parallel: this process is not in the group: pass a group that it belongs to")
    return dist.get_world_size(group)


def _number(fact: Fact) -> int:
    """Encode a fact that is not a tensor in 64 bits."""
    if isinstance(fact, str):
        return zlib.crc32(fact.encode())
    if isinstance(fact, float):
        return int.from_bytes(struct.pack("<d", fact), "little", signed=True)
    return 0 if fact is None or isinstance(fact, Tensor) else int(fact)
