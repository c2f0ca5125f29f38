"""Packed sequences that share their prompts as variable-length calls of attention, without padding.

    m m | x₁ x₁ x₁ | a a a | b b | x₂ x₂ | c c c        a, b continue x₁; c continues x₂; all prompts continue m

Each token attends causally to its own segment, in one call over all segments. The continuations of a prompt attend to all
of its tokens, in a second call in which each prompt's continuations are one sequence of queries; and what follows the
shared prefix attends to all of it, in a third. No call repeats a key. Their results are merged by
`alignpro_kernels.merged_attention` (as in PrefixGrouper, Liu et al., 2025, whose two calls are merged likewise).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from alignpro_kernels.merged_attention import ALL, Part
from alignpro_kernels.varlen import Varlen


@dataclass(frozen=True)
class Segments:
    """The lengths of the segments of packed sequences, on the host."""

    prefix: int
    """Length of the prefix that all prompts share; may be 0."""
    prompts: tuple[int, ...]
    """Lengths of the prompts without the shared prefix, at least 1 each."""
    continuations: tuple[tuple[int, ...], ...]
    """For each prompt, the lengths of its continuations; may be 0."""

    @property
    def longest(self) -> int:
        """The length of the longest sequence, with its prompt and the shared prefix."""
        ends = zip(self.prompts, self.continuations, strict=True)
        return self.prefix + max(prompt + max(own, default=0) for prompt, own in ends)

    @property
    def are_shared(self) -> bool:
        """Whether a segment continues another one."""
        return self.prefix > 0 or any(map(any, self.continuations))

    def parts(self, device: torch.device) -> list[Part]:
        """The calls for one row that holds all segments in order."""
        own = [self.prefix]
        queries: list[int] = []
        keys: list[int] = []
        for start, prompt, continuations in self._places():
            own += [prompt, *continuations]
            if behind := sum(continuations):
                keys += range(start, start + prompt)
                queries += range(start + prompt, start + prompt + behind)
        parts = [Part(ALL, ALL, _varlen(own, own, device, causal=True))]
        total = sum(own)
        if queries:
            at, of = _index(queries, device), _index(keys, device)
            parts.append(Part(at, of, _varlen(*self._continued(), device)))
        if self.prefix:
            after = _varlen([total - self.prefix], [self.prefix], device)
            parts.append(Part(slice(self.prefix, None), slice(self.prefix), after))
        return parts

    def continuation_parts(self, device: torch.device) -> list[Part]:
        """The calls for continuations alone, whose keys are those of all prompts, one after the other, then their own.

        There is no shared prefix.
        """
        prompts = sum(self.prompts)
        own = [length for lengths in self.continuations for length in lengths]
        parts = [Part(ALL, slice(prompts, None), _varlen(own, own, device, causal=True))]
        if not any(own):
            return parts
        starts = accumulate(self.prompts, initial=0)
        keys: list[int] = []
        for start, length, continuations in zip(starts, self.prompts, self.continuations, strict=False):
            if any(continuations):
                keys += range(start, start + length)
        of = slice(prompts) if len(keys) == prompts else _index(keys, device)
        return [*parts, Part(ALL, of, _varlen(*self._continued(), device))]

    def _places(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """For each prompt, its first row, its length and those of its continuations."""
        start = self.prefix
        for prompt, continuations in zip(self.prompts, self.continuations, strict=True):
            yield start, prompt, continuations
            start += prompt + sum(continuations)

    def _continued(self) -> tuple[list[int], list[int]]:
        """For each prompt that is continued, the length of all its continuations together, and its own."""
        pairs = [(sum(own), prompt) for prompt, own in zip(self.prompts, self.continuations, strict=True) if any(own)]
        return [queries for queries, _ in pairs], [keys for _, keys in pairs]


def _varlen(queries: Sequence[int], keys: Sequence[int], device: torch.device, *, causal: bool = False) -> Varlen:
    """A call of sequences of these lengths, empty ones left out."""
    pairs = [(q, k) for q, k in zip(queries, keys, strict=True) if q]
    lengths = [q for q, _ in pairs], [k for _, k in pairs]
    cu_queries, cu_keys = (torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in lengths)
    return Varlen(cu_queries, cu_keys, max(lengths[0], default=0), max(lengths[1], default=0), causal)


def _index(rows: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)
