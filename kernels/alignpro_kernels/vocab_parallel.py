"""How a head's vocabulary is split over the ranks of a process group, and what the ranks say to each other.

The output layer under tensor parallelism: rank k of K has a contiguous slice of the head's rows, and hidden states and
targets are the same on all ranks. `vocab_states` has the formulas that make one distribution of the slices'.
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
"""Something that must be the same on all ranks; of a tensor, its bits."""

_FACTS = 14  # that the ranks compare at once, so that those of any two operators are as many
_SOUND, _FAILED = 0, 1


@dataclass(frozen=True)
class VocabShard:
    """How the rows of a head are split over a process group; the weight that an operator gets is this rank's slice.

    The slices lie in the order of the group's ranks. `even` makes Megatron's, `gather` asks the ranks for theirs.

    Raises:
        RuntimeError: No process group is initialised.
        ValueError: There are not as many sizes as ranks, one is not positive, or this process is not in the group.
    """

    sizes: tuple[int, ...]
    """Rows of the head on each rank of the group."""
    group: ProcessGroup | None = None
    """None is the default group."""

    def __post_init__(self) -> None:
        ranks = _ranks(self.group)
        if len(self.sizes) != ranks:
            raise ValueError(f"vocab_parallel: {len(self.sizes)} sizes for a group of {ranks} ranks: give one a rank")
        for rank, size in enumerate(self.sizes):
            if size <= 0:
                raise ValueError(
                    f"vocab_parallel: rank {rank} has {size} rows of the head: every rank needs one at least, so split "
                    "the vocabulary over fewer ranks"
                )

    @classmethod
    def even(cls, vocabulary: int, group: ProcessGroup | None = None) -> VocabShard:
        """Slices of equal size; where the ranks do not divide V, the first have one row more, as `torch.tensor_split`."""
        ranks = _ranks(group)
        return cls(tuple(vocabulary // ranks + (rank < vocabulary % ranks) for rank in range(ranks)), group)

    @classmethod
    def gather(cls, weight: Tensor, group: ProcessGroup | None = None) -> VocabShard:
        """The slices (V_k, D) that the ranks have; all of them call it, once, since it waits for the others."""
        _ranks(group)
        sizes = gather(torch.tensor([len(weight)], device=weight.device), group)
        return cls(tuple(sizes.flatten().tolist()), group)

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def start(self) -> int:
        """The vocabulary index of the first row of this rank's slice."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        """Rows of this rank's slice."""
        return self.sizes[self.rank]

    @property
    def vocabulary(self) -> int:
        """V, of all slices together."""
        return sum(self.sizes)


def gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """(K, ...) of every rank's x, in the order of the ranks."""
    x = x.contiguous()
    every = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(every.unbind()), x, group=group)
    return every


def agree(
    shard: VocabShard, operator: str, device: torch.device, facts: Mapping[str, Fact], *, most_rows: int = 0
) -> int:
    """Compares facts over the ranks, and gives the least ``most_rows``: one small collective, which is waited for.

    Ranks with different rows would wait for each other for ever, or add up what does not belong together.

    Args:
        shard: Of the call.
        operator: Its name.
        device: Of its tensors.
        facts: By name, at most 12.
        most_rows: How many rows this rank would take at once; those with a larger slice take fewer.

    Raises:
        ValueError: The ranks disagree, and the message, the same on all, names on what; or one is in `failing_together`.
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
        raise ValueError(
            f"{operator}: rank {states.index(_FAILED)} of vocab_parallel raised an error: see what it says"
        )
    for (name, fact), column in zip(everything.items(), columns, strict=False):
        if len(set(column)) > 1:
            values = f" ({', '.join(map(str, column))})" if isinstance(fact, int) else ""
            raise ValueError(
                f"{operator}: the ranks of vocab_parallel disagree on {name}{values}: all but the slices of the head must "
                "be the same on every rank"
            )
    return int(min(most))


@contextmanager
def failing_together(shard: VocabShard | None, device: torch.device) -> Iterator[None]:
    """What is raised here on one rank only is told to the others, which `agree` next, instead of leaving them waiting."""
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
    """`agree` on what every operator is given of its rows, (N, D), and on more facts."""
    common: dict[str, Fact] = {
        "the number of rows": len(hidden),
        "the hidden size": hidden.shape[1],
        "the dtype": str(hidden.dtype),
        "temperature": temperature,
        "softcap": None if softcap is None else float(softcap),
    }
    return agree(shard, operator, hidden.device, common | dict(facts), most_rows=most_rows)


def checksum(x: Tensor) -> Tensor:
    """() int64, of the bits of a tensor in their order."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    numbers = x.contiguous().view(bits).flatten().to(torch.int64) + 1
    odd = 2 * torch.arange(len(numbers), device=x.device) + 1
    return (numbers * odd).sum()


class Reduction:
    """Sums gradients over the ranks, in `statistics_dtype`: those of a chunk while the next is computed."""

    def __init__(self, shard: VocabShard) -> None:
        self._group = shard.group
        self._pending: list[tuple[dist.Work, Tensor, Tensor]] = []

    def room(self, into: Tensor) -> Tensor:
        """Where this rank's part of a gradient goes: its place itself, where that is wide enough to add up in."""
        dtype = statistics_dtype(into.dtype)
        return into if into.dtype == dtype else torch.empty_like(into, dtype=dtype)

    def begin(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Sum parts, each with the place of the sum. Those before are waited for: one chunk's room is held, and its next."""
        self.finish()
        for part, into in parts:
            work = dist.all_reduce(part, group=self._group, async_op=True)
            assert work is not None
            self._pending.append((work, part, into))

    def finish(self) -> None:
        """Wait for the sums, and round them into their places."""
        for work, part, into in self._pending:
            work.wait()
            if part is not into:
                into.copy_(part)
        self._pending.clear()


def _ranks(group: ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "vocab_parallel: no process group is initialised: call torch.distributed.init_process_group first, or leave "
            "vocab_parallel out on a single process"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("vocab_parallel: this process is not in the group: give the one that its rank belongs to")
    return dist.get_world_size(group)


def _number(fact: Fact) -> int:
    """What stands for a fact that is not a tensor, in 64 bits."""
    if isinstance(fact, str):
        return zlib.crc32(fact.encode())
    if isinstance(fact, float):
        return int.from_bytes(struct.pack("<d", fact), "little", signed=True)
    return 0 if fact is None or isinstance(fact, Tensor) else int(fact)
