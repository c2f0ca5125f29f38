"""The configuration of each command: its sections, and the constraints between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from alignpro.config.data import DataConfig, PromptingConfig, SFTDataConfig
from alignpro.config.endpoints import EndpointConfig, SpendingConfig
from alignpro.config.judging import JudgingConfig
from alignpro.config.learning import ObjectiveConfig, OptimizerConfig
from alignpro.config.memory import MemoryConfig
from alignpro.config.models import ModelConfig, PolicyConfig, TrainableModelConfig
from alignpro.config.refusals import RefusalsConfig
from alignpro.config.rewards import RewardConfig
from alignpro.config.rollout import EngineConfig, ResponseRolloutConfig, RolloutConfig, SamplingConfig
from alignpro.config.run import DeepSpeedConfig, RunSection, SelectingSection
from alignpro.config.section import OutputPath, Section
from alignpro.config.self_reward import SelfRewardConfig
from alignpro.config.targets import (
    PolicyOrTarget,
    PrompterOrTarget,
    TargetConfig,
    TargetMixtureConfig,
    check_spending,
    target_endpoints,
)


class TrainConfig(SelectingSection, SpendingConfig):
    """`alignpro train`: train a prompter against a frozen target."""

    policy: PolicyConfig
    target: PolicyOrTarget
    reward: RewardConfig
    prompting: PromptingConfig = PromptingConfig()
    memory: MemoryConfig | None = None
    """Which past rewrites of similar prompts the prompter sees; None for none."""
    rollout: RolloutConfig = RolloutConfig()
    environment: str | None = None
    """A class of the user's own in place of `PromptEnvironment`, which it extends, as package.module:Class or file.py:Class."""
    environment_params: dict[str, Any] = Field(default_factory=dict)
    """Its further arguments."""
    self_reward: SelfRewardConfig | None = None
    """If given, the policy learns from candidates that it grows and judges itself; by default from the reward of its samples."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @property
    def target_model(self) -> ModelConfig:
        """The configuration of one target in this process; the policy's if the target is its base model.

        Raises:
            TypeError: The target is behind a server, or there are several.
        """
        return _model_of(self.target, self.policy)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        check_spending(self, [*target_endpoints(self.target), *self.reward.endpoints])
        if self.target == "policy" and self.policy.adapter.kind != "lora":
            raise ValueError(
                f"target=policy with policy.adapter.kind={self.policy.adapter.kind or 'full'}: the target is the model below the "
                "policy's LoRA: set policy.adapter.kind=lora, or name the target's model"
            )
        if isinstance(self.target, TargetMixtureConfig) and self.reward.keeps_refusals:
            raise ValueError("refusal_kept compares with the refusals of one target: give it alone as `target`")
        _check_group(self.objective, self.rollout.rewrites_per_prompt, "rollout.rewrites_per_prompt")
        _check_on_policy(self.rollout.rewrite, "rollout.rewrite")
        _check_minibatches(self.objective, self.rollout.prompts_per_step)
        if self.rollout.ahead:
            _check_ahead(self.objective)
            if self.memory is not None:
                raise ValueError(
                    "rollout.ahead=1 with memory: rewrites drawn ahead would have seen another memory than the step that learns "
                    "from them: set rollout.ahead=0, or leave `memory` out"
                )
        if self.self_reward is not None:
            if self.memory is not None:
                raise ValueError(
                    "self_reward with memory: rewrites that the policy judges itself have no reward to remember: leave one out"
                )
            mixture = isinstance(self.target, TargetMixtureConfig)
            self.self_reward.check(self.rollout, self.objective, self.deepspeed, self.environment, mixture=mixture)
        return self


class RLHFConfig(SelectingSection, SpendingConfig):
    """`alignpro rlhf`: fine-tune the target itself on the same reward (the oracle)."""

    policy: PolicyConfig
    reward: RewardConfig
    rollout: ResponseRolloutConfig = ResponseRolloutConfig()
    environment: str | None = None
    """Likewise, in place of `ResponseEnvironment`."""
    environment_params: dict[str, Any] = Field(default_factory=dict)
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    max_prompt_tokens: int = Field(1024, ge=1)

    @model_validator(mode="after")
    def _check(self) -> RLHFConfig:
        check_spending(self, self.reward.endpoints)
        _check_group(self.objective, self.rollout.responses_per_prompt, "rollout.responses_per_prompt")
        _check_on_policy(self.rollout.respond, "rollout.respond")
        _check_minibatches(self.objective, self.rollout.prompts_per_step)
        return self


class SFTConfig(RunSection):
    """`alignpro sft`: fine-tune the prompter on (x, x') pairs, or a plain language model on (x, y) pairs."""

    data: SFTDataConfig
    policy: PolicyConfig
    task: Literal["rewrite", "response"] = "rewrite"
    prompting: PromptingConfig = PromptingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch_size: int = Field(64, ge=1)
    max_tokens: int = Field(1024, ge=2)
    """Maximum length of prompt plus completion; longer sequences are truncated on the right and counted."""

    @property
    def required_fields(self) -> tuple[str, ...]:
        """The fields that every row of the data must have, besides the prompt: none if moves write the rewrites."""
        return () if self.data.moves is not None else (self.task,)

    @model_validator(mode="after")
    def _check_moves(self) -> SFTConfig:
        if self.data.moves is not None and self.task != "rewrite":
            raise ValueError(f"data.moves with task={self.task}: moves write rewrites: leave one of them out")
        return self


class RewardModelConfig(RunSection):
    """`alignpro reward`: train a Bradley-Terry reward model on preference pairs."""

    model: TrainableModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    batch_size: int = Field(32, ge=1)
    max_length: int = Field(2048, ge=2)


INSTRUCTION = "instruction_"
"""What the key of an arm of a hand-written instruction begins with; the instruction's name follows."""

CandidateCount = Annotated[int, Field(ge=2)]
Strength = Annotated[float, Field(ge=0, le=2)]
InstructionName = Annotated[str, Field(pattern=r"^\w+$")]


class ComparisonConfig(SpendingConfig):
    """What the commands that compare arms have in common: prompts and target, and how they are sampled."""

    out: OutputPath
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataConfig
    target: PrompterOrTarget
    prompting: PromptingConfig = PromptingConfig()
    prompter: ModelConfig | None = None
    rewrite: SamplingConfig = SamplingConfig()
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()

    @property
    def target_model(self) -> ModelConfig:
        """The configuration of one target in this process; the prompter's if the target is its base model.

        Raises:
            TypeError: The target is behind a server, or there are several.
        """
        return _model_of(self.target, self.prompter)

    @property
    def rewards(self) -> list[RewardConfig]:
        """The rewards that score the responses."""
        raise NotImplementedError

    @property
    def reward_endpoints(self) -> list[EndpointConfig]:
        """The servers that the rewards ask."""
        return [endpoint for reward in self.rewards for endpoint in reward.endpoints]

    @model_validator(mode="after")
    def _check_target(self) -> ComparisonConfig:
        check_spending(self, [*target_endpoints(self.target), *self.reward_endpoints])
        if self.target == "prompter" and self.prompter is None:
            raise ValueError("target=prompter: the target is the model below the prompter's LoRA: name the `prompter`")
        return self


class EvalConfig(ComparisonConfig):
    """`alignpro eval`: compare arms on held-out prompts."""

    reward: RewardConfig
    prompter: ModelConfig | None = None
    """The trained prompter: arm ``align_pro``."""
    reference: ModelConfig | None = None
    """ρ_sft: arm ``sft_prompter``; needed for KL, Gibbs and the bound."""
    oracle: ModelConfig | None = None
    """The target after RLHF: arm ``oracle``."""
    prompts: int = Field(128, ge=2)
    rewrites_per_prompt: int = Field(4, ge=2)
    responses_per_rewrite: int = Field(2, ge=2)
    instructions: dict[InstructionName, str] = Field(default_factory=dict)
    """Name → hand-written instruction, which is appended to every prompt after a blank line, or a Jinja template around
    ``{{ prompt }}``: arm ``instruction_NAME``."""
    instruction_files: dict[InstructionName, Path] = Field(default_factory=dict)
    """Likewise, name → a text file that is read when the evaluation begins, such as the instruction.txt of `alignpro rival`."""
    gibbs_candidates: Literal[0] | CandidateCount | Annotated[list[CandidateCount], Field(min_length=1)] = 0
    """Number N of rewrites of ρ_sft to resample from; 0 omits the arm ``gibbs``. Several numbers are the arms ``gibbs_N``:
    the rewrites are drawn once, and a smaller N has the first of them."""
    best_of: list[CandidateCount] = Field(default_factory=list)
    """Numbers N of rewrites of ρ_sft of which the one with the highest reward is kept and answered anew: arms ``best_of_N``.
    They are the first of the candidates of Gibbs resampling, if there are any."""
    strengths: list[Strength] = Field(default_factory=list)
    """Each s is an arm ``dial_s``: the prompter ρ_sft^{1−s} ρ^s, token by token, which needs `reference` and `prompter`."""
    arms: list[str] | None = None
    """The arms to sample; by default all that the other keys describe. Without ``no_finetuning`` there are no differences."""
    also_fit: list[ModelConfig] = Field(default_factory=list)
    """Prompters that are evaluated elsewhere on the same prompts: what is too long for one of them is left out here, too. Only
    their tokenizers are loaded; of one with an adapter, ``path`` is its base model."""
    kl_coef: float = Field(0.05, ge=0)
    bound: bool = False
    r_max: float = Field(1.0, gt=0)
    """Upper end of the reward's range [0, r_max], for the bound."""
    title: str = "Align-Pro"
    judge: JudgingConfig | None = None
    """Who compares the arms' responses in pairs."""
    refusals: RefusalsConfig | None = None
    """On which prompts refusals are counted."""

    @model_validator(mode="before")
    @classmethod
    def _ignore_retired_key(cls, given: Any) -> Any:
        """Ignore ``bootstrap``, which is in the config.yaml of evaluations by earlier versions: intervals draw nothing."""
        return {key: value for key, value in given.items() if key != "bootstrap"} if isinstance(given, dict) else given

    @property
    def rewards(self) -> list[RewardConfig]:
        """The one reward."""
        return [self.reward]

    @property
    def reward_endpoints(self) -> list[EndpointConfig]:
        """The servers that the reward, the judges and the harm score ask."""
        others = [each.endpoints for each in (self.judge, self.refusals) if each is not None]
        return [*super().reward_endpoints, *(endpoint for each in others for endpoint in each)]

    @property
    def gibbs_arms(self) -> dict[str, int]:
        """Key of each arm of Gibbs resampling that the configuration describes → its N."""
        if isinstance(self.gibbs_candidates, int):
            return {"gibbs": self.gibbs_candidates} if self.gibbs_candidates else {}
        return gibbs_arms(self.gibbs_candidates)

    @property
    def best_of_arms(self) -> dict[str, int]:
        """Key of each arm of best-of-N → its N."""
        return {f"best_of_{count}": count for count in sorted(set(self.best_of))}

    @property
    def candidate_counts(self) -> dict[str, int]:
        """Key of each arm that chooses among candidates → the number of them."""
        return self.gibbs_arms | self.best_of_arms

    @property
    def dial_arms(self) -> dict[str, float]:
        """Key of each arm of the prompter at another strength → s."""
        return dial_arms(self.strengths)

    @property
    def described_arms(self) -> list[str]:
        """The keys of all arms that the configuration describes, in the order of figures and reports."""
        return [
            "no_finetuning",
            *(f"{INSTRUCTION}{name}" for name in {**self.instructions, **self.instruction_files}),
            *(["sft_prompter"] if self.reference is not None else []),
            *self.candidate_counts,
            *(["align_pro"] if self.prompter is not None else []),
            *self.dial_arms,
            *(["oracle"] if self.oracle is not None else []),
        ]

    @property
    def sampled_arms(self) -> list[str]:
        """Those that are sampled."""
        return [name for name in self.described_arms if self.arms is None or name in self.arms]

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.gibbs_arms and self.reference is None:
            raise ValueError(
                "gibbs_candidates are rewrites of ρ_sft: they need `reference`, the prompter before training"
            )
        if self.best_of and self.reference is None:
            raise ValueError("best_of are rewrites of ρ_sft: they need `reference`, the prompter before training")
        if self.gibbs_arms and self.kl_coef == 0:
            raise ValueError("gibbs_candidates weighs rewrites by exp(R/λ): kl_coef must be positive")
        if twice := sorted(self.instructions.keys() & self.instruction_files.keys()):
            raise ValueError(f"instruction_files.{twice[0]}: instructions has this name too: give one of them another")
        if self.strengths and (self.reference is None or self.prompter is None):
            raise ValueError("strengths lead from ρ_sft to the trained prompter: they need `reference` and `prompter`")
        unknown = [name for name in self.arms or [] if name not in self.described_arms]
        if unknown or self.arms == []:
            raise ValueError(
                f"arms: {unknown[0] if unknown else 'none'}: expected some of {', '.join(self.described_arms)}; others need "
                "their key (prompter, reference, oracle, instructions, gibbs_candidates, best_of, strengths)"
            )
        if self.judge is not None and (other := [x for x in self.judge.against if x not in self.sampled_arms]):
            raise ValueError(
                f"judge.against: {other[0]}: is not sampled, so nothing can be compared with it: expected some of "
                f"{', '.join(self.sampled_arms)}"
            )
        return self


class TaskConfig(Section):
    """A task whose headroom is measured."""

    reward: RewardConfig
    instructions: dict[InstructionName, str] = Field(default_factory=dict)
    """As in `EvalConfig`: what a person would write to raise this reward."""


class HeadroomConfig(ComparisonConfig):
    """`alignpro headroom`: what a prompter could gain on each of some tasks, before it is trained."""

    prompter: ModelConfig
    """ρ_sft, the prompter that training would start from."""
    tasks: dict[InstructionName, TaskConfig] = Field(min_length=1)
    prompts: int = Field(48, ge=2)
    rewrites_per_prompt: int = Field(2, ge=2)
    """Rewrites of a prompt in the arm of ρ_sft as it is, and kept of its candidates by Gibbs resampling."""
    responses_per_rewrite: int = Field(2, ge=2)
    gibbs_candidates: list[CandidateCount] = Field(default=[4, 16, 64], min_length=1)
    """As in `EvalConfig`. All tasks score the same candidates and the same responses to them."""
    kl_coef: float = Field(0.05, gt=0)
    worthwhile: float = Field(0.05, gt=0)
    """The least gain over no fine-tuning, in units of the reward, for which training is worth its cost."""
    moves: str = "default"
    """The moves among which the rewrites of ρ_sft are counted: ``default``, or the file that it was fine-tuned on."""

    @property
    def rewards(self) -> list[RewardConfig]:
        """Those of the tasks."""
        return [task.reward for task in self.tasks.values()]

    @property
    def gibbs_arms(self) -> dict[str, int]:
        """Key of each arm of Gibbs resampling → its N."""
        return gibbs_arms(self.gibbs_candidates)

    @model_validator(mode="after")
    def _check_one_target(self) -> HeadroomConfig:
        if isinstance(self.target, TargetMixtureConfig):
            raise ValueError("target.mixture: headroom is measured on one target: give it alone as `target`")
        if any(reward.keeps_refusals for reward in self.rewards):
            raise ValueError("refusal_kept: headroom is measured without this guard: leave it out, and train with it")
        return self


def gibbs_arms(candidates: Sequence[int]) -> dict[str, int]:
    """Key of the arm of Gibbs resampling with each of several numbers N → N, in ascending order."""
    return {f"gibbs_{count}": count for count in sorted(set(candidates))}


def dial_arms(strengths: Sequence[float]) -> dict[str, float]:
    """Key of the arm of a prompter at each of several strengths s → s, in ascending order."""
    return {f"dial_{strength:g}": strength for strength in sorted(set(strengths))}


class OptimalConfig(ComparisonConfig):
    """`alignpro optimal`: training-free Gibbs resampling of N rewrites of ρ_sft."""

    reward: RewardConfig
    prompter: ModelConfig
    prompts: int = Field(128, ge=1)
    candidates: int = Field(16, ge=2)
    responses_per_rewrite: int = Field(2, ge=1)
    kl_coef: float = Field(0.05, gt=0)

    @property
    def rewards(self) -> list[RewardConfig]:
        """The one reward."""
        return [self.reward]

    @model_validator(mode="after")
    def _check_one_target(self) -> OptimalConfig:
        if isinstance(self.target, TargetMixtureConfig):
            raise ValueError("target.mixture: rewrites are resampled for one target: give it alone as `target`")
        return self


def _model_of(target: TargetConfig, adapted: ModelConfig | None) -> ModelConfig:
    model = adapted if isinstance(target, str) else target
    if not isinstance(model, ModelConfig):
        raise TypeError(f"a {type(model).__name__} is no model of this process")
    return model


def _check_group(objective: ObjectiveConfig, group: int, key: str) -> None:
    if group < 2:
        from alignpro.objectives import ADVANTAGES, LOSSES  # imports torch, for which larger groups need not wait

        if objective.loss in LOSSES and objective.advantage in ADVANTAGES:  # the user's own are checked when loaded
            objective.check_group(LOSSES[objective.loss], ADVANTAGES[objective.advantage], group, key)


def _check_ahead(objective: ObjectiveConfig) -> None:
    from alignpro.objectives import ADVANTAGES, LOSSES  # imports torch, for which other configurations need not wait

    if objective.loss in LOSSES and objective.advantage in ADVANTAGES:  # the user's own are checked when loaded
        objective.check_ahead(LOSSES[objective.loss], ADVANTAGES[objective.advantage])


def _check_on_policy(sampling: SamplingConfig, key: str) -> None:
    if sampling.temperature == 0 or sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0:
        raise ValueError(
            f"{key}: the policy is trained on samples of its own unfiltered distribution: this requires temperature > 0, "
            "top_k=0, top_p=1 and min_p=0"
        )


def _check_minibatches(objective: ObjectiveConfig, prompts_per_step: int) -> None:
    if objective.minibatches > prompts_per_step:
        raise ValueError(
            f"objective.minibatches={objective.minibatches} is more than rollout.prompts_per_step={prompts_per_step}: "
            "a minibatch holds whole groups, so there can be at most one per prompt"
        )
