"""Comparisons of many evaluations: what they conclude of synthetic rewards, and what they refuse."""

import re
from dataclasses import replace

import numpy as np
import pytest
from synthetic_records import MEANS, records, rewards

from alignpro.errors import DataError
from alignpro.evaluation.comparison import compare
from alignpro.evaluation.labels import method_label
from alignpro.theory.statistics import holm, paired_estimate


def test_methods_are_compared_over_seeds_and_prompts():
    (group,) = compare(records(between=0.001)).groups
    assert [each.method for each in group.methods] == list(MEANS)
    ours = group.method("align_pro")
    assert (ours.seeds, ours.samples, len(ours.seed_means)) == (3, 3 * 40 * 4, 3)
    assert ours.mean.low < 0.7 < ours.mean.high
    assert ours.penalised == pytest.approx(ours.mean.value - 0.05)
    assert ours.versus_baseline.difference.low < 0.5 < ours.versus_baseline.difference.high
    assert ours.versus_instruction.other == "Instruction: short"
    assert ours.versus_instruction.above
    assert group.best_instruction == "instruction_short"
    assert ours.gap.low < 0.5 / 0.7 < ours.gap.high
    assert group.method("no_finetuning").versus_baseline is None
    assert group.method("instruction_short").versus_instruction is None
    assert group.method("oracle").gap is None
    assert ours.cost.seconds == 780.0
    assert ours.versus_baseline.needed.startswith("to see 0.05 you need ")


def test_one_seed_is_compared_as_an_evaluation_compares_it():
    given = records(seeds=1)
    (group,) = compare(given).groups
    of = {record.method: record.rewards.arms[record.method].raw for record in given}
    assert group.method("align_pro").versus_baseline.difference == paired_estimate(of["align_pro"], of["no_finetuning"])


def test_all_differences_of_an_experiment_are_adjusted_together():
    """Those of methods without a prompter are shown for every prompter and count once."""
    compared = compare(records(("a", "b"), prompters=("P1", "P2")))
    assert [(group.task, group.prompter) for group in compared.groups] == [
        ("a", "P1"),
        ("a", "P2"),
        ("b", "P1"),
        ("b", "P2"),
    ]
    # Of each task: two instructions and the oracle, Gibbs and Align-Pro of two prompters against no fine-tuning, and the
    # last three against the best instruction. The prompters' records are equal here, and so are their differences.
    versus = {
        (group.task, each.method, other.other): other
        for group in compared.groups
        for each in group.methods
        for other in (each.versus_baseline, each.versus_instruction)
        if other is not None
    }
    assert compared.tests == len(versus) == 16
    adjusted = holm([each.difference.p_value for each in versus.values()])
    assert [each.adjusted_p for each in versus.values()] == pytest.approx(adjusted)


def test_the_verdict_counts_tasks():
    good, bad = records(("a", "b", "c")), records(("d",), means=MEANS | {"align_pro": 0.2, "oracle": 0.21})
    verdict = compare([*good, *bad]).verdict
    assert verdict.startswith("Align-Pro is above no fine-tuning on 3 of 4 tasks after correction for all comparisons.")
    assert "It is above the best hand-written instruction on 3 of 4 tasks and below on 1" in verdict
    assert "on 1 it is not estimable" in verdict


def test_the_verdict_of_one_task_has_its_numbers():
    assert compare(records()).verdict.startswith("Align-Pro is above no fine-tuning by 0.")
    same = compare(records(means={"no_finetuning": 0.2, "align_pro": 0.18}, seeds=1)).verdict
    assert "is not told from no fine-tuning" in same
    assert "to see 0.05 you need" in same
    worse = compare(records(means={"no_finetuning": 0.5, "align_pro": 0.2})).verdict
    assert "Align-Pro is below no fine-tuning by 0." in worse
    without = compare(records(means={"gibbs_16": 0.2, "align_pro": 0.2})).verdict
    assert "without fine-tuning was not evaluated" in without
    assert "nothing was compared with it" in compare(records(means={"gibbs_16": 0.2})).verdict


def test_prompts_in_another_order_are_aligned():
    given = records(seeds=1)
    turned = given[4].rewards
    places = np.random.default_rng(0).permutation(40)
    arm = turned.arms["align_pro"]
    shuffled = replace(
        turned,
        prompts=[turned.prompts[i] for i in places],
        clusters=[turned.clusters[i] for i in places],
        arms={"align_pro": replace(arm, raw=arm.raw[places], penalised=arm.penalised[places])},
    )
    assert compare([*given[:4], replace(given[4], rewards=shuffled), given[5]]) == compare(given)


def test_what_cannot_be_compared_is_refused():
    given = records(seeds=1)
    ours = given[4]

    def refused(**changes) -> str:
        with pytest.raises(DataError) as error:
            compare([*given[:4], replace(ours, **changes)])
        return str(error.value)

    other = replace(ours.rewards, prompts=[*ours.rewards.prompts[:38], "x", "y"])
    message = refused(rewards=other, origin="runs/b/rewards.json")
    assert (
        "runs/b/rewards.json and house style/-/F1/no_finetuning/seed 0 were evaluated on different prompts" in message
    )
    assert "4 of 40 and 40" in message
    assert "scored with different rewards (beef and feed)" in refused(rewards=replace(ours.rewards, reward="beef"))
    clustered = replace(ours.rewards, clusters=[0] * 40)
    assert "different clusters" in refused(rewards=clustered)
    arms = {"a": ours.rewards.arms["align_pro"], "b": ours.rewards.arms["align_pro"]}
    assert "hold no arm align_pro (arms: a, b)" in refused(rewards=replace(ours.rewards, arms=arms))
    with pytest.raises(DataError, match="both align_pro with seed 0"):
        compare([ours, ours])
    with pytest.raises(DataError, match="at least one"):
        compare([])
    with pytest.raises(DataError, match="all seeds with the same rewrites_per_prompt"):
        fewer = replace(ours.rewards, arms={"align_pro": replace(arms["a"], raw=arms["a"].raw[:, :1])})
        compare([ours, replace(ours, seed=1, rewards=fewer)])


def test_clusters_and_power_are_said():
    (group,) = compare(records(cluster=4, between=0.001)).groups
    assert (group.prompts, group.clusters) == (40, 10)
    assert re.fullmatch(
        r"to see 0.05 you need \d+ prompts in \d+ clusters", group.method("oracle").versus_baseline.needed
    )


def test_constant_rewards_are_not_estimable():
    given = records(means={"no_finetuning": 0.2, "align_pro": 0.7}, seeds=1)
    flat = [
        replace(r, rewards=replace(r.rewards, arms={r.method: replace(a, raw=np.full_like(a.raw, 0.3))}))
        for r in given
        for a in r.rewards.arms.values()
    ]
    compared = compare(flat)
    assert "all prompts have the same difference" in compared.verdict
    assert compared.tests == 0


def test_one_prompt_has_no_interval():
    given = records(means={"no_finetuning": 0.2, "align_pro": 0.7}, seeds=1, prompts=1)
    assert "one prompt has no interval" in compare(given).verdict


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("gibbs_64", "Gibbs, N = 64"),
        ("instruction_be_brief", "Instruction: be brief"),
        ("align_pro_grpo", "align pro grpo"),
    ],
)
def test_methods_have_readable_names(key, label):
    assert method_label(key) == label


def test_arms_with_other_names_of_a_single_arm_are_taken():
    given = records(seeds=1)
    assert compare([replace(given[4], method="align_pro_grpo")]).groups[0].methods[0].method == "align_pro_grpo"
    assert rewards(0.5, 1).arms.keys() == {"align_pro"}
