"""The inputs of a case: random, but with a softmax similar to that of a trained model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.shapes import Shape

SPREAD = 3.0  # standard deviation of the logits
KL_COEF = 0.05


@dataclass(frozen=True)
class Heads:
    """The weights of one shape, created once, since they are the largest tensors."""

    weight: Tensor  # (V, D)
    ref_weight: Tensor  # (V, D): the reference's own head, or `weight` if no case needs one


@dataclass(frozen=True)
class Problem:
    """The inputs of a case. The loss is Σ alpha · log p(target) + Σ kappa · KL; the coefficients include the factor 1/N."""

    hidden: Tensor  # (N, D), requires a gradient if the case has a backward pass
    weight: Tensor  # (V, D), likewise if trained
    target: Tensor  # (N,) int64
    alpha: Tensor  # (N,) float32: −advantage / N
    kappa: Tensor | None  # (N,) float32: KL coefficient / N
    ref_hidden: Tensor | None  # (N, D)
    ref_weight: Tensor | None  # (V, D); None with ref_hidden: the reference shares `weight`
    seeds: Tensor  # (N,) int64, for sampling
    softcap: float | None

    @property
    def rows(self) -> int:
        """N"""
        return self.hidden.shape[0]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of this project's operators that both the loss and the log-probability take."""
        names = ("hidden", "weight", "target", "softcap", "ref_hidden", "ref_weight")
        return {name: getattr(self, name) for name in names}

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """The inputs that require gradients: hidden, then weight if trained."""
        return tuple(x for x in (self.hidden, self.weight) if x.requires_grad)

    def select(self, index: Tensor) -> Problem:
        """Return the given rows as a separate problem, normalised by their number."""
        scale = self.rows / index.numel()
        return dataclasses.replace(
            self,
            hidden=self.hidden.detach()[index].requires_grad_(self.hidden.requires_grad),
            target=self.target[index],
            alpha=self.alpha[index] * scale,
            kappa=None if self.kappa is None else self.kappa[index] * scale,
            ref_hidden=None if self.ref_hidden is None else self.ref_hidden[index],
            seeds=self.seeds[index],
        )

    def to(self, dtype: torch.dtype) -> Problem:
        """Convert the inputs, including the coefficients, to another dtype."""
        names = ("hidden", "weight", "alpha", "kappa", "ref_hidden", "ref_weight")
        given = {name: x for name in names if (x := getattr(self, name)) is not None}
        converted: Any = {name: x.detach().to(dtype).requires_grad_(x.requires_grad) for name, x in given.items()}
        return dataclasses.replace(self, **converted)


def make_heads(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int, *, reference: bool) -> Heads:
    """Create random weights, with rows of norm about one."""
    generator = torch.Generator(device).manual_seed(seed)

    def head() -> Tensor:
        weight = torch.empty(shape.vocabulary, shape.hidden, device=device, dtype=dtype)
        return weight.normal_(std=shape.hidden**-0.5, generator=generator)

    weight = head()
    return Heads(weight, head() if reference else weight)


def make_problem(case: Case, shape: Shape, heads: Heads, rows: int, seed: int) -> Problem:
    """Create the inputs of a case with N = ``rows``.

    A hidden state is noise plus a component along its target's row of the head, so that the target's probability is about
    one half, as for samples of a trained model: kernels that skip small probabilities benefit here as in training.
    """
    weight = heads.weight
    device, dtype = weight.device, weight.dtype
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    target = torch.randint(shape.vocabulary, (rows,), device=device, generator=generator)
    lse = math.log(shape.vocabulary) + SPREAD**2 / 2  # log-sum-exp of all other logits
    hidden = SPREAD * normal(rows, shape.hidden) + lse * weight[target].float()  # (N, D)
    ref_hidden = (hidden + 0.3 * SPREAD * normal(rows, shape.hidden)).to(dtype) if case.kl else None
    advantage = torch.ones(rows, device=device) if case.cross_entropy else normal(rows)
    return Problem(
        hidden=hidden.to(dtype).requires_grad_(case.backward),
        weight=weight.detach().requires_grad_(case.trained and case.backward),
        target=target,
        alpha=-advantage / rows,
        kappa=torch.full((rows,), KL_COEF / rows, device=device) if case.kl else None,
        ref_hidden=ref_hidden,
        ref_weight=heads.ref_weight if case.kl == "separate" else None,
        seeds=torch.randint(2**62, (rows,), device=device, generator=generator),
        softcap=shape.softcap,
    )
