"""docs/real tells the figures of its cells: each row of its tables is that of a summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from document import ROOT

REAL = ROOT / "docs" / "real"
FORMS = {"addition": REAL / "summary.json", "whole": REAL / "whole" / "summary.json"}
TABLES = [*FORMS.values(), REAL / "tasks" / "summary.json", REAL / "kinds" / "summary.json"]


def interval(found: dict[str, Any] | None) -> str:
    return "" if found is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**found)


def rows(summary: Path) -> list[str]:
    """The rows of the tables: a method's mean reward, and its differences to no fine-tuning and to the best instruction."""
    columns = ("mean", "versus_no_finetuning", "versus_best_instruction")
    return [
        f"| {method['label']} | {' | '.join(interval(method.get(name)) for name in columns)} |"
        for group in json.loads(summary.read_text())["groups"]
        for method in group["methods"].values()
    ]


@pytest.mark.parametrize("summary", TABLES, ids=lambda path: path.parent.name)
def test_its_tables_have_the_figures_of_the_summaries(summary: Path) -> None:
    text = (REAL / "README.md").read_text(encoding="utf-8")
    expected = rows(summary)
    assert len(expected) >= 5
    assert [row for row in expected if row not in text] == []


def test_the_readme_has_those_of_additions() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if "docs/real/summary.json" in line)
    for group in json.loads(FORMS["addition"].read_text())["groups"]:
        methods = group["methods"]
        trained, best = methods["align_pro"]["mean"], methods[group["best_instruction"]]["mean"]
        for each in (interval(trained), f"{methods['no_finetuning']['mean']['value']:.3f}", f"{best['value']:.3f}"):
            assert each in row


def test_the_readme_has_those_of_the_style_guide() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if "docs/real/kinds/summary.json" in line)
    groups = json.loads((REAL / "kinds" / "summary.json").read_text())["groups"]
    (group,) = (each for each in groups if each["task"] == "style_guide")
    methods = group["methods"]
    trained = methods["align_pro"]
    for each in (interval(trained["mean"]), interval(trained["versus_best_instruction"])):
        assert each in row
    for name in ("no_finetuning", group["best_instruction"]):
        assert f"{methods[name]['mean']['value']:.3f}" in row
    (other,) = (each for each in groups if each["task"] == "question_or_request")
    trained, best = (other["methods"][name] for name in ("align_pro", other["best_instruction"]))
    assert f"3 seeds, settings unchanged, {interval(trained['mean'])} against {best['mean']['value']:.3f}: above" in row
    assert f"above it by {interval(trained['versus_best_instruction'])}" in row and trained["seeds"] == 3


def test_the_seeds_of_question_or_request_by_themselves_and_by_kind() -> None:
    said = " ".join((REAL / "README.md").read_text(encoding="utf-8").split())
    groups = json.loads((REAL / "kinds" / "summary.json").read_text())["groups"]
    (group,) = (each for each in groups if each["task"] == "question_or_request")
    trained, best = (
        [f"{each:.3f}" for each in group["methods"][name]["seed_means"]]
        for name in ("align_pro", group["best_instruction"])
    )
    assert f"with {listed(trained)} of the three seeds where that has {listed(best)}." in said
    questions, requests = json.loads((REAL / "kinds" / "questions_and_requests.json").read_text()).values()
    seeds = [means("question_or_request", "align_pro/forms", "kinds", seed) for seed in range(3)]
    by_kind = [[f"{mean_over(prompts, each):.3f}" for each in seeds] for prompts in (questions, requests)]
    assert f"The three seeds have {listed(by_kind[0])} on questions, and {listed(by_kind[1])} on requests" in said


