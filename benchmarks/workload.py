"""The chains of the engine and training benchmarks: lengths, counts and models, all of which are options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import typer


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer: random weights, or those of a directory."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    architecture: str = "llama"
    """``llama`` or ``qwen2``."""
    tied: bool = False
    head_dim: int | None = None
    """Width of a head; ``hidden / heads`` if absent."""
    path: str | None = None
    """The directory of the model, with its weights and its tokenizer."""

    @property
    def head_width(self) -> int:
        """The number of features of a head."""
        return self.head_dim or self.hidden // self.heads


@dataclass(frozen=True)
class Workload:
    """Prompts x → K rewrites x' each → M responses y to each rewrite. Lengths are exact, in tokens."""

    name: str
    prompter: ModelShape
    target: ModelShape
    meta_prompt: int
    """Tokens that the prompter reads before every x."""
    prompt: int
    """x."""
    rewrite: int
    """x'."""
    template: int
    """Tokens that the target reads around every x'."""
    response: int
    """y."""
    prompts: int
    """Prompts per step."""
    K: int
    M: int

    @property
    def chains(self) -> int:
        """Responses per step."""
        return self.prompts * self.K * self.M

    @property
    def before(self) -> int:
        """Tokens of the target's template before x'; the others, after x', open the assistant's turn."""
        return self.template - self.after

    @property
    def after(self) -> int:
        """Tokens of the target's template after x': a sixth of them, as in common chat formats."""
        return self.template // 6

    @property
    def prompter_input(self) -> int:
        """The length of the prompter's input in tokens."""
        return self.meta_prompt + self.prompt

    @property
    def target_input(self) -> int:
        """The length of the target's input in tokens."""
        return self.template + self.rewrite

    def describe(self) -> str:
        """Return its lengths and counts in one line."""
        return (
            f"{self.prompts} prompts, meta-prompt {self.meta_prompt} + x {self.prompt}, K {self.K} rewrites of "
            f"{self.rewrite}, template {self.template}, M {self.M} responses of {self.response}"
        )


BYTES = 259
"""Size of a byte-level vocabulary: 256 bytes and three more tokens."""

SMALL_PROMPTER = ModelShape(4, 256, 768, 4, 2, BYTES)
SMALL_TARGET = ModelShape(6, 384, 1152, 4, 2, BYTES)

PAPER = Workload(
    "paper",
    SMALL_PROMPTER,
    SMALL_TARGET,
    meta_prompt=160,
    prompt=64,
    rewrite=32,
    template=48,
    response=32,
    prompts=8,
    K=8,
    M=4,
)
BARE = replace(PAPER, name="bare", meta_prompt=0, template=0, response=64, M=1)
GPU = replace(
    BARE,
    name="gpu",
    prompter=ModelShape(28, 1536, 8960, 12, 2, 151936, architecture="qwen2", tied=True),  # of Qwen2.5-1.5B
    target=ModelShape(32, 4096, 14336, 32, 8, 128256),  # of Llama-3.1-8B
    prompt=256,
    rewrite=128,
    response=256,
    prompts=32,
    M=4,
)
QUICK = Workload(
    "quick",
    ModelShape(1, 32, 64, 4, 2, BYTES),
    ModelShape(2, 48, 96, 4, 2, BYTES),
    meta_prompt=10,
    prompt=8,
    rewrite=6,
    template=12,
    response=5,
    prompts=2,
    K=2,
    M=2,
)
WORKLOADS = {workload.name: workload for workload in (PAPER, BARE, GPU)}


def find_workload(name: str, changes: Sequence[str] | None, *, quick: bool) -> Workload:
    """Return a workload by name, or the smoke test's, with some of its numbers changed.

    Raises:
        typer.BadParameter: There is no such workload, or a change is invalid; see `reshape`.
    """
    if name not in WORKLOADS:
        raise typer.BadParameter(f"workload {name!r}: use one of {', '.join(WORKLOADS)}")
    return reshape(QUICK if quick else WORKLOADS[name], changes or [])


def reshape(workload: Workload, changes: Sequence[str]) -> Workload:
    """Return a workload with some of its numbers changed (``K=4``) or its models (``target=6x384``).

    Raises:
        typer.BadParameter: A change cannot be parsed, names an unknown field, or has an invalid value.
    """
    numbers = [field.name for field in fields(Workload) if field.type == "int"]
    values: dict[str, Any] = {}
    for change in changes:
        key, _, value = change.partition("=")
        if key in ("prompter", "target"):
            values[key] = _model(value)
        elif key not in numbers:
            raise typer.BadParameter(
                f"shape {change!r}: expected prompter=LxD, target=LxD or one of {', '.join(numbers)} = N"
            )
        elif not value.isdecimal() or (int(value) == 0 and key not in ("meta_prompt", "template")):
            raise typer.BadParameter(f"shape {change!r}: expected a number")
        else:
            values[key] = int(value)
    return replace(workload, **values)


def _model(text: str) -> ModelShape:
    layers, _, hidden = text.partition("x")
    if not (layers.isdecimal() and hidden.isdecimal() and int(layers) and int(hidden) and int(hidden) % 8 == 0):
        raise typer.BadParameter(f"model {text!r}: expected LAYERSxHIDDEN, such as 6x384, HIDDEN a multiple of 8")
    return ModelShape(int(layers), int(hidden), 3 * int(hidden), 4, 2, BYTES)
