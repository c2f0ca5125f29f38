import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from alignpro.evaluation.report import render_report, write_report
from alignpro.evaluation.results import ArmSummary, BoundSummary, Report, SampleRow, summarize_arm
from alignpro.evaluation.statistics import Estimate

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp; $x$ $ \\frac{"
GARBLED = HOSTILE + "\u2028\ud800"  # a model can write anything, even half a surrogate pair


class Page(HTMLParser):
    """Elements and text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def scripts(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "script"]


def arms() -> list[ArmSummary]:
    rng = np.random.default_rng(0)
    base = rng.normal(0.4, 0.2, size=(12, 1, 4))
    return [
        summarize_arm("no_finetuning", "no fine-tuning", base),
        summarize_arm(
            "align_pro",
            "Align-Pro",
            base + 0.4 + rng.normal(0, 0.1, size=(12, 2, 2)).reshape(12, 1, 4),
            baseline=base,
            kl=3.25,
        ),
    ]


def report(**fields) -> Report:
    return Report(**{"title": "A title", "pair": "P1-F1", "arms": arms(), **fields})


def table(html: str) -> dict:
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(data.group(1))


def test_summary_shows_the_arms_numbers():
    summaries = arms()
    text = Page(render_report(report(arms=summaries, gap=Estimate(0.913, 0.85, 0.97), kl_coef=0.05))).text
    ours = summaries[1]
    for shown in (
        f"{ours.mean:.3f} [{ours.ci95[0]:.3f}, {ours.ci95[1]:.3f}]",
        f"+{ours.difference.value:.3f}",
        f"{ours.variance.total:.4f}",
        f"{ours.variance.responses:.4f}",
        "91.3 % of the gap to the oracle recovered 95 % [85.0 %, 97.0 %]",
        "3.25",
        "λ = 0.05",
        "12 held-out prompts",
    ):
        assert shown in text


def test_hostile_text_stays_text(tmp_path):
    row = SampleRow(arm="align_pro", prompt=GARBLED, rewrite=GARBLED, response=GARBLED, reward=0.5)
    everywhere = report(
        title=HOSTILE,
        pair=HOSTILE,
        rows=[row],
        configuration=HOSTILE,
        versions={HOSTILE: HOSTILE},
        command=HOSTILE,
        created=HOSTILE,
        notes=[HOSTILE],
        bound=BoundSummary(0.1, 0.2, {HOSTILE: 0.2}, HOSTILE),
        curves={HOSTILE: [{"step": 1, "reward/mean": 1.0}], "b": [{"step": 1, "reward/mean": 1.0}]},
    )
    write_report(tmp_path / "report.html", everywhere)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.scripts() == [{"type": "application/json", "id": "data"}, {}]
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert table(html)["texts"] == [GARBLED.replace("\ud800", "\ufffd")]  # the script reads it unchanged


def test_the_file_is_self_contained(tmp_path):
    rows = [SampleRow(arm="align_pro", prompt="x", rewrite="x'", response="see https://example.org", reward=1.0)]
    path = tmp_path / "report.html"
    write_report(path, report(rows=rows, curves={"run": [{"step": 1, "kl": 1.0}, {"step": 2, "kl": 2.0}]}))
    page = Page(path.read_text(encoding="utf-8"))
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "data")]
    assert len([link for link in links if link.startswith("data:image/svg+xml;base64,")]) == 3
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not any(tag == "link" for tag, _ in page.tags)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_table_holds_each_text_once_and_distinguishes_none_from_an_empty_rewrite():
    rows = [
        SampleRow(arm="no_finetuning", prompt="x", rewrite=None, response="y", reward=math.nan),
        SampleRow(arm="align_pro", prompt="x", rewrite="", response="y", reward=-0.25),
        SampleRow(arm="unknown", prompt="x", rewrite="x", response="y", reward=1.0),
    ]
    data = table(render_report(report(rows=rows)))
    assert data["texts"] == ["x", "y", ""]
    assert data["rows"] == [[0, 0, -1, 1, None], [1, 0, 2, 1, -0.25], [2, 0, 0, 1, 1.0]]
    assert [label for label, _ in data["arms"]] == ["no fine-tuning", "Align-Pro", "unknown"]


@pytest.mark.parametrize(
    ("gap", "shown"),
    [
        (
            Estimate(math.nan, -math.inf, math.inf),
            "not defined of the gap to the oracle recovered oracle and no fine-tuning",
        ),
        (
            Estimate(0.4, -math.inf, math.inf),
            "40.0 % of the gap to the oracle recovered interval not determined: the gap",
        ),
        (
            Estimate(-0.4, math.nan, math.nan),
            "−40.0 % of the gap to the oracle recovered interval not determined by one",
        ),
    ],
)
def test_the_report_says_if_the_gap_is_not_determined(gap, shown):
    assert shown in Page(render_report(report(gap=gap))).text


@pytest.mark.parametrize(
    ("bound", "shown"),
    [
        (BoundSummary(0.1, 0.6), "0.100 ≤ 0.600 bound on the gap to the oracle: holds"),
        (BoundSummary(0.7, 0.6), "0.700 > 0.600 bound on the gap to the oracle: does not hold"),
        (
            BoundSummary(None, None, note="the target gives no log-probabilities"),
            "not computable bound on what prompting can reach",
        ),
    ],
)
def test_bound_says_whether_it_holds(bound, shown):
    assert shown in Page(render_report(report(bound=bound))).text


def test_sections_without_content_are_left_out():
    page = Page(render_report(report()))
    ids = {attrs.get("id") for tag, attrs in page.tags if tag == "section"}
    assert ids == {"summary", "figure", "reproduce"}
    assert page.scripts() == []


def test_report_of_one_prompt_shows_no_interval():
    arm = summarize_arm("no_finetuning", "no fine-tuning", np.array([[[0.25, 0.75]]]))
    assert "0.500 interval not determined" in Page(render_report(report(arms=[arm]))).text
    assert arm.as_dict()["ci95"] == [None, None]
    json.dumps(arm.as_dict(), allow_nan=False)


def test_report_without_arms_is_refused():
    with pytest.raises(ValueError, match="at least one arm"):
        render_report(report(arms=[]))


def test_failed_write_leaves_the_old_report(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError):
        write_report(path, report(arms=[]))
    with pytest.raises(OSError):
        write_report(tmp_path / "missing" / "report.html", report())
    assert path.read_text() == "old"
