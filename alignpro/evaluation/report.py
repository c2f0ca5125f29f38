"""The evaluation report as a self-contained HTML file: no network access, no other files, all texts escaped."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from alignpro.evaluation import charts
from alignpro.evaluation.results import ArmGroup, ArmSummary, Report, SampleRow
from alignpro.theory.statistics import Estimate, finite_or_none
from alignpro.training.durability import replace_text


@dataclass(frozen=True)
class _BarSegment:
    """A segment of the small bar that shows the variance parts; its width is in percent of the largest total."""

    name: str
    value: float
    width: float


def write_report(path: Path, report: Report) -> None:
    """Render `report` and write it to ``path`` atomically, so that a reader never sees a partial file.

    Args:
        path: The HTML file to write; its directory must exist.
        report: The content. Texts may contain anything, including HTML: they are escaped.

    Raises:
        ValueError: The report has no arm.
        OSError: The file cannot be written.
    """
    replace_text(path, render_report(report).encode("utf-8", "replace").decode("utf-8"))


def render_report(report: Report) -> str:
    """The report as HTML text.

    Raises:
        ValueError: The report has no arm.
    """
    if not report.arms:
        raise ValueError("a report needs at least one arm")
    environment = Environment(
        loader=PackageLoader("alignpro.evaluation", "."),
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
    )
    colors = {arm.name: charts.arm_color(arm.name) for arm in report.arms}
    return environment.get_template("report.jinja").render(
        report=report,
        colors=colors,
        parts={arm.name: _variance_bar(arm, report.arms) for arm in report.arms},
        kl=[(arm.label, arm.kl) for arm in report.arms if arm.kl is not None],
        comparison=_embed(charts.to_svg(charts.plot_comparison, [ArmGroup(report.pair, report.arms)])),
        distributions=_embed(charts.to_svg(charts.plot_distributions, report.arms)),
        curves=_embed(charts.to_svg(charts.plot_curves, report.curves)),
        table=_table(report.arms, report.rows, colors),
    )


def _embed(image: bytes) -> str:
    """SVG as a data URI; an empty string if there is no image."""
    return f"data:image/svg+xml;base64,{base64.b64encode(image).decode('ascii')}" if image else ""


def _variance_bar(arm: ArmSummary, arms: Sequence[ArmSummary]) -> list[_BarSegment]:
    """Segments in proportion to the variance parts; a negative estimate has no width, but is shown as a number."""
    largest = max(
        max(0.0, v.prompts) + max(0.0, v.rewrites) + max(0.0, v.responses) for v in (a.variance for a in arms)
    )
    parts = {"prompts": arm.variance.prompts, "rewrites": arm.variance.rewrites, "responses": arm.variance.responses}
    return [_BarSegment(name, value, 100 * max(0.0, value) / (largest or 1.0)) for name, value in parts.items()]


def _table(arms: Sequence[ArmSummary], rows: Sequence[SampleRow], colors: dict[str, str]) -> dict[str, Any]:
    """The rows in the format of the page's script: each distinct text is stored once, and rows hold indices."""
    known = {arm.name: arm.label for arm in arms}
    names = list(dict.fromkeys([*known, *(row["arm"] for row in rows)]))
    texts: dict[str, int] = {}

    def index(text: str | None) -> int:
        return -1 if text is None else texts.setdefault(_replace_surrogates(text), len(texts))

    packed = [
        [
            names.index(row["arm"]),
            index(row["prompt"]),
            index(row["rewrite"]),
            index(row["response"]),
            finite_or_none(row["reward"]),
        ]
        for row in rows
    ]
    labels = [[known.get(name, name), colors.get(name, "#777777")] for name in names]
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
    return f"[{_number(estimate.low, digits)}, {_number(estimate.high, digits)}]"


def _p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %".replace("-", "−") if math.isfinite(value) else "–"


def _gap_interval(gap: Estimate) -> str:
    if gap.not_estimable is not None:
        return f"not estimable: {gap.not_estimable}"
    return f"95 % [{_percent(gap.low)}, {_percent(gap.high)}]"
