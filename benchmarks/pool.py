"""The size of the KV pool of a benchmark on a GPU: what its sequences need, but no more than the card has left."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.workload import ModelShape, Workload

PAGE_TOKENS = 16
"""Tokens per page, of which each sequence leaves up to all but one unused."""
RESERVE_SHARE = 0.1
"""Share of the card left to activations, captured graphs, workspaces of libraries, and fragmentation."""


@dataclass(frozen=True)
class Pool:
    """A size, and how it came about; all in bytes."""

    needed: int
    """Keys and values of all sequences at their full lengths, shared tokens once."""
    free: int
    """Memory that the card has left for it, without the reserve."""
    resident: int
    """Memory that is planned for other things and not yet taken."""
    reserve: int

    @property
    def bytes(self) -> int:
        """The size of the pool.

        Raises:
            MemoryError: Nothing is left.
        """
        left = self.free - self.resident - self.reserve
        if left <= 0:
            raise MemoryError(f"no memory is left for the KV pool: {self}")
        return min(self.needed, left)

    def __str__(self) -> str:
        """The arithmetic, in GB."""
        needed, free, resident, reserve = (x / 1e9 for x in (self.needed, self.free, self.resident, self.reserve))
        return f"needed {needed:.1f} GB; free {free:.1f} − planned {resident:.1f} − reserve {reserve:.1f} GB"


def fit(needed: int, *, free: int, total: int, resident: int = 0) -> Pool:
    """Return the pool of a card with ``total`` bytes, of which ``free`` are free and ``resident`` will be taken."""
    return Pool(needed, free, resident, int(RESERVE_SHARE * total))


def needed_bytes(workload: Workload, itemsize: int, *, chain: bool = True) -> int:
    """Return the bytes of keys and values of a step, or of one response to each prompt, at most."""
    w = workload
    if not chain:
        return w.prompts * _rounded(w.prompt + w.response) * kv_bytes(w.target, itemsize)
    rewrites = w.prompts * w.K
    policy = _rounded(w.meta_prompt) + w.prompts * _rounded(w.prompt) + rewrites * _rounded(w.rewrite)
    target = _rounded(w.before) + rewrites * _rounded(w.rewrite + w.after) + w.chains * _rounded(w.response)
    # The smaller model's keys and values fill pages of the same bytes, of which they may leave a part unused.
    return policy * 2 * kv_bytes(w.prompter, itemsize) + target * kv_bytes(w.target, itemsize)


def kv_bytes(shape: ModelShape, itemsize: int) -> int:
    """Return the bytes of one token's keys and values."""
    return 2 * shape.layers * shape.kv_heads * shape.head_width * itemsize


def _rounded(tokens: int) -> int:
    """Round up to whole pages, and one more for a token that a copied page holds for each of two sequences."""
    return (-(-tokens // PAGE_TOKENS) + 1) * PAGE_TOKENS if tokens else 0
