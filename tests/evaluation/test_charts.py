import io
import math

import numpy as np
import pytest
from matplotlib.image import imread

from alignpro.evaluation.charts import CURVES, plot_comparison, plot_curves, plot_distributions, to_svg
from alignpro.evaluation.results import ArmGroup, ArmSummary, summarize_arm


def arm(name: str, mean: float, P: int = 20) -> ArmSummary:
    rng = np.random.default_rng(int(1000 * abs(mean)))
    return summarize_arm(name, name, rng.normal(mean, 0.2, size=(P, 2, 2)))


def pair(label: str) -> ArmGroup:
    return ArmGroup(label, [arm("no_finetuning", 0.4), arm("align_pro", 0.9), arm("oracle", 1.1)])


def test_comparison_is_written_in_the_format_of_its_suffix(tmp_path):
    groups = [pair("P1-F1"), pair("P1-F2")]
    plot_comparison(groups, tmp_path / "figure.png")
    image = imread(tmp_path / "figure.png")
    assert image.shape[1] > 1200  # wide enough to print
    assert image.std() > 0.05  # and not blank
    plot_comparison(groups, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes().startswith(b"<?xml")


def test_every_arm_has_its_own_colour_and_equal_data_gives_equal_bytes():
    groups = [
        pair("a"),
        ArmGroup("b", [arm("sft_prompter", 0.5), arm("gibbs", 0.6), arm("mine", 0.1), arm("yours", 0.2)]),
    ]
    drawn = to_svg(plot_comparison, groups)
    assert drawn == to_svg(plot_comparison, groups)
    for color in (b"#9a9a9a", b"#0072b2", b"#e69f00", b"#56b4e9", b"#009e73", b"#cc79a7", b"#d55e00"):
        assert color in drawn


@pytest.mark.parametrize(
    "arms",
    [
        [arm("no_finetuning", -0.4), arm("align_pro", 0.2)],  # means below zero
        [arm("no_finetuning", 0.4, P=1)],  # no interval
        [summarize_arm("no_finetuning", "flat", np.zeros((3, 1, 2)))],  # no variance, all zero
        [arm("align_pro", 4e5)],
    ],
)
def test_unusual_numbers_are_drawn(arms):
    assert to_svg(plot_comparison, [ArmGroup("pair with a long name that has to be wrapped", arms)])
    assert to_svg(plot_distributions, arms)


def test_figure_without_arms_is_refused():
    for groups in ([], [ArmGroup("empty", [])]):
        with pytest.raises(ValueError, match="at least one"):
            plot_comparison(groups, io.BytesIO(), format="svg")


def test_curves_plot_the_metrics_of_the_rows():
    rows = [{"step": i, "reward/mean": i / 10, "seconds/rollout": 0.1} for i in range(30)]
    rows[3]["reward/mean"] = math.nan  # a gap, not a crash
    rows[4].pop("reward/mean")
    alone = to_svg(plot_curves, {"Align-Pro": rows})
    both = to_svg(plot_curves, {"Align-Pro": rows, "oracle": [{"step": 1, "reward/mean": 0.5, "kl": 2.0}]})
    assert alone.count(b'id="axes_') == 1
    assert both.count(b'id="axes_') == 2  # the reward and the KL
    assert "seconds/rollout" not in CURVES


def test_curves_plot_only_requested_metrics(tmp_path):
    rows = [{"step": 1, "reward/mean": 1.0, "seconds/rollout": 0.1}]
    assert plot_curves({"run": rows}, tmp_path / "curves.png", keys={"seconds/rollout": "Rollout (s)"})
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_curves_without_metrics_write_nothing(tmp_path):
    assert plot_curves({}, tmp_path / "curves.png") is False
    assert plot_curves({"run": [{"step": 1, "note": "text"}]}, tmp_path / "curves.png") is False
    assert not (tmp_path / "curves.png").exists()
