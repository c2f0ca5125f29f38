"""The cases: the operator, whether its head is trained, and the matrix products that it requires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Product = Literal["logits", "ref_logits", "d_hidden", "d_weight"]

SAMPLE_BATCHES = (1, 8, 64, 512)


@dataclass(frozen=True)
class Case:
    """A case of the comparison; entrants that cannot compute it give the reason."""

    name: str
    title: str
    operator: Literal["policy_loss", "linear_logprob", "linear_sample"]
    products: tuple[Product, ...]
    """The floor: 2NDV floating-point operations each."""
    backward: bool = True
    trained: bool = False
    """Whether the head requires a gradient."""
    kl: Literal["shared", "separate"] | None = None
    """The exact KL to a reference that shares the head or has its own."""
    cross_entropy: bool = False
    """Whether all coefficients are −1/N, as in kernels for supervised training."""
    batch: int | None = None
    """A fixed number of rows, instead of that of the run."""


CASES = (
    Case(
        "policy",
        "policy loss, trained head",
        "policy_loss",
        ("logits", "d_hidden", "d_weight"),
        trained=True,
    ),
    Case("policy-frozen", "policy loss, frozen head", "policy_loss", ("logits", "d_hidden")),
    Case(
        "policy-kl-frozen",
        "policy loss + exact KL, shared frozen head",
        "policy_loss",
        ("logits", "ref_logits", "d_hidden"),
        kl="shared",
    ),
    Case(
        "policy-kl",
        "policy loss + exact KL, trained head, reference's own",
        "policy_loss",
        ("logits", "ref_logits", "d_hidden", "d_weight"),
        trained=True,
        kl="separate",
    ),
    Case(
        "cross-entropy",
        "cross-entropy, trained head",
        "policy_loss",
        ("logits", "d_hidden", "d_weight"),
        trained=True,
        cross_entropy=True,
    ),
    Case("logprob-forward", "log-probability, no gradient", "linear_logprob", ("logits",), backward=False),
    # Without the logits in memory, the backward pass recomputes them: four products.
    Case(
        "logprob",
        "log-probability, trained head, recomputing backward",
        "linear_logprob",
        ("logits", "logits", "d_hidden", "d_weight"),
        trained=True,
    ),
    *(
        Case(f"sample-{batch}", f"sample, batch {batch}", "linear_sample", ("logits",), backward=False, batch=batch)
        for batch in SAMPLE_BATCHES
    ),
)
