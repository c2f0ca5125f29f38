"""The chunk loop shared by all fast backends: chunks of rows, coefficients, accumulators, autograd.

The logits of all rows never exist at once. Each chunk's logits are computed, reduced to statistics, turned into their
gradient in place and multiplied out before the next chunk starts. Accumulators over chunks are float32 (float64 for
float64 inputs): a sum in bfloat16 would lose a chunk's contribution once the sum has grown.

`policy_loss` computes gradients in the forward pass, so that logits are computed only once: 6 NDV operations with a
trained head, 4 with a frozen one, 2 more with a KL. `linear_logprob` saves only its inputs; its backward pass recomputes
the logits of those rows whose gradient is not zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from alignpro_kernels.autograd import REFERENCE, differentiable_once, loss_with_gradients, without_autocast
from alignpro_kernels.coefficients import evaluate
from alignpro_kernels.head import Head, HeadGradients, Rows, RowStats, Upstream, stats_dtype
from alignpro_kernels.types import Coefficients, PolicyLossOutput, SampleOutput, TokenStats

_ROW_MULTIPLE = 64  # if there are several chunks, their sizes are multiples of this, for whole tiles


@dataclass(frozen=True)
class Call:
    """The arguments of an operator, with N rows left after masking."""

    head: Head
    rows: Rows

    def variables(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that may require a gradient, in the order of `_GradientAccumulator.finish`."""
        return self.rows.hidden, self.head.weight, self.head.bias, self.rows.lora_hidden, self.head.lora_b

    def detach(self) -> Call:
        """Return the same call without autograd history; a weight shared with the reference stays shared."""

        def constant(x: Any) -> Any:
            return (x.detach() if x.requires_grad else x).contiguous() if isinstance(x, Tensor) else x

        head = Head(*map(constant, _without_shared(self.head)))
        rows = Rows(*map(constant, self.rows))
        if isinstance(rows.temperature, Tensor):
            rows = rows._replace(temperature=rows.temperature.to(stats_dtype(rows.hidden.dtype)))
        return Call(head._replace(ref_weight=head.weight) if self.head.shared else head, rows)


def policy_loss(
    backend: ModuleType, call: Call, coefficients: Coefficients, *, entropy: bool, positions: Tensor | None
) -> PolicyLossOutput:
    """See `alignpro_kernels.policy_loss`; ``positions`` (N,) are those of the rows in the input, None for 0…N−1."""
    variables = call.variables()
    needs_grad = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in variables]
    with torch.no_grad():
        call = call.detach()
        count, device = len(call.rows.hidden), call.rows.hidden.device
        if positions is None:
            positions = torch.arange(count, device=device)
        total = torch.zeros((), dtype=stats_dtype(call.rows.hidden.dtype), device=device)
        max_rows = backend.max_chunk_rows(call.head, call.rows.hidden.dtype)
        accumulator = _GradientAccumulator(call, needs_grad, backend, max_rows) if any(needs_grad) else None
        parts: list[TokenStats] = []
        for chunk in _chunks(count, max_rows, 0 if accumulator is None else accumulator.first_chunk_rows):
            rows = call.rows.select(chunk)
            memory = {} if accumulator is None else accumulator.memory(chunk)
            save = accumulator is not None
            chunk_stats, saved = backend.forward(call.head, rows, entropy=entropy, save_logits=save, **memory)
            parts.append(TokenStats(chunk_stats.logprob, chunk_stats.entropy, chunk_stats.kl))
            loss, derivatives = evaluate(coefficients, parts[-1], positions[chunk])
            total += loss
            if accumulator is not None:
                accumulator.add(
                    chunk, rows, saved, chunk_stats, Upstream(_active_rows(derivatives, device), *derivatives)
                )
            del saved  # free it before computing the next chunk's logits
    stats = _concatenate(parts, call.rows.hidden, entropy=entropy, kl=call.head.ref_weight is not None)
    if accumulator is None:
        return PolicyLossOutput(total, *stats)
    return PolicyLossOutput(loss_with_gradients(total, accumulator.finish(), variables), *stats)


def linear_logprob(backend: ModuleType, call: Call, *, entropy: bool) -> TokenStats:
    """See `alignpro_kernels.linear_logprob`."""
    logprob, h, kl = _LinearLogprob.apply(backend, call, entropy, *call.variables())
    return TokenStats(logprob, h if entropy else None, kl if call.head.ref_weight is not None else None)


