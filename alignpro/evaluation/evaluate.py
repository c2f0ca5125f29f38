"""`alignpro eval`: compare prompter, oracle and no fine-tuning on held-out prompts, with intervals, bound and report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from alignpro.config import (
    ConfigSource,
    EvalConfig,
    JudgingConfig,
    ModelConfig,
    TargetMixtureConfig,
    resolve_config,
    target_endpoints,
)
from alignpro.data import Prompt, cluster_labels, load_prompts
from alignpro.errors import AlignProError, ConfigError, TrainingError
from alignpro.evaluation.arms import ArmSampler, ArmSamples
from alignpro.evaluation.as_trained import as_trained, run_directories
from alignpro.evaluation.bound import NO_LOGPROBS, estimate_bound, target_inputs
from alignpro.evaluation.convergence import Convergence, convergence
from alignpro.evaluation.gibbs import arm_estimates
from alignpro.evaluation.heldout_prompts import evaluation_prompts
from alignpro.evaluation.judging import judge_arms, judging_rubric
from alignpro.evaluation.judging_directories import write_judgement
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.logprobs import sequence_kl
from alignpro.evaluation.memories import memory_notes, shown_memory
from alignpro.evaluation.outputs import write_outputs
from alignpro.evaluation.refusal_rates import refusals_content, write_refusals
from alignpro.evaluation.refusals import measure_refusals
from alignpro.evaluation.results import ArmSummary, Evaluation, SampleRow, adjusted, summarize_arm
from alignpro.evaluation.rewards_file import ArmRewards, EvaluationRewards, reward_hash
from alignpro.evaluation.sampled_arms import (
    Trained,
    candidate_kl,
    count_responses,
    instruction_templates,
    sample_arms,
    written_instructions,
)
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model
from alignpro.models.progress_bars import without_progress_bars
from alignpro.rewards import build_reward
from alignpro.targets.base import Target
from alignpro.targets.build import build_target
from alignpro.targets.local import LocalTarget
from alignpro.targets.remote import RemoteTarget
from alignpro.targets.servers import Servers, open_servers
from alignpro.theory.statistics import Clusters, finite, gap_recovered
from alignpro.training.durability import disk_errors
from alignpro.training.loggers.jsonl import read_rows
from alignpro.training.recorded_holdout import trained_on_note
from alignpro.training.run_directory import refuse_run
from alignpro.versions import versions

logger = logging.getLogger(__name__)


@without_progress_bars()
def evaluate(
    config: ConfigSource[EvalConfig],
    *,
    extra: Callable[[], Mapping[str, Any]] = dict,
    servers: Servers | None = None,
) -> Evaluation:
    """Sample all arms, compare them, and write ``summary.json``, ``rewards.json``, ``samples.jsonl`` and the report.

    The report is ``report.html`` with ``figure.png``; `alignpro report` compares evaluations from the first two files.

    Args:
        config: The arms, the prompts, the target and the reward: as an `EvalConfig`, a mapping, the path of a YAML file, or
            a list of files and overrides.
        extra: Called after all results are computed; the entries it returns are added to the summary or replace its own.
        servers: The target's server, if it is open already.

    Returns:
        The arms with their estimates and rewards, as the files have them; ``out`` is in the configuration.

    Raises:
        TrainingError: The output directory already contains an evaluation.
        DataError: There are fewer than two prompts to evaluate on.
        AlignProError: The configuration, a model, the data or the reward cannot be used.
    """
    started = time.perf_counter()
    config = resolve_config(EvalConfig, config)
    if isinstance(config.target, TargetMixtureConfig):
        raise ConfigError(
            "target.mixture: a prompter is evaluated on one target at a time: `alignpro eval` does so for each"
        )
    instruction_templates(written_instructions(config))  # an error in one comes before any work
    if config.judge is not None:
        judging_rubric(config.judge)
    prepare_directory(config.out, "summary.json")
    config = evaluated_as_trained(config)
    if (note := trained_on_note(config.data, run_directories(_models(config)))) is not None:
        logger.warning("%s", note)
    opened: AbstractContextManager[Servers] = (
        nullcontext(servers)
        if servers
        else open_servers(config, target_endpoints(config.target), config.out, config.respond, config.reward_endpoints)
    )
    with opened as connected:
        result = _evaluate(config, connected, started)
        if config.judge is not None:
            result = replace(result, judge=_judge(config, config.judge, result, connected))
    summary = {
        **result.as_dict(),
        "seconds": result.seconds,
        "seed": config.seed,
        "versions": versions(),
        **extra(),
    }
    write_outputs(config, result, summary)
    return result


def _evaluate(config: EvalConfig, servers: Servers, started: float) -> Evaluation:
    prompter = _load(config.prompter)
    adapted = None if prompter is None or config.prompter is None else (prompter, config.prompter)
    target = build_target(config.target, adapted, config.prompting, config.respond, connect=servers.connect)
    reward = build_reward(config.reward, session=servers)
    trained = Trained(prompter, _load(config.reference), _load(config.oracle))
    trained.share_weights(target.models.values())
    prompts = evaluation_prompts(config, load_prompts(config.data), target, trained, [reward])
    clusters = Clusters(cluster_labels(prompts, config.data.cluster))
    sampler = ArmSampler(config, prompts, target, reward, shown_memory(config.prompter, config.reference))
    with sampler.progress(count_responses(config)) as advance:
        sampler.advance = advance
        arms = sample_arms(config, sampler, trained)
    compared = _compare(config, sampler, arms, trained, clusters, time.perf_counter() - started)
    if config.refusals is None:
        return compared
    found = measure_refusals(config, config.refusals, sampler, arms, trained, servers)
    with disk_errors(str(config.out), "make room, then evaluate again"):
        write_refusals(config.out, found)
    return replace(compared, refusals=refusals_content(found))


def _judge(config: EvalConfig, judging: JudgingConfig, result: Evaluation, servers: Servers) -> Mapping[str, Any]:
    """What judges say; an error of theirs is told, and costs nothing of what has been sampled."""
    try:
        judgement = judge_arms(judging, result.rows, result.rewards, servers, config.engine, where=str(config.out))
    except AlignProError as error:
        logger.warning("not judged: %s; `alignpro judge %s` judges what was sampled", error, config.out)
        return {"problem": str(error), "verdict": f"The arms were not judged: {error}."}
    write_judgement(config.out, judgement)
    return judgement.as_dict()


def prepare_directory(out: Path, marker: str) -> Path:
    """Create an output directory, or check that an existing one contains no earlier result.

    Raises:
        TrainingError: The directory contains a result or a training run, or cannot be created.
    """
    refuse_run(out)
    if (out / marker).exists():
        raise TrainingError(f"{out / marker}: already exists; choose another `out`, or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{out}: cannot be created: {error}") from error
    return out


def _load(config: ModelConfig | None) -> LanguageModel | None:
    return None if config is None else load_language_model(config)


def _compare(
    config: EvalConfig,
    sampler: ArmSampler,
    arms: Mapping[str, ArmSamples],
    trained: Trained,
    clusters: Clusters,
    seconds: float,
) -> Evaluation:
    prompt_kl = _kl(config, sampler, arms, trained)
    kl = {name: each.mean().item() for name, each in prompt_kl.items()}
    baseline = arms["no_finetuning"].raw if "no_finetuning" in arms else None
    summaries = adjusted(
        [
            summarize_arm(
                name,
                method_label(name),
                arms[name].raw,
                penalised=arms[name].penalised,
                baseline=None if name == "no_finetuning" else baseline,
                clusters=clusters,
                kl=kl.get(name),
            )
            for name in config.sampled_arms
        ]
    )
    gap = None
    if baseline is not None and "align_pro" in arms and "oracle" in arms:
        gap = gap_recovered(baseline, arms["align_pro"].raw, arms["oracle"].raw, clusters)
    gibbs = {
        name: arm_estimates(sampler, arms["candidates"].first(count), arms[name], config.kl_coef, clusters)
        for name, count in config.gibbs_arms.items()
        if name in arms
    }
    return Evaluation(
        arms=summaries,
        gap=gap,
        kl=kl.get("align_pro"),
        bound=estimate_bound(config, sampler, arms, trained.oracle, clusters) if config.bound else None,
        gibbs=next(reversed(gibbs.values()), None),
        gibbs_by_arm=gibbs,
        rows=sample_rows(config.sampled_arms, sampler.prompts, arms),
        notes=[
            *_notes(config, summaries),
            *([note] if (note := trained_on_note(config.data, run_directories(_models(config)))) else []),
            *memory_notes(sampler.memory, sampler.prompts),
            *_server_notes(sampler.target, trained, config),
        ],
        convergence=_convergence(config),
        seconds=seconds,
        rewards=_rewards(config, sampler, arms, clusters, prompt_kl),
    )


def _rewards(
    config: EvalConfig,
    sampler: ArmSampler,
    arms: Mapping[str, ArmSamples],
    clusters: Clusters,
    trained_kl: Mapping[str, Tensor],
) -> EvaluationRewards:
    """The rewards of the compared arms with their KL, for comparisons with other evaluations."""
    kl = {**trained_kl, **candidate_kl(config, sampler, arms)}
    return EvaluationRewards(
        prompts=[prompt.id for prompt in sampler.prompts],
        clusters=clusters.numbers.tolist(),
        arms={
            name: ArmRewards(finite(arm.raw), finite(arm.penalised), finite(kl[name]) if name in kl else None)
            for name, arm in arms.items()
            if name != "candidates"
        },
        seed=config.seed,
        reward=reward_hash(config.reward),
    )


def _kl(config: EvalConfig, sampler: ArmSampler, arms: Mapping[str, ArmSamples], trained: Trained) -> dict[str, Tensor]:
    """(P,) KL of each trained arm to its initial model, in nats per sequence."""
    prompter, reference, oracle = trained.prompter, trained.reference, trained.oracle
    kl: dict[str, Tensor] = {}
    strengths = {"align_pro": 1.0, **config.dial_arms}
    if prompter is not None and reference is not None:
        encode = sampler.environment(prompter).encode
        inputs = [encode(prompt) for prompt in sampler.prompts]
        for name, strength in strengths.items():
            if name in arms:
                model = prompter if strength == 1 else trained.at_strength(strength)
                kl[name] = sequence_kl(model, reference, inputs, arms[name], config.rewrite.temperature or 1.0)
    if oracle is not None and "oracle" in arms and isinstance(sampler.target, LocalTarget):
        inputs = target_inputs(sampler.target, sampler.prompts)
        temperature = config.respond.temperature or 1.0
        kl["oracle"] = sequence_kl(oracle, sampler.target.model, inputs, arms["oracle"], temperature)
    return kl


def _server_notes(target: Target, trained: Trained, config: EvalConfig) -> list[str]:
    """What a target behind a server cannot tell, and whether it stayed the same."""
    notes = []
    if trained.oracle is not None and not isinstance(target, LocalTarget):
        notes.append(f"The KL of the oracle to the target is {NO_LOGPROBS}.")
    if isinstance(target, RemoteTarget) and (change := target.describe_change()):
        notes.append(f"The target changed during the evaluation: {change}. Its arms are not comparable.")
    curves = _trained_rows(config)
    for name in curves:
        changed = [int(row["step"]) for row in curves[name] if row.get("target/changed", 0) > 0]
        if changed:
            notes.append(
                f"{method_label(name)}: the model behind the target's server changed during training (first at step "
                f"{changed[0]}): the reward is not the same before and after."
            )
    return notes


def _notes(config: EvalConfig, arms: Sequence[ArmSummary]) -> list[str]:
    """What the numbers do not show by themselves."""
    notes = []
    trained = {"Align-Pro": config.rewrite, "the oracle": config.respond}
    if names := [name for name, sampling in trained.items() if sampling.temperature == 0]:
        notes.append(
            f"The samples of {' and '.join(names)} are greedy, and a greedy policy has no finite KL: the KL is that of the "
            "models at temperature 1, along the greedy samples."
        )
    measured = {"Align-Pro": config.prompter, "the oracle": config.oracle}
    for name, sampling in trained.items():
        cuts = {"top_k": sampling.top_k > 0, "top_p": sampling.top_p < 1, "min_p": sampling.min_p > 0}
        filters = [key for key, acts in cuts.items() if acts]
        if filters and sampling.temperature > 0 and measured[name] is not None:
            notes.append(
                f"The samples of {name} are filtered ({', '.join(filters)}): their KL is that of the models without "
                "filters, along the filtered samples."
            )
    if all(arm.binary for arm in arms):
        notes.append(
            "All rewards are 0 or 1: their total variance is p(1 − p) of the mean and adds nothing to it; its parts do."
        )
    if any(arm.name in config.candidate_counts for arm in arms):
        notes.append(
            "Gibbs and best of N: the rewrites of a prompt are chosen from one set of candidates, so their variance between "
            "prompts also holds that between sets of candidates."
        )
    return notes


def evaluated_as_trained(config: EvalConfig) -> EvalConfig:
    """The configuration with what the runs of its models say where it does not; see `as_trained`."""
    return as_trained(config, _models(config), (config.prompter, config.reference))


def _models(config: EvalConfig) -> tuple[ModelConfig | None, ...]:
    return config.prompter, config.reference, config.oracle


def _convergence(config: EvalConfig) -> dict[str, Convergence]:
    """Arm → whether the training of its model had converged, if the model is in a run directory."""
    found = {name: convergence(each) for name, each in _trained_rows(config).items()}
    return {name: each for name, each in found.items() if each is not None}


def _trained_rows(config: EvalConfig) -> dict[str, list[dict[str, Any]]]:
    """Arm → the metrics of the training of its model, as far as there are any."""
    models = {"align_pro": config.prompter, "oracle": config.oracle}
    return {name: read_rows(Path(m.path).parent / "metrics.jsonl") for name, m in models.items() if m is not None}


def sample_rows(names: Sequence[str], prompts: Sequence[Prompt], arms: Mapping[str, ArmSamples]) -> list[SampleRow]:
    """One row per sample of each arm, with its first response. Arms are interleaved, so that truncation keeps all arms."""
    rows: list[SampleRow] = []
    for i, prompt in enumerate(prompts):
        for name in names:
            scores = arms[name].scores
            for k, responses in enumerate(scores.responses[i]):
                row = SampleRow(
                    arm=name,
                    prompt=prompt.text,
                    rewrite=scores.samples[i][k] if arms[name].scores_rewrites else None,
                    response=responses[0],
                    reward=scores.raw[i, k, 0].item(),
                    penalised=scores.penalised[i, k, 0].item(),
                )
                if prompt.context:
                    row["history"] = [{"role": turn.role, "content": turn.content} for turn in prompt.context]
                rows.append(row)
    return rows
