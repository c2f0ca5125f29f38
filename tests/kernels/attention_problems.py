"""Attention problems, with their results in float64 and by plain PyTorch in their own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from alignpro_kernels import PagedKeys, paged_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("whole", "head-major", "arena")


@dataclass
class Problem:
    """Sequences with their keys and values as plain tensors and in pages, whose unused slots are NaN."""

    query: Tensor  # (T, H, D)
    counts: list[int]  # queries of each sequence
    positions: Tensor  # (T,)
    keys: list[Tensor]  # S of (length, kv_heads, D)
    values: list[Tensor]
    starts: list[int]
    page_size: int
    layout: str
    scale: float
    softcap: float | None
    window: int | None
    pages: Tensor
    page_table: Tensor

    def indices(self, device: str = "cpu") -> dict[str, Tensor]:
        """Return the fields of `PagedKeys`."""
        fields = {
            "cu_queries": torch.tensor([0, *self.counts]).cumsum(0).int(),
            "page_table": self.page_table,
            "key_lengths": torch.tensor([len(x) for x in self.keys], dtype=torch.int32),
            "query_positions": self.positions,
            "key_starts": torch.tensor(self.starts, dtype=torch.int32),
        }
        return {name: x.to(device) for name, x in fields.items()}

    def arguments(self, device: str = "cpu") -> tuple[Tensor, Tensor, PagedKeys]:
        """Return the positional arguments of `paged_attention`."""
        return self.query.to(device), self.pages.to(device), PagedKeys(**self.indices(device))

    def run(self, backend: str = "cpp") -> tuple[Tensor, Tensor]:
        return paged_attention(
            *self.arguments(), scale=self.scale, softcap=self.softcap, window=self.window, backend=backend
        )

    def exact(self) -> tuple[Tensor, Tensor]:
        return replace(self, query=self.query.double(), pages=self.pages.double()).run("reference")

    def sequences(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield for each sequence queries (H, n, D), keys and values (H, length, D), and the mask (n, length)."""
        group = self.query.shape[1] // self.keys[0].shape[1]
        done = 0
        for count, keys, values, start in zip(self.counts, self.keys, self.values, self.starts, strict=True):
            query, positions = self.query[done : done + count], self.positions[done : done + count]
            done += count
            distance = positions[:, None] - (start + torch.arange(len(keys)))
            seen = (distance >= 0) & (distance < (self.window or 1 << 30))
            states = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (keys, values))
            yield query.transpose(0, 1), *states, seen


