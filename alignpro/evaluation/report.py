"""The evaluation report as a self-contained HTML file: no network access, no other files, all texts escaped."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from alignpro.evaluation import charts
from alignpro.evaluation.comparison_results import Comparison, Group, MethodResult
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.report_content import Report
from alignpro.evaluation.results import ArmGroup, ArmSummary, Bar, SampleRow
from alignpro.theory.statistics import Estimate, VarianceParts, finite_or_none
from alignpro.training.durability import replace_text

_SHOWN_ROWS = 2000
"""Samples in the table at most."""
_TEXT_BYTES = 1_500_000
"""Bytes of their texts at most: a report stays below 3 MB whatever was sampled."""


@dataclass(frozen=True)
class _BarSegment:
    """A segment of the small bar that shows the variance parts; its width is in percent of the largest total."""

    name: str
    value: float
    width: float


@dataclass(frozen=True)
class _Figure:
    """The images of one group of bars, as data URIs."""

    title: str
    mean: str
    variance: str
    distribution: str = ""
    note: str = ""
    paper: bool = False


@dataclass(frozen=True)
class _GroupView:
    """A group of a comparison with what its table shows beside the numbers."""

    group: Group
    parts: dict[str, list[_BarSegment]]
    best_label: str
    best_method: str | None


def write_report(path: Path, report: Report) -> None:
    """Render `report` and write it to ``path`` atomically, so that a reader never sees a partial file.

    Args:
        path: The HTML file to write; its directory must exist.
        report: The content. Texts may contain anything, including HTML: they are escaped.

    Raises:
        ValueError: The report has nothing to show.
        OSError: The file cannot be written.
    """
    replace_text(path, render_report(report).encode("utf-8", "replace").decode("utf-8"))


def render_report(report: Report) -> str:
    """The report as HTML text.

    Raises:
        ValueError: The report has nothing to show: no arm, no comparison and no training run.
    """
    if not report.arms and not report.comparison and not report.curves:
        raise ValueError("a report needs at least one arm, a comparison or a training run")
    environment = Environment(
        loader=PackageLoader("alignpro.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number,
        interval=_interval,
        signed=_signed,
        percent=_percent,
        gap_interval=_gap_interval,
        p_value=_p_value,
        p_text=_p_text,
        count=_count,
        duration=_duration,
        estimate=Estimate.from_dict,
        method=method_label,
    )
    colors = _colors(report)
    groups = report.comparison.groups if report.comparison else ()
    return environment.get_template("page.jinja").render(
        report=report,
        verdict=report.verdict or (report.comparison.verdict if report.comparison else ""),
        colors=colors,
        parts=_variance_bars({arm.name: arm.variance for arm in report.arms}),
        groups=[_group_view(group) for group in groups],
        clustered=any(group.clusters != group.prompts for group in groups),
        kl=[(arm.label, arm.kl) for arm in report.arms if arm.kl is not None],
        figures=_figures(report),
        analyses=[(each, _embed(each.figure)) for each in report.analyses],
        curves=_embed(charts.to_svg(charts.plot_curves, report.curves)),
        frontier=_embed(charts.to_svg(charts.plot_frontier, report.curves)),
        table=_table(report.arms, report.rows, colors),
    )


def _colors(report: Report) -> dict[str, str]:
    """Key of an arm or method → its colour, which is that of its bars."""
    methods = [
        each.method for group in (report.comparison.groups if report.comparison else ()) for each in group.methods
    ]
    return charts.arm_colors(list(dict.fromkeys([*(arm.name for arm in report.arms), *methods])))


def _group_view(group: Group) -> _GroupView:
    best = max(group.methods, key=lambda each: each.mean.value)
    instruction = group.method(group.best_instruction) if group.best_instruction else None
    return _GroupView(
        group,
        _variance_bars({each.method: each.variance for each in group.methods}),
        f"“{instruction.label}”" if instruction else "the best instruction",
        best.method if len(group.methods) > 1 else None,
    )


def _figures(report: Report) -> list[_Figure]:
    """The bars of the evaluation, or of each task of a comparison, and those of the paper if they are wanted."""
    figures = []
    if report.arms:
        distribution = _embed(charts.to_svg(charts.plot_distributions, report.arms))
        figures.append(_figure("", [ArmGroup(report.pair, report.arms)], distribution=distribution))
    elif report.comparison:
        for task, groups in _by_task(report.comparison).items():
            bars = [ArmGroup(group.pair, [_bar(each) for each in group.methods]) for group in groups]
            figures.append(_figure(task, bars))
    if report.paper is not None:
        note = f"{report.paper.source}."
        for name, digitised in report.paper.groups.items():
            figures.append(_figure(f"The paper's figure: {name}", digitised, note=note, paper=True))
    return figures


def _figure(
    title: str, groups: Sequence[ArmGroup], *, distribution: str = "", note: str = "", paper: bool = False
) -> _Figure:
    images = [_embed(charts.to_svg(charts.plot_bars, groups, quantity)) for quantity in ("mean", "variance")]
    return _Figure(title, images[0], images[1], distribution, note, paper)


def _by_task(comparison: Comparison) -> dict[str, list[Group]]:
    tasks: dict[str, list[Group]] = {}
    for group in comparison.groups:
        tasks.setdefault(group.task, []).append(group)
    return tasks


def _bar(result: MethodResult) -> Bar:
    return Bar(
        result.method, result.label, result.mean.value, (result.mean.low, result.mean.high), result.variance.total
    )


def _embed(image: bytes) -> str:
    """SVG as a data URI; an empty string if there is no image."""
    return f"data:image/svg+xml;base64,{base64.b64encode(image).decode('ascii')}" if image else ""


def _variance_bars(variances: Mapping[str, VarianceParts]) -> dict[str, list[_BarSegment]]:
    """Segments in proportion to the variance parts; a negative estimate has no width, but is shown as a number."""
    largest = max(
        (max(0.0, v.prompts) + max(0.0, v.rewrites) + max(0.0, v.responses) for v in variances.values()), default=0.0
    )
    bars = {}
    for name, variance in variances.items():
        parts = {"prompts": variance.prompts, "rewrites": variance.rewrites, "responses": variance.responses}
        bars[name] = [
            _BarSegment(part, value, 100 * max(0.0, value) / (largest or 1.0)) for part, value in parts.items()
        ]
    return bars


def _table(arms: Sequence[ArmSummary], rows: Sequence[SampleRow], colors: dict[str, str]) -> dict[str, Any]:
    """The rows in the format of the page's script: each distinct text is stored once, and rows hold indices.

    Rows follow as long as there is room for their texts.
    """
    known = {arm.name: arm.label for arm in arms}
    names = list(dict.fromkeys([*known, *(row["arm"] for row in rows)]))
    texts: dict[str, int] = {}

    def index(text: str | None) -> int:
        return -1 if text is None else texts.setdefault(_replace_surrogates(text), len(texts))

    packed: list[list[Any]] = []
    room = _TEXT_BYTES
    for row in rows[:_SHOWN_ROWS]:
        written = [text for text in (row["prompt"], row["rewrite"], row["response"]) if text is not None]
        room -= sum(len(json.dumps(text)) for text in written if _replace_surrogates(text) not in texts)
        if room < 0:
            break
        packed.append(
            [
                names.index(row["arm"]),
                index(row["prompt"]),
                index(row["rewrite"]),
                index(row["response"]),
                finite_or_none(row["reward"]),
            ]
        )
    labels = [[known.get(name, method_label(name)), colors.get(name, "#777777")] for name in names]
    return {"arms": labels, "texts": list(texts), "rows": packed}


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which a model can produce and some browsers cannot handle, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.3g}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def _signed(value: float | None, digits: int = 3) -> str:
    text = _number(value, digits)
    return text if text.startswith(("−", "–")) else f"+{text}"


def _interval(estimate: Estimate, digits: int = 3) -> str:
    if estimate.not_estimable is not None:
        return f"not estimable: {estimate.not_estimable}"
    return f"[{_number(estimate.low, digits)},\N{NO-BREAK SPACE}{_number(estimate.high, digits)}]"


def _p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _p_text(p: float | None) -> str:
    return "not tested" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %".replace("-", "−") if math.isfinite(value) else "–"


def _gap_interval(gap: Estimate) -> str:
    if gap.not_estimable is not None:
        return f"not estimable: {gap.not_estimable}"
    return f"95 % [{_percent(gap.low)}, {_percent(gap.high)}]".replace(" ", "\N{NO-BREAK SPACE}")
