"""The content of the HTML report, of one evaluation or of many, as plain data: the report displays it and computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignpro.evaluation.changes import Change
from alignpro.evaluation.comparison_results import Comparison
from alignpro.evaluation.convergence import Convergence
from alignpro.evaluation.paper_figure import PaperFigure
from alignpro.evaluation.results import ArmSummary, BoundSummary, GibbsEstimates, SampleRow
from alignpro.theory.statistics import Estimate


@dataclass(frozen=True)
class Analysis:
    """A part of the report of an experiment."""

    title: str
    text: str
    """What it says, and what it does not."""
    figure: bytes = b""
    """SVG."""
    header: Sequence[str] = ()
    """Of the table."""
    rows: Sequence[Sequence[str]] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    """The same for summary.json."""


@dataclass(frozen=True)
class Report:
    """The content of the HTML report."""

    title: str
    pair: str
    """The prompter-target pair, or another short name of the comparison."""
    arms: Sequence[ArmSummary] = ()
    """Of one evaluation; empty in a report on several."""
    comparison: Comparison | None = None
    """Of several evaluations."""
    verdict: str = ""
    """What the numbers say, in a sentence or two; by default that of the comparison."""
    gap: Estimate | None = None
    """Share of the gap recovered."""
    bound: BoundSummary | None = None
    gibbs: GibbsEstimates | None = None
    kl_coef: float | None = None
    """λ."""
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Label of a training run -> its rows of metrics.jsonl."""
    convergence: Mapping[str, Convergence] = field(default_factory=dict)
    """Label of a training run -> whether its reward was still rising."""
    rows: Sequence[SampleRow] = ()
    """The samples of the table, of which as many are shown as the file has room for."""
    changes: Sequence[Change] = ()
    """The prompts that gained and lost most."""
    judgements: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Title of an evaluation -> what judges say of its arms, as in its summary.json."""
    refusals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Title of an evaluation -> how often its arms refuse, as in its summary.json."""
    paper: PaperFigure | None = None
    """The values of the paper's figure, if they are to be drawn too."""
    configuration: str = ""
    """The resolved configuration, as YAML."""
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    """The command that reproduces this report."""
    created: str = ""
    analyses: Sequence[Analysis] = ()
    """Of an experiment: shown below the comparison."""
    notes: Sequence[str] = ()
    """Sentences above the table, such as what was compared and what the numbers do not show."""
