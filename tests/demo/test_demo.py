"""The demo end to end: a short run checks the format of its results, slow runs check its target figures."""

import json

import pytest

from alignpro.demo import run
from alignpro.demo.run import WEIGHTS, run_demo
from alignpro.errors import TrainingError

ARMS = ("no_finetuning", "sft_prompter", "align_pro", "oracle", "gibbs")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A demo of two steps, evaluated on a fifth of its prompts: sampling its arms takes most of its time."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "HELDOUT_PROMPTS", run.HELDOUT_PROMPTS // 5)
        return out, run_demo(out, seed=1, steps=2)


def test_summary_has_all_fields(short):
    out, summary = short
    for arm in ARMS:
        assert set(summary[arm]) >= {"mean", "variance", "ci95", "n"}
        low, high = summary[arm]["ci95"]
        assert 0 <= low <= summary[arm]["mean"] <= high <= 1
    assert set(summary["bound"]) >= {"lhs", "rhs"}
    assert summary["bound"]["lhs"] == pytest.approx(summary["oracle"]["mean"] - summary["align_pro"]["mean"], abs=1e-6)
    assert summary["kl"] > 0
    assert summary["seconds"] > 0
    assert summary["seed"] == 1
    assert summary["versions"]["torch"]
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.html").read_text()
    assert '<p class="verdict">Align-Pro ' in report
    assert 'alt="Reward against the KL' in report
    for arm in ("align_pro", "oracle"):
        card = (out / arm / "model" / "README.md").read_text()
        assert "## Held-out evaluation" in card
        assert "| against no fine-tuning | " in card


def test_reward_of_no_finetuning_leaves_headroom(short):
    _, summary = short
    assert summary["no_finetuning"]["mean"] <= 0.55


def test_finished_demo_is_not_overwritten(short):
    out, _ = short
    with pytest.raises(TrainingError, match="finished demo"):
        run_demo(out, seed=1, steps=2)


@pytest.mark.parametrize("present", ["prompts.jsonl", "run_id"])
def test_other_files_are_not_overwritten(tmp_path, present):
    (tmp_path / present).write_text("mine")
    with pytest.raises(TrainingError, match=r"is not empty and holds no|holds a training run"):
        run_demo(tmp_path, steps=1)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [(present, "mine")]


def test_a_demo_that_was_stopped_before_its_training_can_be_started_again(tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("alignpro.demo.run.train", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path, steps=1)
        heldout = tmp_path / "heldout.jsonl"
        heldout.write_text(heldout.read_text()[:1000])  # as a kill may leave it
    with pytest.raises(TrainingError, match="holds no interrupted demo"):
        run_demo(tmp_path, seed=1, steps=1)


def test_weights_are_small_enough_to_ship():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")) < 4_000_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_demo_reaches_its_figures(tmp_path, seed):
    summary = run_demo(tmp_path / "demo", seed=seed)
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    assert summary["no_finetuning"]["mean"] <= 0.55
    assert summary["oracle"]["mean"] >= 0.9
    assert summary["align_pro"]["mean"] >= 0.9
    assert summary["gap_recovered"] >= 0.9
    assert summary["align_pro"]["variance"] < summary["no_finetuning"]["variance"]
    assert summary["bound"]["lhs"] <= summary["bound"]["rhs"]
