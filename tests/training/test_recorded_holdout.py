"""A resumed run, and the evaluation of its model, hold out the prompts that the run held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignpro.config import DataConfig, SFTConfig, dump_config, validate_config
from alignpro.errors import ConfigError
from alignpro.training.recorded_holdout import keep_holdout
from alignpro.training.resume import check_configuration


def write(directory: Path, *, earlier: bool) -> SFTConfig:
    """Write a run's configuration, as this or as an earlier version did."""
    given = {"run": {"out": str(directory)}, "data": {"source": "x.jsonl"}, "policy": {"path": "model"}}
    config = validate_config(SFTConfig, given)
    lines = dump_config(config).splitlines()
    directory.mkdir()
    kept = [line for line in lines if not (earlier and line.strip().startswith(("holdout_by", "cluster")))]
    (directory / "config.yaml").write_text("\n".join(kept))
    return config


def test_a_run_keeps_the_split_that_it_began_with(tmp_path: Path) -> None:
    for name, earlier, kept in (("old", True, "conversation"), ("new", False, "first_turn")):
        config = write(tmp_path / name, earlier=earlier)
        data = keep_holdout(config.data, [tmp_path / name])
        assert data.holdout_by == kept
        check_configuration(tmp_path / name / "config.yaml", config.model_copy(update={"data": data}))
    assert keep_holdout(DataConfig(source="x"), [tmp_path / "none"]).holdout_by == "first_turn"


def test_what_is_given_is_not_changed(tmp_path: Path) -> None:
    write(tmp_path / "old", earlier=True)
    given = DataConfig(source="x", holdout_by="first_turn")
    assert keep_holdout(given, [tmp_path / "old"]) == given


def test_models_whose_runs_held_out_differently_are_not_compared_in_silence(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write(tmp_path / name, earlier=name == "old")
    with pytest.raises(ConfigError, match=r"old: conversation.*new: first_turn"):
        keep_holdout(DataConfig(source="x"), [tmp_path / "old", tmp_path / "new"])
    assert keep_holdout(DataConfig(source="x", holdout=0), [tmp_path / "old", tmp_path / "new"]).holdout == 0
