"""`alignpro eval`: compare prompter, oracle and no fine-tuning on held-out prompts, with intervals, bound and report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignpro.config import EvalConfig, ModelConfig, dump_config
from alignpro.data import DataSet, Prompt, load_prompts, split
from alignpro.environments.build import max_input_tokens
from alignpro.environments.response import ResponseEnvironment
from alignpro.errors import ConfigError, DataError, TrainingError
from alignpro.evaluation.arms import LABELS, ArmSampler, ArmSamples, logprobs, sequence_kl
from alignpro.evaluation.figure import plot_comparison
from alignpro.evaluation.report import write_report
from alignpro.evaluation.statistics import Estimate, gap_recovered
from alignpro.evaluation.summary import ArmGroup, ArmSummary, BoundSummary, Report, SampleRow, summarize_arm
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model, load_target
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.length_filter import filter_overlong_prompts
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.rewards import build_reward
from alignpro.theory import sampled_bound
from alignpro.training.checkpoint import disk_errors
from alignpro.training.durability import replace_text
from alignpro.training.metrics import read_rows
from alignpro.versions import versions

logger = logging.getLogger(__name__)

_SHOWN_ROWS = 2000


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation."""

    arms: list[ArmSummary]
    gap: Estimate | None
    kl: float | None
    """KL(ρ ‖ ρ_sft) of the trained prompter, in nats per sequence."""
    bound: BoundSummary | None
    gibbs: dict[str, float] | None
    """λ log Ẑ, effective sample size and number of candidates."""
    rows: list[SampleRow]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {
            **{arm.name: arm.as_dict() for arm in self.arms},
            "gap_recovered": self.gap.as_dict()["value"] if self.gap else None,
            "gap_recovered_ci95": [self.gap.as_dict()["low"], self.gap.as_dict()["high"]] if self.gap else None,
            "kl": self.kl,
            "gibbs_estimates": self.gibbs,
            "bound": None
            if self.bound is None
            else {
                "lhs": self.bound.lhs,
                "rhs": self.bound.rhs,
                "holds": self.bound.holds,
                "terms": dict(self.bound.terms),
                "note": self.bound.note,
            },
        }


def evaluate(
    config: EvalConfig,
    *,
    extra: Callable[[], Mapping[str, Any]] = dict,
) -> Evaluation:
    """Sample all arms, compare them, and write ``summary.json``, ``figure.png``, ``report.html`` and ``samples.jsonl``.

    Args:
        config: The arms, the prompts, the target and the reward.
        extra: Called after all results are computed; the entries it returns are added to the summary or replace its own.

    Raises:
        TrainingError: The output directory already contains an evaluation.
        DataError: There are fewer than two prompts to evaluate on.
    """
    started = time.perf_counter()
    out = prepare_directory(config.out, "summary.json")
    prompter = _load(config.prompter)
    target = load_target(config.target, prompter)
    sampler = ArmSampler(config, [], target, build_reward(config.reward))
    reference = _load(config.reference)
    oracle = _load(config.oracle)
    sampler.prompts = evaluation_prompts(config, load_prompts(config.data), target, prompter or reference)
    arms = _draw_arms(config, sampler, prompter, reference, oracle)
    result = _compare(config, sampler, arms, prompter, reference, oracle, time.perf_counter() - started)
    summary = {
        **result.as_dict(),
        "seconds": result.seconds,
        "seed": config.seed,
        "versions": versions(),
        **extra(),
    }
    with disk_errors(str(out), "make room, then evaluate again"):
        _write(out, config, result, summary)
    return result


def evaluation_prompts(
    config: EvalConfig, data: DataSet, target: LanguageModel, prompter: LanguageModel | None
) -> list[Prompt]:
    """The held-out prompts that fit in the models' contexts; if ``data.holdout`` is 0, all prompts that fit.

    Raises:
        DataError: Fewer than two are left.
    """
    prompts = split(data.prompts, config.data.holdout)[1] if config.data.holdout > 0 else list(data.prompts)
    if len(prompts) < 2:
        raise DataError(
            f"evaluation needs at least 2 held-out prompts, there are {len(prompts)}: raise data.holdout, or set it to 0 "
            "to evaluate on all of data.source"
        )
    template = ChatTemplate(target.tokenizer, config.target_model.chat_template)
    room = max_input_tokens(target, config.respond, "the target", "respond")
    prompts = filter_overlong_prompts(
        prompts, lambda prompt: template.encode(prompt.messages), room, input_name="the target's input"
    )
    if prompter is not None:
        room = min(
            config.prompting.max_prompt_tokens, max_input_tokens(prompter, config.rewrite, "the prompter", "rewrite")
        )
        encode = PrompterTemplate(prompter.tokenizer, config.prompting).encode
        prompts = filter_overlong_prompts(prompts, encode, room)
    return prompts[: config.prompts]