def linear_sample(backend: ModuleType, call: Call, seeds: Tensor) -> SampleOutput:
    """See `alignpro_kernels.linear_sample`. No logits are kept, so the rows are not split into chunks."""
    if not len(seeds):
        none = seeds.new_empty(0, dtype=stats_dtype(call.rows.hidden.dtype))
        return SampleOutput(seeds, none, none)
    call = call.detach()
    sampled: SampleOutput = backend.sample(call.head, call.rows, seeds.contiguous())
    return sampled


class _GradientAccumulator:
    """Accumulates the gradients of a call, chunk by chunk."""

    def __init__(self, call: Call, needs_grad: Sequence[bool], backend: ModuleType, max_rows: int) -> None:
        def like(index: int, dtype: torch.dtype | None = None) -> Tensor | None:
            x = call.variables()[index]
            return torch.empty_like(x, dtype=dtype) if needs_grad[index] and x is not None else None

        dtype = stats_dtype(call.rows.hidden.dtype)
        self._call, self._backend = call, backend
        self._hidden, self._lora_hidden = like(0), like(3)
        self._weight, self._bias, self._lora_b = like(1, dtype), like(2, dtype), like(4, dtype)
        self._written = False
        self.first_chunk_rows = 0
        """How many rows of logits are stored in the memory of the weight's gradient before it is first written; may be 0."""
        if self._weight is not None:
            rows = backend.logits_buffer_rows(call.head)
            if rows and rows >= min(len(call.rows.hidden), max_rows + 1):
                self._weight, self.first_chunk_rows = backend.empty_weight_gradient(call.head), rows

    def memory(self, chunk: slice) -> dict[str, Tensor | None]:
        """Return an option of ``forward``: if this is the first chunk and may use it, the weight's gradient for the logits."""
        return {"logits_buffer": self._weight} if self.first_chunk_rows and chunk.start == 0 else {}

    def add(self, chunk: slice, rows: Rows, saved: Any, stats: RowStats, upstream: Upstream) -> None:
        """Add a chunk's gradient; there may be no active row."""
        into = HeadGradients(
            hidden=None if self._hidden is None else self._hidden[chunk],
            lora_hidden=None if self._lora_hidden is None else self._lora_hidden[chunk],
            weight=self._weight,
            bias=self._bias,
            lora_b=self._lora_b,
            accumulate=self._written,
        )
        if upstream.active is not None and not len(upstream.active):
            for x in (into.hidden, into.lora_hidden):
                if x is not None:
                    x.zero_()
        else:
            self._backend.backward(self._call.head, rows, saved, stats, upstream, into)
            self._written = True

    def finish(self) -> list[Tensor | None]:
        """Return the gradients in their variables' dtypes, in the order of `Call.variables`."""
        weight, bias, lora_b = self._weight, self._bias, self._lora_b
        if not self._written:
            for x in (weight, bias, lora_b):
                if x is not None:
                    x.zero_()
        head = self._call.head
        self._weight = self._bias = self._lora_b = None  # so that each wide accumulator is freed once it is rounded
        rounded = [
            x if x is None or like is None else x.to(like.dtype)
            for x, like in ((weight, head.weight), (bias, head.bias), (lora_b, head.lora_b))
        ]
        return [self._hidden, rounded[0], rounded[1], self._lora_hidden, rounded[2]]


