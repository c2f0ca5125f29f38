"""The specification of `varlen.VarlenKernels`, in plain PyTorch: sequence by sequence, on any device.

    z_ij = scale · q_i · k_j, with a soft-cap softcap · tanh(z_ij / softcap), over the keys j that query i sees
    lse_i = log Σ_j exp z_ij      P_ij = exp(z_ij − lse_i)      out_i = Σ_j P_ij v_j

The backward pass is that of FlashAttention (Dao et al., 2022, Appendix B.2), from the log-sum-exp and the output:

    δ_i = dout_i · out_i      dz_ij = P_ij (dout_i · v_j − δ_i)      dv_j = Σ_i P_ij dout_i

Scores and sums are float32, float64 for float64 inputs. Values are read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from alignpro_kernels.head import upcast
from alignpro_kernels.varlen import ScoreOptions, Varlen


class ReferenceKernels:
    """Plain PyTorch, for tests; used only if requested by name."""

    name = "reference"
    has_softcap = True

    def unavailable(self) -> str | None:
        """See `VarlenKernels.unavailable`."""
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenKernels.forward`; a query without keys gets 0 and −∞."""
        out = torch.zeros_like(query)
        lse = upcast(query).new_full(query.shape[:2], -torch.inf)  # (T, H)
        for rows, keys in _sequences(varlen):
            z, _ = _scores(query[rows], key[keys], varlen.causal, options)
            total = z.logsumexp(-1)  # (H, n)
            p = (z - total.masked_fill(total == -torch.inf, 0.0).unsqueeze(-1)).exp()
            v = _repeated(value[keys], query.shape[1])
            out[rows] = torch.einsum("hnm,mhd->nhd", p, v).to(query.dtype)
            lse[rows] = total.T
        return out, lse

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        varlen: Varlen,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `VarlenKernels.backward`."""
        dq, dk, dv = (upcast(torch.zeros_like(x)) for x in (query, key, value))
        delta = (upcast(gradient) * upcast(out)).sum(-1)  # (T, H)
        heads, groups = query.shape[1], query.shape[1] // key.shape[1]
        for rows, keys in _sequences(varlen):
            z, slope = _scores(query[rows], key[keys], varlen.causal, options)
            p = (z - lse[rows].T.unsqueeze(-1)).exp()  # (H, n, m)
            do = upcast(gradient[rows])
            dp = torch.einsum("nhd,mhd->hnm", do, _repeated(value[keys], heads))
            dz = p * (dp - delta[rows].T.unsqueeze(-1)) * slope * options.scale
            dq[rows] += torch.einsum("hnm,mhd->nhd", dz, _repeated(key[keys], heads))
            dk[keys] += _summed(torch.einsum("hnm,nhd->mhd", dz, upcast(query[rows])), groups)
            dv[keys] += _summed(torch.einsum("hnm,nhd->mhd", p, do), groups)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _sequences(varlen: Varlen) -> Iterator[tuple[slice, slice]]:
    """The rows of the queries and of the keys of each sequence."""
    queries, keys = varlen.cu_queries.tolist(), varlen.cu_keys.tolist()
    for s in range(len(queries) - 1):
        end = keys[s + 1] if varlen.key_lengths is None else keys[s] + int(varlen.key_lengths[s])
        yield slice(queries[s], queries[s + 1]), slice(keys[s], end)


def _scores(query: Tensor, key: Tensor, causal: bool, options: ScoreOptions) -> tuple[Tensor, Tensor | float]:
    """Scores of queries (n, H, D) and keys (m, H', D), (H, n, m), −∞ where a key is not seen, and the soft-cap's slope."""
    n, m = len(query), len(key)
    z = options.scale * torch.einsum("nhd,mhd->hnm", upcast(query), _repeated(key, query.shape[1]))
    slope: Tensor | float = 1.0
    if options.softcap is not None:
        capped = torch.tanh(z / options.softcap)
        z, slope = options.softcap * capped, 1 - capped.square()
    if causal:
        distance = torch.arange(m - n, m, device=z.device)[:, None] - torch.arange(m, device=z.device)
        seen = distance >= 0 if options.window is None else (distance >= 0) & (distance < options.window)
        z = z.masked_fill(~seen, -torch.inf)
    return z, slope


def _repeated(x: Tensor, heads: int) -> Tensor:
    """(m, H', D) → (m, H, D): each key head for all query heads that read it."""
    return upcast(x).repeat_interleave(heads // x.shape[1], dim=1)


def _summed(x: Tensor, groups: int) -> Tensor:
    """(m, H, D) → (m, H', D): the inverse of `_repeated`, for gradients."""
    return x.unflatten(1, (-1, groups)).sum(2)
