"""python -m benchmarks.classes: class rewrites by hand, blind to the method that wrote them.

``draw`` takes distinct rewrites of each evaluation (`samples.jsonl`), shuffles them together and writes FILE, a JSON line for
each with an empty ``class``, and FILE's key, which says whose each is. Whoever labels reads the rubric and FILE, not the key.
``count`` joins both and prints the share of each class with an interval, as docs/real/classes/README.md defines them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import typer
from rich.console import Console

from alignpro.theory.statistics import Clusters
from alignpro.theory.statistics.binary import korn_graubard
from benchmarks import command
from benchmarks.table import print_table

CLASSES = ("unchanged", "form", "reworded", "narrowed", "changed", "answered", "broken")
KEPT = CLASSES[:3]
"""The classes whose rewrites ask for what the prompt asks for."""

app = command.new_app()


@app.command()
def draw(
    file: Annotated[Path, typer.Argument(help="Written: what is to be labelled.")],
    evaluation: Annotated[list[Path], typer.Option(help="Directory of an evaluation; may be repeated.")],
    count: Annotated[int, typer.Option(min=1, help="Rewrites of each.")] = 50,
    seed: command.Seed = 0,
) -> None:
    """Draw rewrites without their method's name, at most one of a prompt and method."""
    if file.exists():
        _stop(f"{file} exists: remove it with its labels, or name another file")
    generator = random.Random(seed)
    drawn = [(row, arm) for each in evaluation for arm, row in _sample(each, count, generator)]
    generator.shuffle(drawn)
    rows = [
        {"id": i, "prompt": row["prompt"], "rewrite": row["rewrite"], "class": ""} for i, (row, _) in enumerate(drawn)
    ]
    _write(file, rows)
    _write(_key(file), [{"id": i, "method": arm} for i, (_, arm) in enumerate(drawn)])
    print(f"{file}: {len(rows)} rewrites to label")


@app.command()
def count(
    file: Annotated[Path, typer.Argument(help="Labelled rows.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Written: the shares.")] = None,
) -> None:
    """Print how many rewrites of each method have each class."""
    labels = _read(file)
    for row in labels:
        if row["class"] not in CLASSES:
            _stop(f"{file}: row {row['id']}: class {row['class']!r}: one of {', '.join(CLASSES)}")
    methods = {row["id"]: row["method"] for row in _read(_key(file))}
    if methods.keys() != {row["id"] for row in labels}:
        _stop(f"{file} and {_key(file)} have other rows: draw them again")
    shares = {
        method: _shares([row["class"] for row in labels if methods[row["id"]] == method])
        for method in sorted(set(methods.values()))
    }
    rows = [[name, *(str(share["classes"][name]) for share in shares.values())] for name in CLASSES]
    rows.append(["meaning kept", *(f"{share['kept']:.2f}" for share in shares.values())])
    rows.append(["95 %", *("[{:.2f}, {:.2f}]".format(*share["interval"]) for share in shares.values())])
    print_table(Console(), ["class", *shares], rows, title="classes")
    if json_file:
        json_file.write_text(json.dumps(shares, indent=1) + "\n")


def _sample(evaluation: Path, count: int, generator: random.Random) -> list[tuple[str, Mapping[str, Any]]]:
    """A rewrite of each of some prompts, with the name of its method."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in _read(evaluation / "samples.jsonl"):
        by_prompt.setdefault(row["prompt"], []).append(row)
    if len(by_prompt) < count:
        _stop(f"{evaluation}: samples of {len(by_prompt)} prompts, of which {count} cannot be drawn: a smaller --count")
    rows = [generator.choice(by_prompt[prompt]) for prompt in generator.sample(sorted(by_prompt), count)]
    return [(row["arm"], row) for row in rows]


def _shares(classes: Sequence[str]) -> dict[str, Any]:
    kept = np.array([each in KEPT for each in classes], dtype=float)
    low, high = korn_graubard(kept, 1, Clusters.single(len(kept)), 0.95)
    return {
        "rewrites": len(classes),
        "classes": {name: classes.count(name) for name in CLASSES},
        "kept": float(kept.mean()),
        "interval": [float(low), float(high)],
    }


def _key(file: Path) -> Path:
    return file.with_suffix(".key" + file.suffix)


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        _stop(f"{file}: no such file")
    return [json.loads(line) for line in file.read_text().splitlines()]


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _stop(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


if __name__ == "__main__":
    app()
