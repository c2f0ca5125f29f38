"""The table of a sweep, and its best point: chosen on one part of the held-out prompts, reported on the other.

The maximum of noisy means is too high on the prompts that it was chosen on, the more so the more points there are. On prompts
that had no part in the choice, the mean of the chosen trainings is unbiased. What chance did in these trainings themselves is in
both parts: other seeds of the chosen point may reach less. Only points with the most seeds can be chosen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from alignpro.config import SweepConfig
from alignpro.evaluation.report_content import Analysis
from alignpro.experiments.evaluated_cells import MethodRecords, by_group
from alignpro.experiments.frontier import shown
from alignpro.theory.statistics import (
    Clusters,
    Estimate,
    NotEstimable,
    SeedRewards,
    difference_over_seeds,
    mean_over_seeds,
)

_NONE_LEFT = NotEstimable(
    "all held-out prompts are in one cluster, so that none is left that had no part in the choice"
)


def sweep_analyses(config: SweepConfig, methods: Sequence[MethodRecords]) -> list[Analysis]:
    """The table of the points of each group, with the best.

    Args:
        config: The sweep.
        methods: What was evaluated.
    """
    found = []
    for (task, target, prompter), each in by_group(methods).items():
        points = [method for method in each if method.cell.point is not None and method.cell.trained_on is None]
        if points:
            pair = f"{prompter} → {target}" if prompter else target
            baseline = next((method for method in each if method.method == "no_finetuning"), None)
            found.append(_analysis(config, f"{task} · {pair}", points, baseline))
    return found


def selection_places(ids: Sequence[str], clusters: Sequence[int], share: float) -> npt.NDArray[np.bool_]:
    """(P,) which prompts the best point is chosen on: a share of the clusters, by a hash, so that it is the same for all cells.

    Args:
        ids: (P,) the prompts' ids.
        clusters: (P,) their clusters.
        share: Of the clusters; at least one is chosen and one left if there are two. A single one is chosen.
    """
    first: dict[int, str] = {}
    for name, cluster in zip(ids, clusters, strict=True):
        first[cluster] = min(name, first.get(cluster, name))
    ordered = sorted(first, key=lambda cluster: hashlib.sha256(first[cluster].encode()).digest())
    count = min(max(1, round(share * len(ordered))), max(1, len(ordered) - 1))
    return np.isin(np.asarray(clusters), ordered[:count])


def _analysis(
    config: SweepConfig, title: str, points: Sequence[MethodRecords], baseline: MethodRecords | None
) -> Analysis:
    means = {each.method: _mean(each, config.sweep.selection, chosen=True) for each in points}
    most = max(len(each.records) for each in points)
    best = max((each for each in points if len(each.records) == most), key=lambda each: means[each.method].value)
    places = _places(best, config.sweep.selection)
    chosen, left = int(places.sum()), int((~places).sum())
    reached = _mean(best, config.sweep.selection, chosen=False) if left else Estimate(math.nan, _NONE_LEFT)
    gain = None if baseline is None or not left else _difference(best, baseline, config.sweep.selection)
    on_chosen = f"{means[best.method].value:.3f}"
    text = f"Best of {len(points)} points on the {chosen} prompts for choosing: {best.label}. "
    if left:
        against = "" if gain is None else f", against no fine-tuning {gain.value:+.3f} {_interval(gain)}"
        text += f"On the other {left} held-out prompts its mean reward is {shown(reached)}{against}; "
        text += f"on those that chose it, {on_chosen}. "
    else:
        text += f"{_NONE_LEFT.reason.capitalize()}: its mean reward is {on_chosen}, which is too high. "
    text += (
        "It is one training" if most == 1 else f"These are its {most} trainings"
    ) + ": a setting is also chosen by what chance did in a training, which other prompts do not show."
    rows = [
        (each.label, shown(means[each.method]), str(len(each.records)), "best" if each is best else "")
        for each in sorted(points, key=lambda each: -means[each.method].value)
    ]
    results = {
        "kind": "sweep",
        "group": title,
        "points": [
            {
                "method": each.method,
                "values": dict(each.cell.point.values) if each.cell.point else {},
                "selection": means[each.method].as_dict(),
                "seeds": len(each.records),
            }
            for each in points
        ],
        "best": {
            "method": best.method,
            "values": dict(best.cell.point.values) if best.cell.point else {},
            "reward": reached.as_dict(),
            "versus_no_finetuning": None if gain is None else gain.as_dict(),
            "prompts": left,
        },
    }
    header = (f"Point ({chosen} prompts for choosing)", "Mean reward", "Seeds", "")
    return Analysis(f"Sweep: {title}", text, header=header, rows=rows, results=results)


def _places(each: MethodRecords, share: float) -> npt.NDArray[np.bool_]:
    """(P,) which prompts the best point is chosen on."""
    return selection_places(each.prompts, each.clusters.numbers.tolist(), share)


def _part(each: MethodRecords, share: float, *, chosen: bool) -> tuple[SeedRewards, Clusters]:
    """The rewards of one part of the prompts."""
    clusters, places = each.clusters.numbers, _places(each, share) == chosen
    return SeedRewards.of({seed: arm.raw[places] for seed, arm in each.arms.items()}), Clusters(
        clusters[places].tolist()
    )


def _mean(each: MethodRecords, share: float, *, chosen: bool) -> Estimate:
    return mean_over_seeds(*_part(each, share, chosen=chosen))


def _difference(each: MethodRecords, baseline: MethodRecords, share: float) -> Estimate:
    ours, clusters = _part(each, share, chosen=False)
    return difference_over_seeds(ours, _part(baseline, share, chosen=False)[0], clusters)


def _interval(estimate: Estimate) -> str:
    return estimate.not_estimable or f"[{estimate.low:.3f}, {estimate.high:.3f}]"