class _LinearLogprob(torch.autograd.Function):
    """Statistics of all rows; the backward pass recomputes the logits of the rows that have a gradient."""

    @staticmethod
    def forward(
        ctx: Any, backend: ModuleType, call: Call, entropy: bool, *variables: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        call = call.detach()
        parts = []
        hidden = call.rows.hidden
        for chunk in _chunks(len(hidden), backend.max_chunk_rows(call.head, hidden.dtype)):
            chunk_stats, _ = backend.forward(call.head, call.rows.select(chunk), entropy=entropy, save_logits=False)
            parts.append(TokenStats(chunk_stats.logprob, chunk_stats.entropy, chunk_stats.kl))
        stats = _concatenate(parts, hidden, entropy=entropy, kl=call.head.ref_weight is not None)
        ctx.backend, ctx.entropy = backend, entropy
        _save(ctx, call)
        ctx.set_materialize_grads(False)
        return stats.logprob, stats.entropy, stats.kl

    @staticmethod
    @differentiable_once(REFERENCE)
    def backward(ctx: Any, *derivatives: Tensor | None) -> tuple[Tensor | None, ...]:
        call, backend = _restore(ctx), ctx.backend
        count, device = len(call.rows.hidden), call.rows.hidden.device
        active = _active_rows(derivatives, device)
        selected = call.rows if active is None else call.rows.select(active)
        alpha, eta, kappa = (
            None if x is None else (x if active is None else x[active]).contiguous() for x in derivatives
        )
        call, needs_grad = replace(call, rows=selected), list(ctx.needs_input_grad[3:])
        max_rows = backend.max_chunk_rows(call.head, selected.hidden.dtype)
        accumulator = _GradientAccumulator(call, needs_grad, backend, max_rows)
        with without_autocast(device.type):
            for chunk in _chunks(len(selected.hidden), max_rows, accumulator.first_chunk_rows):
                rows, memory = selected.select(chunk), accumulator.memory(chunk)
                stats, saved = backend.forward(call.head, rows, entropy=eta is not None, save_logits=True, **memory)
                parts = (None if x is None else x[chunk] for x in (alpha, eta, kappa))
                accumulator.add(chunk, rows, saved, stats, Upstream(None, *parts))
                del saved
        gradients = accumulator.finish()
        if active is not None:
            gradients = [
                _scatter_rows(x, active, count) if index in (0, 3) and x is not None else x
                for index, x in enumerate(gradients)
            ]
        return None, None, None, *gradients


def _save(ctx: Any, call: Call) -> None:
    fields = (*_without_shared(call.head), *call.rows)
    ctx.shared, ctx.numbers = call.head.shared, [None if isinstance(x, Tensor) else x for x in fields]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in fields))


def _restore(ctx: Any) -> Call:
    pairs = zip(ctx.saved_tensors, ctx.numbers, strict=True)
    fields = [number if tensor is None else tensor for tensor, number in pairs]
    head, rows = Head(*fields[: len(Head._fields)]), Rows(*fields[len(Head._fields) :])
    return Call(head._replace(ref_weight=head.weight) if ctx.shared else head, rows)


def _without_shared(head: Head) -> Head:
    """Return the head with a weight that the reference shares only once."""
    return head._replace(ref_weight=None) if head.shared else head


def _chunks(count: int, max_rows: int, first: int = 0) -> Iterator[slice]:
    """Yield slices of nearly equal length, at most ``max_rows`` rows each: a short last chunk would read W for few rows.

    If ``first`` is not 0, the first slice has up to ``first`` rows.
    """
    if count == 0:
        return
    begin = min(first, count)
    if begin:
        yield slice(0, begin)
    if begin == count:
        return
    pieces = -(-(count - begin) // max(1, max_rows))
    size = -(-(count - begin) // pieces)
    if pieces > 1 and max_rows >= _ROW_MULTIPLE:
        size = min(-(-size // _ROW_MULTIPLE) * _ROW_MULTIPLE, max_rows)
    for start in range(begin, count, size):
        yield slice(start, min(start + size, count))


def _active_rows(derivatives: tuple[Tensor | None, ...], device: torch.device) -> Tensor | None:
    """Return the rows with a nonzero coefficient, ascending; None for all. On a GPU this synchronises once."""
    given = [x for x in derivatives if x is not None]
    if not given:
        return torch.empty(0, dtype=torch.int64, device=device)
    # NaN is not zero: its row stays active, so it shows in the gradient.
    active = torch.stack([x != 0 for x in given]).any(0).nonzero().squeeze(1)
    return None if len(active) == len(given[0]) else active


def _scatter_rows(x: Tensor, index: Tensor, count: int) -> Tensor:
    return x.new_zeros(count, *x.shape[1:]).index_copy_(0, index, x)


def _concatenate(parts: list[TokenStats], hidden: Tensor, *, entropy: bool, kl: bool) -> TokenStats:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        none = hidden.new_empty(0, dtype=stats_dtype(hidden.dtype))
        return TokenStats(none, none.clone() if entropy else None, none.clone() if kl else None)
    columns = zip(*parts, strict=True)
    return TokenStats(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]