def prepare_directory(out: Path, marker: str) -> Path:
    """Create an output directory, or check that an existing one contains no earlier result.

    Raises:
        TrainingError: The directory contains a result or cannot be created.
    """
    if (out / marker).exists():
        raise TrainingError(f"{out / marker}: already exists; choose another `out`, or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{out}: cannot be created: {error}") from error
    return out


def _load(config: ModelConfig | None) -> LanguageModel | None:
    return None if config is None else load_language_model(config)


def _draw_arms(
    config: EvalConfig,
    sampler: ArmSampler,
    prompter: LanguageModel | None,
    reference: LanguageModel | None,
    oracle: LanguageModel | None,
) -> dict[str, ArmSamples]:
    K, M = config.rewrites_per_prompt, config.responses_per_rewrite
    arms = {"no_finetuning": sampler.responses("no_finetuning", sampler.target, K * M)}
    if reference is not None:
        arms["sft_prompter"] = sampler.rewrites("sft_prompter", reference, K)
        if config.gibbs_candidates:
            candidates = sampler.rewrites("candidates", reference, config.gibbs_candidates)
            arms["candidates"] = candidates
            arms["gibbs"] = sampler.gibbs(candidates, reference, config.kl_coef, K)
    if prompter is not None:
        arms["align_pro"] = sampler.rewrites("align_pro", prompter, K)
    if oracle is not None:
        arms["oracle"] = sampler.responses("oracle", oracle, K * M)
    return arms


def _compare(
    config: EvalConfig,
    sampler: ArmSampler,
    arms: dict[str, ArmSamples],
    prompter: LanguageModel | None,
    reference: LanguageModel | None,
    oracle: LanguageModel | None,
    seconds: float,
) -> Evaluation:
    kl: dict[str, float] = {}
    if prompter is not None and reference is not None:
        encode = sampler.environment(prompter).encode
        inputs = [encode(prompt) for prompt in sampler.prompts]
        kl["align_pro"] = sequence_kl(prompter, reference, inputs, arms["align_pro"], config.rewrite.temperature or 1.0)
    if oracle is not None:
        inputs = _target_inputs(sampler, config)
        kl["oracle"] = sequence_kl(oracle, sampler.target, inputs, arms["oracle"], config.respond.temperature or 1.0)
    baseline = arms["no_finetuning"].rewards
    summaries = [
        summarize_arm(
            name,
            LABELS[name],
            arms[name].rewards,
            baseline=None if name == "no_finetuning" else baseline,
            kl=kl.get(name),
            resamples=config.bootstrap,
            seed=config.seed,
        )
        for name in LABELS
        if name in arms
    ]
    gap = None
    if "align_pro" in arms and "oracle" in arms:
        gap = gap_recovered(
            baseline, arms["align_pro"].rewards, arms["oracle"].rewards, resamples=config.bootstrap, seed=config.seed
        )
    gibbs = None
    if "candidates" in arms:
        weighed = sampler.weigh(arms["candidates"], config.kl_coef)
        gibbs = {
            "candidates": float(config.gibbs_candidates),
            "log_partition": weighed.value.mean().item(),
            "effective_sample_size": weighed.effective_sample_size.mean().item(),
            "kl": weighed.kl.mean().item(),
        }
    bound = _bound(config, sampler, arms, oracle) if config.bound else None
    return Evaluation(summaries, gap, kl.get("align_pro"), bound, gibbs, _sample_rows(sampler.prompts, arms), seconds)


