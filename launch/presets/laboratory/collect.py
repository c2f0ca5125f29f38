"""Copy what is kept of a laboratory, without models and samples, and print its tables in Markdown.

    python launch/presets/laboratory/collect.py runs/laboratory docs/laboratory

docs/laboratory.md has these tables; `tests/docs/test_laboratory_doc.py` compares them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

KEPT = ("cell.json", "*.yaml", "evaluation/summary.json", "evaluation/rewards.json", "evaluation/record.json")
"""Of a cell."""


def main() -> None:
    """Copy from the first directory to the second, and print the tables of that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory of `run.sh`")
    parser.add_argument("to", type=Path)
    given = parser.parse_args()
    copy(given.out, given.to)
    print("\n\n".join("\n".join(table) for table in tables(given.to).values()))


def copy(out: Path, to: Path) -> None:
    """Copy the summaries, the cells that are done, and the comparisons of mixtures."""
    experiment = out / "experiment"
    kept = [experiment / "summary.json", experiment / "config.yaml", *out.glob("mixtures/*/pareto.json")]
    for summary in experiment.glob("cells/**/evaluation/summary.json"):
        cell = summary.parents[1]
        kept += [path for pattern in KEPT for path in cell.glob(pattern)]
    for path in kept:
        new = to / path.relative_to(experiment if path.is_relative_to(experiment) else out)
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, new)


def tables(kept: Path) -> dict[str, list[str]]:
    """Name → the lines of a table in Markdown, of what is there.

    Args:
        kept: What `copy` has written.
    """
    summary = json.loads((kept / "summary.json").read_text(encoding="utf-8"))
    kl = {
        (analysis["target"], point["label"]): point["kl"]
        for analysis in summary["analyses"]
        if analysis["kind"] == "frontier" and analysis["task"] == "right"
        for point in analysis["points"]
    }
    found = {}
    for group in summary["groups"]:
        if group["task"] == "right" and "no_finetuning" in group["methods"]:
            found[f"methods: {group['target']}"] = methods(group, kl)
    for analysis in summary["analyses"]:
        if analysis["kind"] in _ANALYSES:  # all of them are of the task `right`
            found[analysis["kind"]] = _ANALYSES[analysis["kind"]](analysis)
    pareto = [(path.parent.name, json.loads(path.read_text())) for path in sorted(kept.glob("mixtures/*/pareto.json"))]
    return found | ({"pareto": mixtures(pareto)} if pareto else {})


def methods(group: Mapping[str, Any], kl: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """The methods on one target, without those that were trained on another; ``kl`` is by target and label."""
    rows = [
        (
            method["label"],
            str(method["seeds"]),
            shown(method["mean"]),
            shown(method["versus_no_finetuning"], signed=True),
            shown(kl.get((group["target"], method["label"]))),
            f"{method['cost']['target_calls']:,.0f}",
        )
        for name, method in group["methods"].items()
        if ": from " not in name
    ]
    header = ("method", "seeds", "reward", "against no fine-tuning", "KL, nats", "target calls before use")
    return markdown(header, rows)


def dial(analysis: Mapping[str, Any]) -> list[str]:
    """The dial beside trainings."""
    rows = [
        (f"{row['strength']:g}", f"{row['kl_coef']:.3g}", *(shown(row[key], signed=True) for key in _DIFFERENCES))
        for row in analysis["strengths"]
    ]
    return markdown(("s", "λ/s", "difference of rewards", "of the KL", "of J"), rows)


_DIFFERENCES = ("reward", "kl", "objective")


def self_reward(analysis: Mapping[str, Any]) -> list[str]:
    """Rewards and gains by α and iteration."""
    rows = [
        (
            f"{row['alpha']:g}",
            f"{row['iteration']}",
            shown(row["reward"]),
            "" if row["gain"] is None else shown(row["gain"], signed=True),
        )
        for row in analysis["iterations"]
    ]
    return markdown(("α", "iteration", "reward", "gain over the one before"), rows)


def transfer(analysis: Mapping[str, Any]) -> list[str]:
    """Gains over no fine-tuning by the target of training, and that of the evaluation."""
    gains = analysis["of"] == "gain"
    rows = [(row["trained_on"], row["evaluated_on"], shown(row, signed=gains)) for row in analysis["values"]]
    return markdown(("trained on", "evaluated on", analysis["of"]), rows)


def mixtures(compared: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Both rewards of each point, by seed."""
    rows = [
        (
            name.removeprefix("pareto_"),
            f"{each['series']} at {each['weight']:.3g}",
            *(shown(reward) for reward in each["rewards"]),
            shown(each["kl"]),
        )
        for name, found in compared
        for each in found["points"]
    ]
    return markdown(("seed", "prompter", "right answers", "capitals", "KL, nats"), rows)


_ANALYSES = {"dial": dial, "self_reward": self_reward, "transfer": transfer}


def shown(estimate: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """A number with its interval; without one, if it has none."""
    if estimate is None:
        return ""
    form = "+.3f" if signed else ".3f"
    value = f"{estimate['value']:{form}}"
    if estimate["low"] is None or estimate.get("not_estimable"):
        return value
    return f"{value} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return list(_lines(header, rows))


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    main()
