"""The bank of rewriting moves: the pairs that it makes, which move a rewrite made, and what is wrong with a file."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from alignpro.config import SFTConfig, load_config, validate_config
from alignpro.data import Prompt, split
from alignpro.errors import ConfigError
from alignpro.prompting.moves import COPY, OTHER, load_moves
from alignpro.training.supervised import sft_pairs

PROMPTS = [Prompt.from_text(f"What is {i} + {i}?") for i in range(400)]


def test_every_built_in_move_is_recognized_by_its_templates() -> None:
    bank = load_moves("default")
    assert len(bank.moves) >= 30
    for name, templates in bank.moves.items():
        for template in templates:
            assert bank.move_of("Why is the sky blue?", template("Why is the sky blue?")) == name
    assert bank.move_of("Why is the sky blue?", " Why is the\nsky blue? ") == COPY
    assert bank.move_of("Why is the sky blue?", "Why is the sea blue?") == OTHER


def test_moves_are_drawn_uniformly_and_depend_on_seed_and_prompt_alone() -> None:
    bank = load_moves("default")
    pairs = bank.pairs(PROMPTS, 4, 0.1, seed=0)
    assert bank.pairs(PROMPTS[200:], 4, 0.1, seed=0) == pairs[800:]
    assert bank.pairs(PROMPTS, 4, 0.1, seed=1) != pairs
    use = bank.use([pair.text for pair in pairs], [[pair.rewrite or ""] for pair in pairs])
    assert use.shares[COPY] == pytest.approx(0.1, abs=0.03)
    assert OTHER not in use.shares
    assert use.kept == 1
    assert use.entropy == pytest.approx(math.log(len(bank.moves)), abs=0.03)
    of_one = Counter(bank.move_of(pair.text, pair.rewrite or "") for pair in bank.pairs(PROMPTS[:1], 20, 0.0, seed=0))
    assert max(of_one.values()) == 1  # the moves of a prompt differ


def test_a_share_of_the_pairs_makes_two_moves() -> None:
    bank = load_moves("default").of_form("addition")
    plain, joined = (bank.pairs(PROMPTS, 4, 0.1, 0, share) for share in (0.0, 0.5))
    assert bank.pairs(PROMPTS, 4, 0.1, seed=0) == plain
    counts = Counter((pair.rewrite or "").removeprefix(pair.text).count("\n\n") for pair in joined)
    assert counts[0] / len(joined) == pytest.approx(0.1, abs=0.03)
    templates = {template("").strip(): name for name, own in bank.moves.items() for template in own}
    twice = [pair for pair in joined if (pair.rewrite or "").removeprefix(pair.text).strip() not in {*templates, ""}]
    assert len(twice) / len(joined) == pytest.approx(0.45, abs=0.03)
    for pair in twice:
        assert any((pair.rewrite or "").startswith(f"{pair.text}\n\n{first}\n\n") for first in templates)
        assert bank.move_of(pair.text, pair.rewrite or "") != OTHER


def test_every_rewrite_of_a_prompt_is_kept_and_moves_are_made_of_it_once(tmp_path: Path) -> None:
    rows = [{"prompt": "q"}, *({"prompt": "q", "rewrite": text} for text in ("r", "s", "r")), {"prompt": "other"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"source": str(tmp_path / "data.jsonl"), "moves": "default", "moves_per_prompt": 3, "copies": 0.0}
    config = validate_config(SFTConfig, {"run": {"out": "out"}, "data": data, "policy": {"path": "model"}})
    pairs = sft_pairs(config)
    own = [pair.rewrite for pair in pairs if pair.rewrite in ("r", "s")]
    assert own == ["r", "s"]
    assert Counter(pair.text for pair in pairs) == {"q": 5, "other": 3}


def test_pairs_of_the_data_are_kept_beside_the_moves_on_the_same_side_of_the_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}"} | ({"rewrite": "r"} if i < 5 else {}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = validate_config(
        SFTConfig,
        {
            "run": {"out": str(tmp_path / "out")},
            "data": {"source": str(tmp_path / "data.jsonl"), "moves": "default", "moves_per_prompt": 3, "holdout": 0.3},
            "policy": {"path": "model"},
        },
    )
    pairs = sft_pairs(config)
    assert len(pairs) == 40 * 3 + 5
    assert sum(pair.rewrite == "r" for pair in pairs) == 5
    training, heldout = split(pairs, 0.3)
    assert not {pair.text for pair in training} & {pair.text for pair in heldout}


def test_a_move_may_be_any_template_and_never_interprets_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("twice: '{{ prompt }} {{ prompt }}'\nlate: please\n")
    bank = load_moves(str(path))
    assert bank.moves["twice"][0]("{{ 7 * 7 }}") == "{{ 7 * 7 }} {{ 7 * 7 }}"
    assert bank.moves["late"][0]("a") == "a\n\nplease"
    assert bank.move_of("a", "b c please") == "late"
    assert bank.use(["a"], [["a\n\nplease", "a\n\nplease"]]).entropy == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping"),
        ("- a\n- b\n", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("short: a\nshort: b\n", "'short' occurs more than once"),
        ("short: 7\n", "short: expected a template"),
        ("short: []\n", "short: expected a template"),
        ("short: [a, '  ']\n", "short, template 2: is empty"),
        ("short: '{{ text }}'\n", "short: unknown variable text"),
        ("short: '{{ prompt'\n", "short: not a Jinja template"),
        ("copy: a\n", "copy: this name is reserved"),
    ],
)
def test_a_bad_file_of_moves_is_an_error_that_names_the_entry(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_moves(str(path))
    assert str(path) in str(raised.value)
    with pytest.raises(ConfigError, match="no such file"):
        load_moves(str(tmp_path / "none.yaml"))


def test_a_file_of_moves_lies_beside_the_configuration_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: b\n")
    (tmp_path / "sft.yaml").write_text("{run: {out: out}, data: {source: x, moves: mine.yaml}, policy: {path: m}}")
    config = load_config(SFTConfig, [str(tmp_path / "sft.yaml")])
    assert config.data.moves == str(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match="moves write rewrites"):
        validate_config(SFTConfig, config.model_dump(mode="json") | {"task": "response"})
