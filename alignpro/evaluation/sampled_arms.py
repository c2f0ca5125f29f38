"""Which arms an evaluation samples, and how each is sampled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from alignpro.config import EvalConfig, target_endpoints
from alignpro.config.jobs import INSTRUCTION
from alignpro.errors import ConfigError
from alignpro.evaluation.arms import ArmSampler, ArmSamples
from alignpro.models.language_model import LanguageModel
from alignpro.models.mixed_model import check_mixable, mix_models, share_equal_weights
from alignpro.objectives import best_of_kl, best_of_weights
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.rewrite_template import RewriteTemplate


@dataclass(frozen=True)
class Trained:
    """The models that are compared with the target, as far as the configuration names them."""

    prompter: LanguageModel | None
    reference: LanguageModel | None
    """ρ_sft, the prompter before training."""
    oracle: LanguageModel | None

    def share_weights(self, targets: Iterable[LanguageModel]) -> None:
        """Hold once what all these models have in common, such as the base of a target and of a LoRA on it."""
        own = (self.reference, self.prompter, self.oracle)
        share_equal_weights([*targets, *(model for model in own if model is not None)])

    def check_strengths(self, strengths: Iterable[float]) -> None:
        """Check that the prompter can be had at these strengths, before anything is sampled; raises as `at_strength`."""
        if any(strength not in (0, 1) for strength in strengths):
            assert self.prompter is not None and self.reference is not None  # the configuration requires both
            check_mixable(self.prompter.name, [*self.prompter.parts, *self.reference.parts])

    def at_strength(self, strength: float) -> LanguageModel:
        """The prompter ρ_sft^{1−s} ρ^s, token by token.

        Raises:
            ModelError: The prompters before and after training cannot be mixed; see `MixedModel`.
        """
        assert self.prompter is not None and self.reference is not None  # the configuration requires both
        share_equal_weights([self.reference, self.prompter])
        return mix_models([self.prompter], [strength], self.reference, f"the prompter at strength {strength:g}")


def sample_arms(config: EvalConfig, sampler: ArmSampler, trained: Trained) -> dict[str, ArmSamples]:
    """Sample the arms of an evaluation; those that choose among candidates come with these, as ``candidates``.

    Returns:
        Key of the arm → its samples, in the order of `EvalConfig.sampled_arms`.
    """
    K, M = config.rewrites_per_prompt, config.responses_per_rewrite
    templates = instruction_templates(written_instructions(config))
    sizes = {name: count for name, count in config.candidate_counts.items() if name in config.sampled_arms}
    arms: dict[str, ArmSamples] = {}
    trained.check_strengths(strength for name, strength in config.dial_arms.items() if name in config.sampled_arms)
    if sizes:
        assert trained.reference is not None  # the configuration requires it
        arms["candidates"] = sampler.sample_rewrites("candidates", trained.reference, max(sizes.values()))
    for name in config.sampled_arms:
        if name in templates:
            arms[name] = sampler.sample_instruction(name, templates[name], K * M)
        elif name in sizes:
            assert trained.reference is not None
            chosen_from = arms["candidates"].first(sizes[name])
            arms[name] = sampler.resample(
                chosen_from, trained.reference, _weights(config, name, sampler, chosen_from), K, name
            )
        elif name in config.dial_arms:
            arms[name] = sampler.sample_rewrites(name, trained.at_strength(config.dial_arms[name]), K)
        elif name == "no_finetuning":
            arms[name] = sampler.sample_unchanged(K * M)
        elif name == "oracle":
            assert trained.oracle is not None
            arms[name] = sampler.sample_oracle(trained.oracle, oracle_template(config, trained.oracle), K * M)
        else:
            prompter = trained.reference if name == "sft_prompter" else trained.prompter
            assert prompter is not None
            arms[name] = sampler.sample_rewrites(name, prompter, K)
    return arms


def _weights(config: EvalConfig, name: str, sampler: ArmSampler, candidates: ArmSamples) -> Tensor:
    """(P, N): how an arm chooses among its candidates."""
    if name in config.best_of_arms:
        return best_of_weights(candidates.scores.values.double())
    return sampler.gibbs_weights(candidates, config.kl_coef).weights


def candidate_kl(config: EvalConfig, sampler: ArmSampler, arms: Mapping[str, ArmSamples]) -> dict[str, Tensor]:
    """Key of each sampled arm that chooses among candidates → (P,) the most that its KL to ρ_sft can be on average, in nats."""
    found = {}
    for name, count in config.candidate_counts.items():
        if name in arms:
            candidates = arms["candidates"].first(count)
            best = name in config.best_of_arms
            found[name] = (
                best_of_kl(_weights(config, name, sampler, candidates))
                if best
                else sampler.gibbs_weights(candidates, config.kl_coef).kl
            )
    return found


def count_responses(config: EvalConfig) -> int:
    """How many responses to each prompt are sampled, those of the candidates that some arms choose among included."""
    candidates = [config.candidate_counts[name] for name in config.sampled_arms if name in config.candidate_counts]
    rewrites = len(config.sampled_arms) * config.rewrites_per_prompt + max(candidates, default=0)
    return rewrites * config.responses_per_rewrite


def written_instructions(config: EvalConfig) -> dict[str, str]:
    """Name → instruction, those in files included.

    Raises:
        ConfigError: A file cannot be read.
    """
    found = dict(config.instructions)
    for name, path in config.instruction_files.items():
        try:
            found[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"instruction_files.{name}: {path}: cannot be read: {error}") from error
    return found


def instruction_templates(instructions: Mapping[str, str]) -> dict[str, RewriteTemplate]:
    """Key of the arm of each hand-written instruction → its template.

    Raises:
        ConfigError: One is not a template; the message names it.
    """
    return {
        f"{INSTRUCTION}{name}": RewriteTemplate(text, f"instructions.{name}") for name, text in instructions.items()
    }


def oracle_template(config: EvalConfig, oracle: LanguageModel) -> ChatTemplate:
    """The oracle's chat template: that of the target, which it has been; its own if the target's is not known."""
    local = not target_endpoints(config.target)
    model = config.target_model if local else config.oracle
    assert model is not None  # because there is an oracle
    return ChatTemplate(oracle.tokenizer, model.chat_template, stop_token_ids=oracle.end_token_ids)