def test_the_rivals_at_equal_target_calls() -> None:
    said = (REAL / "README.md").read_text(encoding="utf-8")
    summary = json.loads((REAL / "kinds" / "rivals" / "summary.json").read_text())
    groups = {f"{each['task']} · forms → smollm2": each for each in summary["groups"]}
    found = [(groups[each["group"]], pair) for each in summary["analyses"] for pair in each["pairs"]]
    assert len(found) >= 2
    for group, pair in found:
        task, methods = group["task"], group["methods"]
        rival, trained = methods[pair["rival"]], methods[pair["trained"]]
        figures = [interval(each) for each in (rival["mean"], trained["mean"], pair["difference"])]
        assert f"| {task.replace('_', ' ')} | {rival['label']} | {' | '.join(figures)} |" in said
        cells = REAL / "kinds" / "rivals" / "cells" / task / "smollm2"
        search = json.loads((cells / pair["rival"] / "seed_0" / "run" / "rival.json").read_text())
        steps = (REAL / "kinds" / "cells" / task / "smollm2/align_pro/forms/seed_0/run/metrics.jsonl").read_text()
        assert search["target_calls"] == 200 * 8 * sum("loss" in json.loads(row) for row in steps.splitlines()) == 4800
        assert search["hand_written"] and search["instruction"] in " ".join(said.split())


