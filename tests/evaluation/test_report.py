import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from alignpro.evaluation.convergence import convergence
from alignpro.evaluation.report import render_report, write_report
from alignpro.evaluation.report_content import Report
from alignpro.evaluation.results import ArmSummary, BoundSummary, SampleRow, adjusted, summarize_arm
from alignpro.theory.statistics import Clusters, Estimate, Interval, NotEstimable

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
    text = Page(render_report(report(arms=summaries, gap=Estimate(0.913, Interval(0.85, 0.97)), kl_coef=0.05))).text
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
    row = SampleRow(arm="align_pro", prompt=GARBLED, rewrite=GARBLED, response=GARBLED, reward=0.5, penalised=0.5)
    everywhere = report(
        title=HOSTILE,
        pair=HOSTILE,
        rows=[row],
        configuration=HOSTILE,
        versions={HOSTILE: HOSTILE},
        command=HOSTILE,
        created=HOSTILE,
        notes=[HOSTILE],
        bound=BoundSummary(0.1, 0.2, Estimate(0.1, Interval(0.0, 0.2)), {HOSTILE: 0.2}, HOSTILE),
        curves={HOSTILE: [{"step": 1, "reward/mean": 1.0}], "b": [{"step": 1, "reward/mean": 1.0}]},
    )
    write_report(tmp_path / "report.html", everywhere)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.scripts() == [{"type": "application/json", "id": "data"}, {}]
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert table(html)["texts"] == [GARBLED.replace("\ud800", "\ufffd")]  # the script reads it unchanged


def test_the_file_is_self_contained(tmp_path):
    rows = [
        SampleRow(
            arm="align_pro", prompt="x", rewrite="x'", response="see https://example.org", reward=1.0, penalised=1.0
        )
    ]
    path = tmp_path / "report.html"
    write_report(path, report(rows=rows, curves={"run": [{"step": 1, "kl": 1.0}, {"step": 2, "kl": 2.0}]}))
    page = Page(path.read_text(encoding="utf-8"))
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "data")]
    assert len([link for link in links if link.startswith("data:image/svg+xml;base64,")]) == 4
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not any(tag == "link" for tag, _ in page.tags)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_table_holds_each_text_once_and_distinguishes_none_from_an_empty_rewrite():
    rows = [
        SampleRow(arm="no_finetuning", prompt="x", rewrite=None, response="y", reward=math.nan, penalised=math.nan),
        SampleRow(arm="align_pro", prompt="x", rewrite="", response="y", reward=-0.25, penalised=-0.5),
        SampleRow(arm="unknown", prompt="x", rewrite="x", response="y", reward=1.0, penalised=1.0),
    ]
    data = table(render_report(report(rows=rows)))
    assert data["texts"] == ["x", "y", ""]
    assert data["rows"] == [[0, 0, -1, 1, None], [1, 0, 2, 1, -0.25], [2, 0, 0, 1, 1.0]]
    assert [label for label, _ in data["arms"]] == ["no fine-tuning", "Align-Pro", "unknown"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(math.nan, "–"), (0.4, "40.0 %"), (-0.4, "−40.0 %")],
)
def test_the_report_says_why_the_gap_is_not_estimable(value, shown):
    gap = Estimate(value, NotEstimable("the oracle gains nothing"))
    expected = f"{shown} of the gap to the oracle recovered not estimable: the oracle gains nothing"
    assert expected in Page(render_report(report(gap=gap))).text


def test_the_bound_is_a_slack_with_an_interval_and_no_verdict():
    bound = BoundSummary(0.1, 0.6, Estimate(0.5, Interval(0.42, 0.58)), {"r_max TV(π*, π_F)": 0.6})
    text = Page(render_report(report(bound=bound))).text
    assert "+0.500 slack of the bound on the gap to the oracle 95 % [0.420, 0.580]" in text
    assert "slack: right − left +0.500 [0.420, 0.580]" in text
    assert "holds" not in text
    missing = BoundSummary(None, None, note="the target gives no log-probabilities")
    assert "not computable bound on what prompting can reach" in Page(render_report(report(bound=missing))).text


