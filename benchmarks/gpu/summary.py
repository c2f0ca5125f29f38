"""What a run found, in at most thirty lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LINES = 30
COMPARED = ("policy", "policy-kl")
"""The cases of the kernels in which peers are named."""


def lines(run: Mapping[str, Any], results: Path) -> list[str]:
    """Return the summary of a run.

    Args:
        run: How its commands ended; see `benchmarks.gpu.__main__`.
        results: The folder of the results.
    """
    card = run["card"] or {}
    where = f"{card['name']}, driver {card['driver']}" if card else run["device"]
    tiny = ", tiny shapes: the figures mean nothing" if run["tiny"] else ""
    found = [f"{where}, commit {run['commit'] or 'unknown'}, {run['seconds']:.0f} s{tiny}"]
    for name, ended in run["commands"].items():
        after = "" if ended["seconds"] is None else f" after {ended['seconds']:.0f} s"
        found.append(f"{name}: {ended['status']}{after}")
        about = ABOUT.get(name)
        file = results / f"{FILES.get(name, name)}.json"
        if about is not None and file.exists():
            found += [f"  {line}" for line in _read(about, file)]
    if len(found) <= LINES:
        return found
    return [*found[: LINES - 1], f"… {len(found) - LINES + 1} more lines: see the results"]


def _read(about: Any, file: Path) -> list[str]:
    """Return what is to be said about a results file; one of a command that was cut may be incomplete."""
    try:
        return list(about(json.loads(file.read_text(encoding="utf-8"))))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        return [f"{file.name} is incomplete: {type(error).__name__}: {error}"]


def _smoke(document: Mapping[str, Any]) -> Iterator[str]:
    checks = document["checks"]
    counts = {status: [c["name"] for c in checks if c["status"] == status] for status in ("PASS", "SKIP", "FAIL")}
    yield ", ".join(f"{len(names)} {status}" for status, names in counts.items())
    yield from (f"FAIL {c['name']}: {c['detail'][:110]}" for c in checks if c["status"] == "FAIL")


def _kernels(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield two lines per head: our time over the floor in each case, and that of the peers in those of `COMPARED`."""
    ours: dict[str, dict[str, float]] = {}
    peers: dict[str, dict[str, list[str]]] = {}
    for result in document["results"]:
        shape, case = result["shape"]["name"], result["case"]["name"]
        for entrant in result["entrants"]:
            name, ratio = entrant["entrant"], entrant["ratio_to_floor"]
            if ratio is None:
                continue
            if name.startswith("ours"):
                ours.setdefault(shape, {})[case] = ratio
            elif case in COMPARED:
                peers.setdefault(shape, {}).setdefault(case, []).append(f"{name} {ratio:.2f}")
    for shape, ratios in ours.items():
        yield f"{shape}, × floor: " + ", ".join(f"{case} {ratio:.2f}" for case, ratio in list(ratios.items())[:7])
        if shape in peers:
            cases = (f"{case} {', '.join(entrants)}" for case, entrants in peers[shape].items())
            yield f"{shape}, peers: " + "; ".join(cases)


def _tick(document: Mapping[str, Any]) -> Iterator[str]:
    split = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in document["seconds"].items())
    waiting = f"without async scheduling {document['tick_waiting_s'] * 1e3:.2f}"
    yield f"tick {document['tick_s'] * 1e3:.2f} ms ({waiting}): {split}; floor {document['floor_s'] * 1e3:.2f}"


def _engine(document: Mapping[str, Any]) -> Iterator[str]:
    for result in document["results"]:
        for entrant in result["entrants"]:
            if entrant["seconds"] is None:
                yield f"{result['case']} {entrant['entrant']}: {entrant['status']}, {(entrant['reason'] or '')[:90]}"
            else:
                rate, ratio = entrant["tokens_per_s"], entrant["ratio_to_floor"]
                yield f"{result['case']} {entrant['entrant']}: {rate:,.0f} tokens/s, {ratio:.2f} × floor"


def _training(document: Mapping[str, Any]) -> Iterator[str]:
    for name, setup in document["setups"].items():
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in setup["phases"].items())
        yield f"{name}: step {setup['step_s']:.2f} s: {phases}"
    for name, memory in document["memory"].items():
        peaks = ", ".join(
            f"{peak} {measured / 2**30:.1f} GiB (planned {memory['planned'][peak] / 2**30:.1f})"
            for peak, measured in memory["measured"].items()
        )
        yield f"{name}: {peaks}"


ABOUT = {"smoke": _smoke, "kernels": _kernels, "tick": _tick, "engine": _engine, "training": _training}
"""Command → what is said about its results."""
FILES = {"training": "distributed"}
"""Commands whose results file has another name."""
