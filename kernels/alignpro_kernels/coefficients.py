"""Evaluation of a loss callback: statistics in, three derivatives per token out."""

from __future__ import annotations

from torch import Tensor

from alignpro_kernels.types import Coefficients, TokenStats


def evaluate(
    coefficients: Coefficients, stats: TokenStats, positions: Tensor
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Call ``coefficients`` on a chunk of C rows.

    Args:
        coefficients: The loss.
        stats: (C,) each, constants.
        positions: (C,) int64: the positions of the rows in the flattened input.

    Returns:
        The summed loss () and (alpha, eta, kappa), (C,) each or None, in the dtype of the statistics.

    Raises:
        ValueError: A result has the wrong shape, or is the derivative of a statistic that was not requested.
    """
    dtype = stats.logprob.dtype
    terms, *derivatives = coefficients(stats.logprob, stats.entropy, stats.kl, positions)
    names = ("alpha", "eta", "kappa")
    for name, value in zip(("loss_terms", *names), (terms, *derivatives), strict=True):
        if value is not None and value.shape != positions.shape:
            raise ValueError(f"coefficients: {name} has shape {tuple(value.shape)}, expected {tuple(positions.shape)}")
    alpha, eta, kappa = (None if value is None else value.detach().to(dtype).contiguous() for value in derivatives)
    if eta is not None and stats.entropy is None:
        raise ValueError("coefficients: eta given, but the entropy was not requested: pass entropy=True")
    if kappa is not None and stats.kl is None:
        raise ValueError("coefficients: kappa given, but there is no reference: pass ref_hidden")
    return terms.detach().to(dtype).sum(), (alpha, eta, kappa)