def listed(figures: list[str]) -> str:
    return f"{', '.join(figures[:-1])} and {figures[-1]}"


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        (REAL / "classes", "additions"),
        (REAL / "whole" / "classes", "house_style"),
        (REAL / "kinds" / "classes", "style_guide"),
        (REAL / "kinds" / "classes", "question_or_request"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_the_classes_are_those_of_the_labels(directory: Path, name: str) -> None:
    shares = json.loads((directory / f"{name}.json").read_text())
    labels, keys = (
        {row["id"]: row for row in map(json.loads, (directory / file).read_text().splitlines())}
        for file in (f"{name}.jsonl", f"{name}.key.jsonl")
    )
    texts = [(REAL / file).read_text(encoding="utf-8") for file in ("README.md", "classes/README.md")]
    for method, share in shares.items():
        classes = [labels[each]["class"] for each, key in keys.items() if key["method"] == method]
        assert {each: classes.count(each) for each in share["classes"]} == share["classes"]
        kept = "{:.2f} [{:.2f}, {:.2f}]".format(share["kept"], *share["interval"])
        assert all(kept in text for text in texts)


def test_about_three_quarters_of_the_prompt_tokens_are_found_in_the_cache() -> None:
    """As docs/engine.md says."""
    (run,) = (REAL / "cells").glob("*/smollm2/align_pro/smollm2/seed_0/run/metrics.jsonl")
    steps = [step for step in map(json.loads, run.read_text().splitlines()) if "engine/hit_tokens" in step]
    found, computed = (sum(step[f"engine/{name}"] for step in steps) for name in ("hit_tokens", "computed/prefill"))
    assert 0.65 < found / (found + computed) < 0.85
    assert "about three quarters of all" in (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")


KINDS: dict[str, list[str]] = json.loads((REAL / "tasks" / "kinds.json").read_text())
"""The prompts of each kind, by their hashes: the prompts themselves are not in the repository."""


def means(task: str, cell: str, experiment: str = "tasks", seed: int = 0) -> dict[str, float]:
    """The mean reward of each held-out prompt."""
    path = REAL / experiment / "cells" / task / "smollm2" / cell / f"seed_{seed}" / "evaluation" / "rewards.json"
    rewards = json.loads(path.read_text())
    (arm,) = rewards["arms"].values()
    return {
        prompt: sum(map(sum, rows)) / sum(map(len, rows))
        for prompt, rows in zip(rewards["prompts"], arm["raw"], strict=True)
    }


def mean_over(prompts: list[str], of: dict[str, float]) -> float:
    return sum(of[prompt] for prompt in prompts) / len(prompts)


def test_what_a_fitting_form_earns_where_several_things_are_asked_for_and_elsewhere() -> None:
    several, others = KINDS["several"], KINDS["question"] + KINDS["request"]
    trained, listed, sentence, exact, prior = (
        [mean_over(kind, means("fitting_form", cell)) for kind in (several, others)]
        for cell in (
            "align_pro/smollm2",
            "instruction/numbered",
            "instruction/one_sentence",
            "align_pro_exact/smollm2",
            "prior/smollm2",
        )
    )
    text = " ".join((REAL / "README.md").read_text(encoding="utf-8").split())
    assert f"its reward is {trained[0]:.3f}, and that of" in text and f'as a numbered list." {listed[0]:.3f};' in text
    assert f'elsewhere it has {trained[1]:.3f}, and "Answer in one short sentence." {sentence[1]:.3f}' in text
    assert (
        f"has {exact[0]:.3f}, as much as the reference prompter ({prior[0]:.3f}), and elsewhere {exact[1]:.3f}" in text
    )
    share = len(several) / 160
    assert f"between the two would have {share * listed[0] + (1 - share) * sentence[1]:.3f}" in text


def test_what_the_instructions_earn_on_tasks_without_a_trained_prompter() -> None:
    cells = [
        "none",
        "prior/smollm2",
        *(f"instruction/{each}" for each in ("one_sentence", "numbered", "hello", "depends")),
    ]
    found = [means("style_guide", cell) for cell in cells]
    everywhere = [prompt for kind in KINDS.values() for prompt in kind]
    assert len(set(everywhere)) == 160
    text = (REAL / "README.md").read_text(encoding="utf-8")
    right = {"several": "numbered", "question": "one_sentence", "request": "hello"}
    best = sum(
        len(KINDS[kind]) * mean_over(KINDS[kind], means("style_guide", f"instruction/{name}"))
        for kind, name in right.items()
    )
    for label, prompts, last in (
        ("style guide", everywhere, f"{best / 160:.3f}"),
        ("of it: several things (34)", KINDS["several"], ""),
        ("other questions (52)", KINDS["question"], ""),
        ("other requests (74)", KINDS["request"], ""),
    ):
        row = f"| {label} | {' | '.join(f'{mean_over(prompts, each):.3f}' for each in found)} | {last}".rstrip()
        assert row in text
    none, hello, greet = (
        mean_over(everywhere, means("greeting", cell)) for cell in ("none", "instruction/hello", "instruction/greet")
    )
    said = " ".join(text.split())
    assert f"no fine-tuning has {none:.3f}," in said
    assert f'be friendly." {hello:.3f}, and "Greet me first, then answer." {greet:.3f}' in said


def test_what_a_style_guide_earns_by_kind_of_prompt() -> None:
    trained, prior, *instructions = (
        means("style_guide", cell, "kinds")
        for cell in (
            "align_pro/forms",
            "prior/forms",
            *(f"instruction/{each}" for each in ("one_sentence", "numbered", "hello")),
        )
    )
    text = (REAL / "README.md").read_text(encoding="utf-8")
    for label, kind in (("several things", "several"), ("other questions", "question"), ("other requests", "request")):
        prompts = KINDS[kind]
        best = max(mean_over(prompts, each) for each in instructions)
        figures = [mean_over(prompts, prior), mean_over(prompts, trained), best]
        assert f"| {label} ({len(prompts)}) | {' | '.join(f'{each:.3f}' for each in figures)} |" in text


def test_what_the_seeds_of_a_style_guide_have_by_themselves_and_by_kind() -> None:
    first, second = (means("style_guide", "align_pro/forms", "kinds", seed) for seed in (0, 1))
    said = " ".join((REAL / "README.md").read_text(encoding="utf-8").split())
    everywhere = [prompt for kind in KINDS.values() for prompt in kind]
    assert f"with {mean_over(everywhere, first):.3f} and {mean_over(everywhere, second):.3f} of the two seeds" in said
    kinds = [f"{mean_over(KINDS[kind], second):.3f}" for kind in ("several", "question", "request")]
    assert f"The second seed has {kinds[0]}, {kinds[1]} and {kinds[2]} on the three kinds" in said


def test_what_the_mixture_of_two_prompters_has() -> None:
    found = json.loads((REAL / "kinds" / "mixture" / "pareto.json").read_text())
    text = (ROOT / "docs" / "mixtures.md").read_text(encoding="utf-8")
    for point in found["points"]:
        row = (f"{point['weight']:.3g}", *(interval(each) for each in (*point["rewards"], point["kl"])))
        assert f"| {' | '.join(row)} |" in text
    first, second = map(interval, found["mixed"][0]["least_reward_above"])
    assert f"of the first prompter alone by {first}, and above that of the second by {second}" in text
    made = json.loads((REAL / "kinds" / "mixture" / "mixture.json").read_text())
    assert found["mixed"][0]["weight"] == made["weights"][1]
    assert f"is {made['gap_to_whole_rewrites']['total_variation']:.2f} in total variation" in text


def test_what_the_training_on_a_style_guide_estimated_after_each_step() -> None:
    run = REAL / "kinds" / "cells" / "style_guide" / "smollm2" / "align_pro" / "forms" / "seed_0" / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards, kl = ([f"{row[f'eval/{name}']:.2f}" for row in rows if "eval/reward" in row] for name in ("reward", "kl"))
    said = " ".join((REAL / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"{rewards[0]}, {rewards[1]} and {rewards[2]} on 48 validation prompts, at {kl[0]}, {kl[1]} and {kl[2]} nats"
        in said
    )


def test_what_question_or_request_earns_by_kind_of_prompt() -> None:
    kinds = json.loads((REAL / "kinds" / "questions_and_requests.json").read_text())
    sentence, numbered = (
        means("question_or_request", cell, "kinds") for cell in ("instruction/one_sentence", "instruction/numbered")
    )
    (questions, requests), right = kinds.values(), (sentence, numbered)
    assert {*questions, *requests} == set(sentence)
    best = sum(
        len(prompts) * mean_over(prompts, each) for prompts, each in zip((questions, requests), right, strict=True)
    )
    said = " ".join((REAL / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"is {best / 160:.3f}: {mean_over(questions, sentence):.3f} on questions and {mean_over(requests, numbered):.3f} on "
        "requests."
    ) in said


def test_what_is_added_to_each_kind_of_prompt() -> None:
    counts = json.loads((REAL / "kinds" / "additions.json").read_text())
    said = " ".join((REAL / "README.md").read_text(encoding="utf-8").split())
    hello, sentence = 'Begin your answer with "Hello!" and be friendly.', "Answer in one short sentence."
    listed, guide, other = "Answer as a numbered list.", counts["style_guide"], counts["question_or_request"]
    total = {task: {kind: sum(each.values()) for kind, each in counts[task].items()} for task in counts}
    assert f"for {guide['request'][hello]} of the {total['style_guide']['request']} rewrites of other requests" in said
    assert f"for {guide['question'][sentence]} of the {total['style_guide']['question']} of other questions" in said
    several = guide["several"]
    assert (
        f"of {total['style_guide']['several']} rewrites where several things are asked for, {several[listed]} ask for"
        in said
    )
    assert f"a list and {several[hello]} for a greeting" in said
    questions, requests = (total["question_or_request"][kind] for kind in ("question", "request"))
    assert f'"{sentence}" for {other["question"][sentence]} of the {questions} rewrites of questions' in said
    assert f'"{listed}" for {other["request"][listed]} of the {requests} of requests' in said


def test_the_time_of_make_real_is_that_of_its_cells() -> None:
    cells = [
        REAL / "kinds" / "priors" / "forms" / "cell.json",
        *(REAL / "kinds" / "cells" / "style_guide").rglob("seed_0/cell.json"),
    ]
    minutes = sum(json.loads(cell.read_text())["seconds"] for cell in cells) / 60
    preset = (ROOT / "launch" / "presets" / "real" / "README.md").read_text(encoding="utf-8")
    assert len(cells) == 8 and f"one task: {minutes:.0f} minutes on two cores" in preset


def test_what_the_dial_and_refusals_have() -> None:
    found = json.loads((REAL / "kinds" / "dial_and_refusals.json").read_text())
    dial, judging = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("mixtures.md", "judging.md"))
    for name in ("dial_0.25", "dial_0.5", "dial_0.75", "align_pro", "dial_1.25"):
        arm = found[name]
        low, high = arm["ci95"]
        assert f" | {arm['mean']:.3f} [{low:.3f}, {high:.3f}] | {arm['kl']:.2f} |" in dial
    refusals = found["refusals"]
    assert (
        refusals["harmful"]["prompts"] == 96
        and "Align-Pro lowers refusals of harmful prompts" in refusals["warnings"][0]
    )
    for name in ("no_finetuning", "instruction_one_sentence", "sft_prompter", "align_pro"):
        arm, harmless = (refusals[kind]["arms"][name] for kind in ("harmful", "harmless"))
        cells = (
            arm["label"],
            interval(arm["refusal"]),
            interval(arm["refusal_difference"]),
            interval(harmless["refusal"]),
        )
        assert f"| {' | '.join(cells)} |" in judging
