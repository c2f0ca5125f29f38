"""Ranks as threads of one process, so that 64 of them cost no sockets: each has a group of its own, and meets the others.

The group is a process group of torch, so that `Ranks` and everything that calls `torch.distributed` runs unchanged. Unlike
gloo and NCCL it compares what the ranks issue: one that makes another collective than the others, or with another shape,
dtype or operation, is an error on all of them at once. The backend ``fake`` of torch will not do: it returns what was in
memory, and the number of passes, prompts and errors of the other ranks must be right. torch's own group of threads is used
for its thread-local registry of groups; it compares nothing and waits for a lost rank for ever.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.testing._internal.distributed import multi_threaded_pg

from alignpro.distributed.ranks import Ranks

T = TypeVar("T")

TIMEOUT = 60.0
"""Seconds that a rank waits for the others."""


@dataclass(frozen=True)
class Call:
    """A collective that a rank has issued."""

    phase: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Meeting:
    """Where the threads of a group exchange values: no one leaves before all have come.

    Between two meetings the threads run one after another, since 64 that compete for the interpreter take several times as long.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._condition = threading.Condition()
        self.turn = self._condition
        """Held by the thread that runs; a thread that waits for others gives it up."""
        self._given: dict[int, tuple[Call, Tensor]] = {}
        self._round, self._taken = 0, [(Call("", "", (), torch.float32), torch.empty(0))]
        self._lost: list[int] = []

    def exchange(self, rank: int, call: Call, value: Tensor) -> list[Tensor]:
        """Return the values of all ranks, which must have made the same call."""
        with self._condition:
            current = self._round
            self._given[rank] = (call, value)
            if len(self._given) == self.size:
                self._taken, self._given = [self._given[each] for each in range(self.size)], {}
                self._round += 1
                self._condition.notify_all()
            while self._round == current:
                missing = [each for each in range(self.size) if each not in self._given]
                if self._lost or not self._condition.wait(TIMEOUT):
                    raise RuntimeError(f"[like gloo] {call}: ranks {self._lost or missing} have not come")
            calls, values = zip(*self._taken, strict=True)
        different = {each: other for each, other in enumerate(calls) if other != call}
        assert not different, f"rank {rank} makes {call}, and others {different}"
        return list(values)

    def leave(self, rank: int) -> None:
        """Say that a rank comes no more."""
        with self._condition:
            self._lost.append(rank)
            self._condition.notify_all()


class ThreadGroup(dist.ProcessGroup):
    """The group as one rank sees it; it records what that rank issues."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size)
        self._rank, self._size, self._meeting = rank, size, meeting
        self.calls: list[Call] = []
        self.phase: Callable[[], str] = lambda: ""

    def _exchange(self, kind: str, value: Tensor) -> list[Tensor]:
        call = Call(self.phase(), kind, tuple(value.shape), value.dtype)
        self.calls.append(call)
        return self._meeting.exchange(self._rank, call, value.detach().clone())

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: object = None) -> dist.Work:
        for output, value in zip(outputs[0], self._exchange("all_gather", inputs[0]), strict=True):
            output.copy_(value)
        return _done()

    def all_gather_single(self, output: Tensor, value: Tensor, options: object = None) -> dist.Work:
        output.copy_(torch.cat(self._exchange("all_gather_into_tensor", value)))
        return _done()

    _allgather_base = all_gather_single  # its name before torch 2.13

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:
        operation: str = options.reduceOp.op.name
        values = torch.stack(self._exchange(f"all_reduce {operation}", tensors[0]))
        tensors[0].detach().copy_({"SUM": values.sum, "MAX": values.amax}[operation](0))
        return _done()

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:  # noqa: N802 - its name in torch
        return "threads"

    @property
    def group_name(self) -> str:
        return "threads"


def _done() -> dist.Work:
    future: Future[None] = Future()
    future.set_result(None)
    work: dist.Work = torch._C._distributed_c10d._create_work_from_future(future)
    return work


@dataclass
class Outcome:
    """How a rank's work ended."""

    result: Any = None
    error: BaseException | None = None
    calls: tuple[Call, ...] = ()


def run_ranks(size: int, work: Callable[[Ranks], T]) -> list[Outcome]:
    """Run ``work`` on some ranks at once; a rank that ends by an error is lost to the others, as with processes."""
    meeting = Meeting(size)
    outcomes = [Outcome() for _ in range(size)]

    def rank_thread(rank: int) -> None:
        outcome = outcomes[rank]
        with meeting.turn, _joined(rank, size, meeting) as group:
            try:
                ranks = Ranks(group)
                group.phase = lambda: ranks.phase
                outcome.result = work(ranks)
            except BaseException as error:
                outcome.error = error
            outcome.calls = tuple(group.calls)
        meeting.leave(rank)

    with _registry_of_each_thread():
        threads = [threading.Thread(target=rank_thread, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return outcomes


def results(outcomes: list[Outcome]) -> list[Any]:
    """Return what the ranks returned; all must have succeeded, with the same collectives."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    assert len({outcome.calls for outcome in outcomes}) == 1
    return [outcome.result for outcome in outcomes]


@contextmanager
def _registry_of_each_thread() -> Iterator[None]:
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode
    hook = sys.excepthook  # joining a group replaces it
    isolate(True)
    multi_threaded_pg._install_threaded_pg()
    try:
        yield
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        isolate(False)
        sys.excepthook = hook


@contextmanager
def _joined(rank: int, size: int, meeting: Meeting) -> Iterator[ThreadGroup]:
    """Register this thread's group as its default group."""
    made: list[ThreadGroup] = []

    def create(store: object, rank: int, size: int, timeout: timedelta) -> ThreadGroup:
        made.append(ThreadGroup(rank, size, meeting))
        return made[0]

    name = f"threads{id(meeting)}_{rank}"
    dist.Backend.register_backend(name, create, devices=["cpu"])
    dist.init_process_group(name, rank=rank, world_size=size, store=dist.HashStore())
    try:
        yield made[0]
    finally:
        dist.destroy_process_group()