def _bound(
    config: EvalConfig, sampler: ArmSampler, arms: dict[str, ArmSamples], oracle: LanguageModel | None
) -> BoundSummary:
    """Both sides of the bound. If they cannot be computed, the note states why and the evaluation continues."""
    if oracle is None or "align_pro" not in arms or "sft_prompter" not in arms:
        return BoundSummary(None, None, note="not computable: it requires a prompter, its reference and an oracle")
    respond = config.respond
    if respond.temperature == 0 or respond.top_k or respond.top_p < 1 or respond.min_p:
        return BoundSummary(
            None, None, note="not computable: responses are not drawn from the target's unfiltered distribution"
        )
    inputs = _target_inputs(sampler, config)
    P = len(sampler.prompts)

    def flat(name: str) -> torch.Tensor:
        return arms[name].rewards.flatten(1)

    # TV(π*, π_F): y ~ π*(.|x), scored under both.
    drawn = [chain.sample for group in arms["oracle"].chains for chain in group]
    x = [ids for ids, group in zip(inputs, arms["oracle"].chains, strict=True) for _ in group]
    oracle_pair = [logprobs(m, x, drawn, respond.temperature).view(P, -1) for m in (oracle, sampler.target)]
    # TV(π_F(.|x), π_F(.|x')): y ~ π_F(.|x'), x' ~ ρ_sft, scored given x' and given x.
    chains = [(i, chain) for i, group in enumerate(arms["sft_prompter"].chains) for chain in group]
    answers = [y for _, chain in chains for y in chain.responses]
    x_prime = [chain.target_tokens for _, chain in chains for _ in chain.responses]
    x = [inputs[i] for i, chain in chains for _ in chain.responses]
    rewrite_pair = [logprobs(sampler.target, p, answers, respond.temperature).view(P, -1) for p in (x_prime, x)]
    try:
        bound = sampled_bound(
            oracle_rewards=flat("oracle"),
            prompter_rewards=flat("align_pro"),
            reference_rewards=flat("sft_prompter"),
            r_max=config.r_max,
            oracle_logprobs=(oracle_pair[0], oracle_pair[1]),
            rewrite_logprobs=(rewrite_pair[0], rewrite_pair[1]),
        )
    except ConfigError as error:
        return BoundSummary(None, None, note=f"not computable: {error}")
    terms = {
        "r_max TV(π*, π_F)": bound.target_shift or 0.0,
        "r_max TV(π_F(.|x), π_F(.|x'))": bound.rewrite_shift or 0.0,
        "−(E_ρ R − E_ρ_sft R)": -bound.prompter_gain,
    }
    note = f"estimated from samples; standard errors {bound.lhs_stderr:.3g} (left) and {bound.rhs_stderr:.3g} (right)"
    return BoundSummary(bound.lhs, bound.rhs, terms, note)


def _target_inputs(sampler: ArmSampler, config: EvalConfig) -> list[list[int]]:
    """The target's tokens for each original prompt."""
    template = ChatTemplate(sampler.target.tokenizer, config.target_model.chat_template)
    encode = ResponseEnvironment(template, sampler.reward).encode
    return [encode(prompt) for prompt in sampler.prompts]


def _sample_rows(prompts: Sequence[Prompt], arms: dict[str, ArmSamples]) -> list[SampleRow]:
    """One row per sample of each arm, with its first response. Arms are interleaved, so that truncation keeps all arms."""
    rows: list[SampleRow] = []
    for i, prompt in enumerate(prompts):
        for name in LABELS:
            if name not in arms:
                continue
            scores = arms[name].scores
            for k, responses in enumerate(scores.responses[i]):
                rows.append(
                    SampleRow(
                        arm=name,
                        prompt=prompt.text,
                        rewrite=scores.samples[i][k] if arms[name].scores_rewrites else None,
                        response=responses[0],
                        reward=scores.rewards[i, k, 0].item(),
                    )
                )
    return rows


def _write(
    out: Path,
    config: EvalConfig,
    result: Evaluation,
    summary: Mapping[str, Any],
) -> None:
    pair = _pair(config)
    with (out / "samples.jsonl").open("w", encoding="utf-8", errors="surrogatepass") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
    plot_comparison([ArmGroup(pair, result.arms)], out / "figure.png")
    report = Report(
        title=config.title,
        pair=pair,
        arms=result.arms,
        gap=result.gap,
        bound=result.bound,
        kl_coef=config.kl_coef,
        curves=_curves(config),
        rows=result.rows[:_SHOWN_ROWS],
        configuration=dump_config(config),
        versions=summary["versions"],
        created=time.strftime("%Y-%m-%d"),
    )
    write_report(out / "report.html", report)
    (out / "config.yaml").write_text(dump_config(config))
    # Written last and atomically: this file marks the evaluation as complete.
    replace_text(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
    for arm in result.arms:
        logger.info("%-16s mean %.4f  [%.4f, %.4f]  variance %.4f", arm.label, arm.mean, *arm.ci95, arm.variance.total)
    if result.gap:
        logger.info("gap recovered    %.3f  [%.3f, %.3f]", result.gap.value, result.gap.low, result.gap.high)
    logger.info("%s  %s  %s", out / "summary.json", out / "figure.png", out / "report.html")


def _curves(config: EvalConfig) -> dict[str, list[dict[str, Any]]]:
    """Label → metrics of the run that produced a model, if the model is the ``model/`` of a run directory."""
    models = {"align_pro": config.prompter, "oracle": config.oracle}
    rows = {LABELS[arm]: read_rows(Path(m.path).parent / "metrics.jsonl") for arm, m in models.items() if m is not None}
    return {label: metrics for label, metrics in rows.items() if metrics}


def _pair(config: EvalConfig) -> str:
    """The name of the pair in the figure: the models' directories, or the run directory if a path is a run's ``model/``."""

    def name(model: ModelConfig) -> str:
        path = Path(model.path)
        return path.parent.name if path.name == "model" else path.name

    named = config.prompter or config.reference
    return f"{name(named)} → {name(config.target_model)}" if named else name(config.target_model)
