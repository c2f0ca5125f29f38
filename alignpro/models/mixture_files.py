"""A mixture of saved models as a file in the directory of a model: which parts, with which weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from alignpro.errors import ModelError

MIXTURE_FILE = "mixture.json"
"""In the directory of a model, in place of its weights; the tokenizer is beside it."""


@dataclass(frozen=True)
class Mixture:
    """A model whose next-token logits are Σ_k w_k z_k + (1 − Σ_k w_k) z_sft."""

    prompters: tuple[str, ...]
    """Directories of the K prompters."""
    weights: tuple[float, ...]
    """(K,) w."""
    reference: str | None
    """Directory or name of ρ_sft; None if it is the first prompter without its LoRA."""

    @property
    def reference_weight(self) -> float:
        """1 − Σ_k w_k; exactly 0 where that is rounding."""
        rest = 1.0 - sum(self.weights)
        return rest if abs(rest) > 1e-9 else 0.0

    def at_strength(self, strength: float) -> Mixture:
        """The mixture ρ_sft^{1−s} ρ_w^s, token by token."""
        return Mixture(self.prompters, tuple(strength * weight for weight in self.weights), self.reference)

    def write(self, directory: Path) -> None:
        """Write it to the directory of a model."""
        (directory / MIXTURE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_mixture(directory: str | Path) -> Mixture | None:
    """Read the mixture in the directory of a model; None if it is not a mixture.

    Raises:
        ModelError: The file is damaged.
    """
    path = Path(directory) / MIXTURE_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        prompters, weights = tuple(map(str, content["prompters"])), tuple(map(float, content["weights"]))
        reference = content["reference"]
        if not prompters or len(prompters) != len(weights) or not isinstance(reference, str | None):
            raise ValueError("it needs one weight for each prompter")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: is no mixture of models: {error}; write it anew with `alignpro mix`") from error
    return Mixture(prompters, weights, reference)
