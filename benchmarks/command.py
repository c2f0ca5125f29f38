"""The command line that the benchmarks share: its options, and how they are read."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import typer

from benchmarks.workload import WORKLOADS

WorkloadName = Annotated[str, typer.Option("--workload", help=f"One of {', '.join(WORKLOADS)}.")]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        help="Change the workload: prompts=16, K=4, M=2, meta_prompt=…, prompt=…, rewrite=…, template=…, response=… "
        "in tokens, prompter=LAYERSxHIDDEN, target=…; may be repeated."
    ),
]
"""Changes of a workload of chains; see `benchmarks.workload.reshape`."""
ModelDirectory = Annotated[
    Path | None,
    typer.Option(
        "--model", help="Directory of a model that is prompter and target, instead of models with random weights."
    ),
]
PromptsFile = Annotated[
    Path | None, typer.Option("--prompts", help="With --model: prompts from a file (.jsonl, …) instead of random ones.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Configuration overrides, as for `alignpro train`: objective.kl.estimator=k3")
]
Entrants = Annotated[
    list[str] | None, typer.Option(help="Names or patterns, such as 'ours*'; may be repeated. Default: all.")
]
Warmup = Annotated[int, typer.Option(min=1, help="Warm-up steps before the timed ones.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if available.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: bfloat16 on a GPU, otherwise float32.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of torch's CPU threads.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
ResultsFile = Annotated[
    Path | None, typer.Option("--json", help="Results file. Default: in benchmarks/results/DEVICE.")
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Smoke test: a tiny case and few rounds; the figures are not valid.")
]


class Named(Protocol):
    """Anything that is selected by name."""

    @property
    def name(self) -> str:
        """Its name."""


NamedT = TypeVar("NamedT", bound=Named)


def new_app() -> typer.Typer:
    """Create a command line that reports errors as a single message."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def matching(everything: Sequence[NamedT], patterns: Sequence[str] | None, kind: str) -> list[NamedT]:
    """Return the items whose name matches a pattern, in their original order; all of them without patterns.

    Raises:
        typer.BadParameter: A pattern matches nothing.
    """
    if not patterns:
        return list(everything)
    names = [one.name for one in everything]
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise typer.BadParameter(f"{kind} {pattern!r}: use names or patterns of {', '.join(names)}")
        found.update(matches)
    return [one for one in everything if one.name in found]