def test_raw_and_penalised_rewards_stand_side_by_side_for_all_arms():
    """The same samples in an arm with rewrites pay a penalty, without which they are as good."""
    base = np.random.default_rng(0).normal(0.5, 0.2, size=(30, 1, 4))
    with_rewrites = base.reshape(30, 2, 2)
    summaries = [
        summarize_arm("no_finetuning", "no fine-tuning", base, penalised=base),
        summarize_arm("align_pro", "Align-Pro", with_rewrites, penalised=with_rewrites - 0.4, baseline=base),
    ]
    for arm in summaries:
        assert arm.mean == pytest.approx(base.mean())
    plain, trained = summaries
    assert plain.penalised == plain.reward
    assert trained.penalised.value == pytest.approx(base.mean() - 0.4)
    assert trained.difference.value == pytest.approx(0)
    text = Page(render_report(report(arms=summaries))).text
    assert f"{trained.penalised.value:.3f} [{trained.penalised.low:.3f}, {trained.penalised.high:.3f}]" in text


def test_the_arms_of_a_report_are_tested_together():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 1, 1))
    names = [("a", 0.0), ("b", 0.05), ("c", 1.0)]
    compared = [
        summarize_arm(name, name, base + shift + 0.1 * rng.normal(size=(40, 1, 1)), baseline=base)
        for name, shift in names
    ]
    arms = adjusted([summarize_arm("no_finetuning", "none", base), *compared])
    assert arms[0].adjusted_p is None
    a, b, c = arms[1:]
    assert c.adjusted_p == pytest.approx(3 * c.difference.p_value)
    assert b.adjusted_p == pytest.approx(2 * b.difference.p_value)
    assert a.adjusted_p == a.difference.p_value
    assert a.as_dict()["difference"]["adjusted_p"] == a.adjusted_p
    assert "< 0.001" in Page(render_report(report(arms=arms))).text


def test_clusters_are_counted_and_named():
    rewards = np.repeat(np.random.default_rng(0).normal(size=(10, 1, 1)), 3, axis=0)
    clusters = Clusters([i // 3 for i in range(30)])
    clustered, plain = (summarize_arm("no_finetuning", "none", rewards, clusters=each) for each in (clusters, None))
    assert (clustered.n, clustered.clusters) == (30, 10)
    assert clustered.reward.high - clustered.reward.low > 1.6 * (plain.reward.high - plain.reward.low)
    assert "over clusters of prompts" in Page(render_report(report(arms=[clustered]))).text
    assert "over prompts" in Page(render_report(report(arms=[plain]))).text


def test_training_that_still_rises_is_shown():
    rising = [{"step": i, "reward/mean": 0.01 * i} for i in range(1, 101)]
    flat = [{"step": i, "reward/mean": 0.5 + 0.01 * (-1) ** i} for i in range(1, 101)]
    rise, level = convergence(rising), convergence(flat)
    assert rise.change.value == pytest.approx(0.2)
    assert rise.last == pytest.approx(0.905)
    assert level.change.value == pytest.approx(0)
    assert convergence(rising[:9]) is None
    assert convergence([{"step": 1, "reward/mean": None}, {"step": 2}]) is None
    saturated = convergence([{"step": i, "reward/mean": 1.0} for i in range(100)])
    assert (saturated.last, saturated.change.value) == (1.0, 0.0)
    assert saturated.change.not_estimable == "all values are the same", "a change of 0 is no reward of 0"
    text = Page(render_report(report(curves={"Oracle": rising}, convergence={"Oracle": saturated}))).text
    assert "0.000 not estimable: all values are the same" in text
    noisy = [{"step": i, "reward/mean": float(x)} for i, x in enumerate(np.random.default_rng(0).normal(size=100))]
    change = convergence(noisy).change
    assert change.low < 0 < change.high
    text = Page(render_report(report(curves={"Oracle": noisy}, convergence={"Oracle": convergence(noisy)}))).text
    assert "Oracle, 99 steps mean reward" in text


def test_sections_without_content_are_left_out():
    page = Page(render_report(report()))
    ids = {attrs.get("id") for tag, attrs in page.tags if tag == "section"}
    assert ids == {"summary", "figure", "reproduce"}
    assert page.scripts() == []


def test_report_of_one_prompt_shows_no_interval():
    arm = summarize_arm("no_finetuning", "no fine-tuning", np.array([[[0.25, 0.75]]]))
    assert "0.500 not estimable: one prompt has no interval" in Page(render_report(report(arms=[arm]))).text
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
