"""The floor: only the matrix products of a case, into preallocated memory, with the fastest chunk size."""

from __future__ import annotations

import torch

from benchmarks.clock import Clock
from benchmarks.kernels.cases import Case
from benchmarks.kernels.problem import Problem

CHUNKS = {"cpu": (128, 512), "cuda": (1024, 2048, 4096, 8192)}
LOGITS_BYTES = {"cpu": 2 << 30, "cuda": 24 << 30}  # maximum size of the (rows, V) buffer


class Floor:
    """The matrix products of a case, executed by `run` in chunks of ``chunk`` rows.

    The chunk size is the fastest of the candidates (including all rows at once) that fit into memory.
    """

    def __init__(self, case: Case, problem: Problem, clock: Clock) -> None:
        self._case = case
        self._hidden = problem.hidden.detach()
        self._weight = problem.weight.detach()
        self._ref_hidden = problem.ref_hidden
        self._ref_weight = self._weight if problem.ref_weight is None else problem.ref_weight
        hidden, weight = self._hidden, self._weight
        self._d_hidden = torch.empty_like(hidden) if "d_hidden" in case.products else None  # (N, D)
        self._d_weight = torch.empty_like(weight) if "d_weight" in case.products else None  # (V, D)
        self.candidates: dict[int, float] = {}
        """Rows per chunk → seconds in the trial."""
        for chunk in self._sizes(problem.rows):
            self._use(chunk)
            clock.time(self.run, calls=1)  # warm-up: the first call of a size plans and allocates
            self.candidates[chunk] = clock.time(self.run, calls=1).total
        self._use(min(self.candidates, key=self.candidates.__getitem__))

    @property
    def chunk(self) -> int:
        """Rows per chunk."""
        return self._logits.shape[0]

    def run(self) -> None:
        """Compute all products once."""
        for start in range(0, len(self._hidden), self.chunk):
            self._run_chunk(start, min(start + self.chunk, len(self._hidden)))

    def _run_chunk(self, start: int, stop: int) -> None:
        hidden = self._hidden[start:stop]
        logits = self._logits[: stop - start]  # (C, V); also used in place of their gradient
        for product in self._case.products:
            if product == "logits":
                torch.mm(hidden, self._weight.T, out=logits)
            elif product == "ref_logits":
                assert self._ref_hidden is not None
                torch.mm(self._ref_hidden[start:stop], self._ref_weight.T, out=logits)
            elif product == "d_hidden":
                assert self._d_hidden is not None
                torch.mm(logits, self._weight, out=self._d_hidden[start:stop])
            elif start == 0:
                assert self._d_weight is not None
                torch.mm(logits.T, hidden, out=self._d_weight)
            else:
                assert self._d_weight is not None
                self._d_weight.addmm_(logits.T, hidden)

    def _sizes(self, rows: int) -> list[int]:
        device = self._weight.device.type
        sizes = [size for size in CHUNKS[device] if size < rows] + [rows]
        row_bytes = self._weight.shape[0] * self._weight.element_size()
        return [size for size in sizes if size * row_bytes <= LOGITS_BYTES[device]] or sizes[:1]

    def _use(self, chunk: int) -> None:
        self._logits = torch.empty(0)  # free the old buffer before allocating the new one
        self._logits = self._weight.new_empty(chunk, self._weight.shape[0])


def flops(case: Case, problem: Problem) -> float:
    """Return the floating-point operations of a case's products, 2NDV each."""
    vocabulary, hidden = problem.weight.shape
    return 2.0 * problem.rows * hidden * vocabulary * len(case.products)