def plain(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute attention as a user of PyTorch would, sequence by sequence in a dtype; the lse in float32 or float64."""
    outs, lses = [], []
    for query, keys, values, seen in problem.sequences():
        q, k, v = query.to(dtype), keys.to(dtype), values.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        z = problem.scale * (q.to(wide) @ k.to(wide).mT)
        if problem.softcap is not None:
            z = problem.softcap * torch.tanh(z / problem.softcap)
        z = z.masked_fill(~seen, -torch.inf)
        if problem.softcap is None:
            out = functional.scaled_dot_product_attention(q[None], k[None], v[None], seen, scale=problem.scale)[0]
        else:
            out = z.softmax(-1).to(dtype) @ v
        outs.append(out.nan_to_num(0.0).masked_fill(~seen.any(-1, keepdim=True), 0.0).transpose(0, 1))
        lses.append(z.logsumexp(-1).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def in_pages(keys: list[Tensor], values: list[Tensor], page_size: int, layout: str) -> tuple[Tensor, Tensor]:
    """Return pages and page_table: pages in random order, with out-of-range entries beyond a sequence's keys."""
    kv_heads, dim = keys[0].shape[1:]
    dtype = keys[0].dtype
    needed = [-(-len(x) // page_size) for x in keys]
    n_pages = sum(needed) + 2
    if layout == "whole":
        pages = torch.full((n_pages, 2, page_size, kv_heads, dim), torch.nan, dtype=dtype)
    elif layout == "head-major":
        pages = torch.full((n_pages, kv_heads, 2, page_size, dim), torch.nan, dtype=dtype).permute(0, 2, 3, 1, 4)
    else:  # a layer at byte 12 of larger pages; they are filled with 1 bits, which are NaN in every dtype
        count = 2 * page_size * kv_heads * dim
        arena = torch.full((n_pages, (count + 8) * dtype.itemsize + 12), 255, dtype=torch.uint8)
        arena = arena[:, : arena.shape[1] // dtype.itemsize * dtype.itemsize].contiguous()
        layer = arena[:, 12 : 12 + count * dtype.itemsize]
        pages = layer.view(dtype).unflatten(1, (2, page_size, kv_heads, dim))
    order = torch.randperm(n_pages)
    table = torch.full((len(keys), max(needed) + 1), -1, dtype=torch.int32)
    for s, (k, v) in enumerate(zip(keys, values, strict=True)):
        table[s, : needed[s]] = order[sum(needed[:s]) : sum(needed[: s + 1])].int()
        for j in range(len(k)):
            pages[int(table[s, j // page_size]), 0, j % page_size] = k[j]
            pages[int(table[s, j // page_size]), 1, j % page_size] = v[j]
    return pages, table


def new_problem(
    counts: list[int],
    lengths: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    page_size: int = 16,
    layout: str = "whole",
    softcap: float | None = None,
    window: int | None = None,
    loudness: float = 1.0,
) -> Problem:
    keys = [torch.randn(n, kv_heads, dim).to(dtype) for n in lengths]
    values = [torch.randn(n, kv_heads, dim).to(dtype) for n in lengths]
    starts = torch.randint(0, 9, (len(lengths),)).tolist()
    positions = [  # from before the first key to after the last
        torch.randint(start - 2, start + length + 3, (count,))
        for count, length, start in zip(counts, lengths, starts, strict=True)
    ]
    both = (loudness * torch.randn(sum(counts), heads, dim + 3)).to(dtype)  # strided rows
    pages, table = in_pages(keys, values, page_size, layout)
    return Problem(
        both[..., :dim],
        counts,
        torch.cat(positions).int(),
        keys,
        values,
        starts,
        page_size,
        layout,
        dim**-0.5,
        softcap,
        window,
        pages,
        table,
    )


def part(problem: Problem, sequence: int, rows: slice) -> Problem:
    """Return one sequence of a problem with some of its queries, in separate pages."""
    first = sum(problem.counts[:sequence])
    chosen = slice(first + rows.start, first + rows.stop)
    keys, values = problem.keys[sequence : sequence + 1], problem.values[sequence : sequence + 1]
    pages, table = in_pages(keys, values, problem.page_size, problem.layout)
    return replace(
        problem,
        query=problem.query[chosen],
        counts=[rows.stop - rows.start],
        positions=problem.positions[chosen],
        keys=keys,
        values=values,
        starts=problem.starts[sequence : sequence + 1],
        pages=pages,
        page_table=table,
    )


def cascade(shared: int, suffixes: list[int], dtype: torch.dtype = torch.float32) -> tuple[Problem, Problem, Problem]:
    """Return queries over the keys that all of them share, over a suffix each, and over both as whole sequences."""
    count, ends = len(suffixes), torch.tensor([shared + n for n in suffixes], dtype=torch.int32)
    node = replace(new_problem([count], [shared], dtype=dtype), starts=[0], positions=ends)
    own = new_problem([1] * count, suffixes, dtype=dtype)
    own = replace(own, query=node.query, starts=[shared] * count, positions=ends)
    keys = [torch.cat([node.keys[0], k]) for k in own.keys]
    values = [torch.cat([node.values[0], v]) for v in own.values]
    pages, table = in_pages(keys, values, 16, "whole")
    return node, own, replace(own, keys=keys, values=values, starts=[0] * count, pages=pages, page_table=table)


def check_empty_inputs(backend: str) -> None:
    """Check that without queries, and without keys, the results are empty."""
    pages = torch.full((1, 2, 4, 2, 8), torch.nan)
    none = torch.zeros(0, dtype=torch.int32)
    zero, table = torch.zeros(1, dtype=torch.int32), torch.zeros(0, 3, dtype=torch.int32)
    keys = PagedKeys(zero, table, none, none, none)
    out, lse = paged_attention(torch.zeros(0, 4, 8), pages, keys, scale=1.0, backend=backend)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    bounds, table = torch.tensor([0, 2, 2], dtype=torch.int32), torch.zeros(2, 0, dtype=torch.int32)
    zeros = torch.zeros(2, dtype=torch.int32)
    keys = PagedKeys(bounds, table, zeros, zeros, zeros)
    out, lse = paged_attention(torch.ones(2, 4, 8), pages, keys, scale=1.0, backend=backend)
    assert torch.equal(out, torch.zeros(2, 4, 8))
    assert torch.equal(lse, torch.full((2, 4), -torch.inf))


def assert_as_exact_as_plain(problem: Problem, out: Tensor, lse: Tensor) -> None:
    exact_out, exact_lse = problem.exact()
    plain_out, plain_lse = plain(problem, problem.query.dtype)
    assert out.dtype == problem.query.dtype and lse.dtype == torch.float32
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    assert bool((out[lse == -torch.inf] == 0).all())
    for got, baseline, exact in ((out, plain_out, exact_out), (lse, plain_lse, exact_lse)):
        finite = torch.isfinite(exact)
        error, allowed = ((x.double() - exact)[finite].abs().amax() if finite.any() else 0.0 for x in (got, baseline))
        assert error <= 1.5 * allowed + 1e-6
