"""Typed run configuration.

A run is described by YAML files and dotted overrides (``optimizer.learning_rate=1e-4``), merged left to right.
OmegaConf merges and interpolates, pydantic types and checks. An unknown key or a bad value is an error that names the
key. Here is what can be configured; `alignpro.config_loading` reads and writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from alignpro.config_loading import dump_config as dump_config
from alignpro.config_loading import load_config as load_config
from alignpro.config_loading import validate_config as validate_config


class Section(BaseModel):
    """A part of the configuration: immutable, strict about unknown keys, and every number in it is finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


# --------------------------------------------------------------------------------------------------------------- models


class AdapterConfig(Section):
    """What of the policy is trained: all weights, a LoRA, or a soft prompt (both by peft)."""

    kind: Literal["full", "lora", "soft_prompt"] = "full"
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    activated: bool = False
    """The LoRA acts from its invocation on (Greenewald et al., 2025): what stands before is as in the base model."""
    invocation: str | None = None
    """The text with which an activated LoRA begins to act, in every prompt; what opens the assistant's turn when absent."""
    virtual_tokens: int = Field(20, ge=1)
    init_text: str | None = None

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if self.activated and self.kind != "lora":
            raise ValueError(f"activated=true with kind={self.kind}: only a LoRA can be activated: set kind=lora")
        if self.invocation is not None and not (self.activated and self.invocation):
            raise ValueError("`invocation` is the text at which an activated LoRA begins: it needs activated=true")
        return self


class ModelConfig(Section):
    """A causal language model, or a sequence classifier for rewards, by name or directory."""

    path: str
    tokenizer: str | None = None
    """Name or directory of the tokenizer; the model's own when absent."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    attention: str = "sdpa"
    chat_template: str | None = None
    """``plain``, or a file with a Jinja template; the tokenizer's own when absent."""
    pad_token: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False


class TrainableModelConfig(ModelConfig):
    """A model that is trained."""

    from_scratch: bool = False
    """Start from random weights: ``path`` then needs no more than a ``config.json``."""
    gradient_checkpointing: bool = False


class PolicyConfig(TrainableModelConfig):
    """The policy: a causal language model, and what of it is trained."""

    adapter: AdapterConfig = AdapterConfig()
    reference: str | None = None
    """Path of the frozen reference ρ_sft; where the policy starts from when absent."""


# ----------------------------------------------------------------------------------------------------------------- data


class DataConfig(Section):
    """Where prompts come from: a preset by name, or local files with a column mapping."""

    source: str | list[str]
    """A preset (``ultrafeedback``, ``helpsteer``, ``orca``, ``hh-rlhf``, ``bpo``), or paths of local files: .json, .jsonl,
    .csv, .parquet, also gzipped."""
    split: str | None = None
    columns: dict[str, str] = {}
    """Field of `Prompt` -> column; dots reach into nested fields (``conversations.0.value``)."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of prompts held out for evaluation, decided by a hash of the content."""
    limit: int | None = Field(None, ge=1)
    max_bad_rows: int = Field(100, ge=0)


class PromptingConfig(Section):
    """How x becomes the prompter's input and x' the target's."""

    meta_prompt: str = "none"
    """A built-in (`alignpro doctor` lists them) or a Jinja file."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Prompter input longer than this is an error for that prompt at data load, which is dropped and counted."""
    on_empty: Literal["send", "original"] = "send"
    """An empty rewrite is sent as it is (the target sees an empty user message), or replaced by the original prompt."""
    truncation_penalty: float = Field(0.0, ge=0)
    """Subtracted from the reward of a rewrite that reached its token limit without an end token."""


class SamplingConfig(Section):
    """How tokens are drawn."""

    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a sequence, and are no part of what it says. For a policy that is trained, the tokens of such a text are
    actions like all others: where a sequence ends is decided by what it has drawn, so nothing is biased."""


class EngineConfig(Section):
    """Memory and batches of generation; `alignpro.engine.Engine` says more."""

    max_batch: int = Field(256, ge=1)
    """Sequences of a model that run at once."""
    pool_bytes: int | None = Field(None, ge=1)
    """Memory for keys and values on each device; chosen by the device when absent."""
    page_tokens: int = Field(16, ge=1)
    """Tokens of the largest model in a page."""
    token_budget: int = Field(4096, ge=1)
    """Tokens computed in one forward pass; what is left of long prompts waits for the next."""
    cuda_graphs: bool | None = None
    """Whether passes of next tokens alone are replayed as CUDA graphs; where they can be when absent."""


# -------------------------------------------------------------------------------------------------------------- rewards


class FunctionRewardConfig(Section):
    """A Python function ``fn(prompts, responses, **params) -> list[float]`` by dotted path (``package.module:name``)."""

    kind: Literal["function"]
    function: str
    name: str | None = None
    weight: float = 1.0
    params: dict[str, Any] = {}


class ModelRewardConfig(Section):
    """A sequence-classification reward model, with its own tokenizer and template."""

    kind: Literal["model"]
    model: ModelConfig
    name: str | None = None
    weight: float = 1.0
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(2048, ge=1)
    scale: float = 1.0
    offset: float = 0.0


class GuardConfig(Section):
    """A drift guard: always a metric of the rewrite against the original, and a penalty if asked.

    Outside [low, high] the penalty grows linearly with the distance, times ``penalty``.
    """

    kind: Literal["length_ratio", "copy_rate", "language_change", "embedding_similarity"]
    penalty: float = Field(0.0, ge=0)
    low: float | None = None
    high: float | None = None
    model: ModelConfig | None = None
    """The encoder, for ``embedding_similarity``."""

    @model_validator(mode="after")
    def _check(self) -> GuardConfig:
        if (self.kind == "embedding_similarity") != (self.model is not None):
            raise ValueError("`model` names the encoder of embedding_similarity: give it there and only there")
        if self.penalty > 0 and self.low is None and self.high is None:
            raise ValueError("a guard with a penalty needs `low`, `high` or both: the range that costs nothing")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}: no value would cost nothing")
        return self


RewardComponentConfig = Annotated[FunctionRewardConfig | ModelRewardConfig, Field(discriminator="kind")]


class RewardConfig(Section):
    """r*(x, y): a weighted sum of components, less the penalties of the guards."""

    components: list[RewardComponentConfig] = Field(min_length=1)
    guards: list[GuardConfig] = []


# ------------------------------------------------------------------------------------------------------------- learning


class KLConfig(Section):
    """The price of leaving the reference."""

    coef: float = Field(0.05, ge=0)
    """λ, the price of one nat of sequence KL."""
    estimator: Literal["exact", "k1", "k2", "k3"] = "exact"
    target: float | None = Field(None, gt=0)
    """Nats a sequence; when given, the coefficient adapts towards it."""
    horizon: int = Field(10_000, ge=1)
    """Samples over which an adaptive coefficient moves (Ziegler et al., 2019)."""

    @model_validator(mode="after")
    def _check(self) -> KLConfig:
        if self.target is not None and self.coef == 0:
            raise ValueError("a target KL is reached by scaling `coef`, which must start above 0")
        return self


class ObjectiveConfig(Section):
    """Which loss, on which advantages."""

    loss: Literal["policy_gradient", "ppo_clip", "gibbs"] = "policy_gradient"
    advantage: Literal["leave_one_out", "group_normalized", "running_baseline", "gae"] = "leave_one_out"
    kl: KLConfig = KLConfig()
    entropy_coef: float = Field(0.0, ge=0)
    clip_range: float = Field(0.2, gt=0)
    gae_lambda: float = Field(1.0, ge=0, le=1)
    value_coef: float = Field(0.5, ge=0)
    baseline_decay: float = Field(0.95, ge=0, lt=1)
    """Decay of the running baseline."""
    normalize_by: Literal["sequence", "token"] = "sequence"
    """Sum over tokens and mean over sequences (the objective's own form), or mean over all tokens of the step."""
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.loss == "policy_gradient" and self.epochs * self.minibatches > 1:
            raise ValueError(
                "policy_gradient is on-policy: it takes epochs=1 and minibatches=1 "
                "(ppo_clip and gibbs may reuse a rollout)"
            )
        if self.loss == "gibbs" and self.kl.coef == 0:
            raise ValueError("gibbs regresses on R/λ: kl.coef must be positive")
        if self.loss == "gibbs" and self.advantage != "leave_one_out":
            raise ValueError("gibbs centres within the group and takes no advantage: leave `advantage` at its default")
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW with warm-up."""

    learning_rate: float = Field(1e-5, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float = Field(1.0, gt=0)
    micro_batch_size: int = Field(64, ge=1)
    """Sequences in one forward and backward pass; gradients accumulate to the step's batch."""


class RolloutConfig(Section):
    """How many chains a step: P prompts, K rewrites each, M responses to each rewrite."""

    prompts_per_step: int = Field(16, ge=1)
    rewrites_per_prompt: int = Field(8, ge=1)
    responses_per_rewrite: int = Field(1, ge=1)
    rewrite: SamplingConfig = SamplingConfig()
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    keep_cache: bool = True
    """On an accelerator the update gets the engine's memory, but for what the frozen target has cached; false: all of it."""


class ResponseRolloutConfig(Section):
    """RLHF of the target: P prompts, K responses each."""

    prompts_per_step: int = Field(16, ge=1)
    responses_per_prompt: int = Field(8, ge=1)
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()


class RunConfig(Section):
    """The run directory and what is written to it, and when."""

    out: Path
    seed: int = Field(0, ge=0)
    steps: int = Field(100, ge=1)
    eval_every: int = Field(0, ge=0)
    eval_prompts: int = Field(64, ge=1)
    checkpoint_every: int = Field(50, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    sample_every: int = Field(10, ge=1)
    """Steps between rows of samples.jsonl."""
    tensorboard: bool = True
    wandb_project: str | None = None


class DeepSpeedConfig(Section):
    """How a job is spread over the ranks that the ``deepspeed`` launcher starts; without a launcher it says nothing."""

    config: str = "z2"
    """``z0``, ``z1``, ``z2``, ``z3``, ``z2_offload`` or ``z3_offload`` (launch/zero/), or the path of a JSON file."""
    target_stage: Literal[0, 3] = 0
    """0: the frozen target is whole on each rank; 3: each rank holds a part, and it is gathered for each rollout."""
    reward_stage: Literal[0, 3] = 0
    """Likewise the reward models, which are gathered to score."""
    gathered_bytes: int | None = Field(None, ge=1)
    """A target or reward model in parts that is larger is not gathered whole, but layer by layer in each pass: about so
    many bytes of its layers at a time. Whole, whatever its size, when absent."""
    offload_reference: bool = False
    """The reference, where it is a model of its own and not in parts, waits in the host's memory while it is not used."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """How long a rank waits for the others before the job ends."""


# ----------------------------------------------------------------------------------------------------------------- jobs

_MODEL_OR_NAME = Discriminator(lambda value: "name" if isinstance(value, str) else "model")
PolicyOrModel = Annotated[
    Annotated[Literal["policy"], Tag("name")] | Annotated[ModelConfig, Tag("model")], _MODEL_OR_NAME
]
"""A model, or ``policy``: the model below the policy's LoRA, with its tokenizer and template, held in memory once."""
PrompterOrModel = Annotated[
    Annotated[Literal["prompter"], Tag("name")] | Annotated[ModelConfig, Tag("model")], _MODEL_OR_NAME
]
"""Likewise, ``prompter``."""


class TrainConfig(Section):
    """`alignpro train`: a prompter against a frozen target."""

    run: RunConfig
    data: DataConfig
    policy: PolicyConfig
    target: PolicyOrModel
    reward: RewardConfig
    prompting: PromptingConfig = PromptingConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @property
    def target_model(self) -> ModelConfig:
        """The target's configuration, also where it is the policy's base model."""
        return self.policy if isinstance(self.target, str) else self.target

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.target == "policy" and self.policy.adapter.kind != "lora":
            raise ValueError(
                f"target=policy with policy.adapter.kind={self.policy.adapter.kind}: the target is the model below the "
                "policy's LoRA: set policy.adapter.kind=lora, or name the target's model"
            )
        _check_group(self.objective, self.rollout.rewrites_per_prompt, "rollout.rewrites_per_prompt")
        _check_on_policy(self.rollout.rewrite, "rollout.rewrite")
        _check_minibatches(self.objective, self.rollout.prompts_per_step)
        return self


class RLHFConfig(Section):
    """`alignpro rlhf`: the target itself, fine-tuned on the same reward (the oracle)."""

    run: RunConfig
    data: DataConfig
    policy: PolicyConfig
    reward: RewardConfig
    rollout: ResponseRolloutConfig = ResponseRolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    max_prompt_tokens: int = Field(1024, ge=1)

    @model_validator(mode="after")
    def _check(self) -> RLHFConfig:
        _check_group(self.objective, self.rollout.responses_per_prompt, "rollout.responses_per_prompt")
        _check_on_policy(self.rollout.respond, "rollout.respond")
        _check_minibatches(self.objective, self.rollout.prompts_per_step)
        return self


class SFTConfig(Section):
    """`alignpro sft`: the prompter from (x, x') pairs, or a plain language model on (x, y)."""

    run: RunConfig
    data: DataConfig
    policy: PolicyConfig
    task: Literal["rewrite", "response"] = "rewrite"
    prompting: PromptingConfig = PromptingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch_size: int = Field(64, ge=1)
    max_tokens: int = Field(1024, ge=2)
    """Prompt and completion together; longer ones are truncated on the right and counted."""


class RewardModelConfig(Section):
    """`alignpro reward`: a Bradley-Terry reward model from preference pairs."""

    run: RunConfig
    data: DataConfig
    model: TrainableModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    batch_size: int = Field(32, ge=1)
    max_length: int = Field(2048, ge=2)


class EvalConfig(Section):
    """`alignpro eval`: arms compared on held-out prompts."""

    out: Path
    seed: int = Field(0, ge=0)
    data: DataConfig
    target: PrompterOrModel
    reward: RewardConfig
    prompting: PromptingConfig = PromptingConfig()
    prompter: ModelConfig | None = None
    """The trained prompter: arm ``align_pro``."""
    reference: ModelConfig | None = None
    """ρ_sft: arm ``sft_prompter``; needed for KL, Gibbs and the bound."""
    oracle: ModelConfig | None = None
    """The target after RLHF: arm ``oracle``."""
    prompts: int = Field(128, ge=2)
    rewrites_per_prompt: int = Field(4, ge=2)
    responses_per_rewrite: int = Field(2, ge=2)
    rewrite: SamplingConfig = SamplingConfig()
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    gibbs_candidates: int = Field(0, ge=0)
    """N rewrites of ρ_sft to resample from; 0 leaves the arm ``gibbs`` out."""
    kl_coef: float = Field(0.05, ge=0)
    bound: bool = False
    r_max: float = Field(1.0, gt=0)
    """Upper end of the reward's range [0, r_max], for the bound."""
    bootstrap: int = Field(2000, ge=100)
    title: str = "Align-Pro"

    @property
    def target_model(self) -> ModelConfig:
        """The target's configuration, also where it is the prompter's base model."""
        if isinstance(self.target, str):
            assert self.prompter is not None  # as is checked below
            return self.prompter
        return self.target

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.target == "prompter" and self.prompter is None:
            raise ValueError("target=prompter: the target is the model below the prompter's LoRA: name the `prompter`")
        if self.gibbs_candidates > 0 and self.reference is None:
            raise ValueError(
                "gibbs_candidates are rewrites of ρ_sft: they need `reference`, the prompter before training"
            )
        if self.gibbs_candidates > 0 and self.kl_coef == 0:
            raise ValueError("gibbs_candidates weighs rewrites by exp(R/λ): kl_coef must be positive")
        return self


class OptimalConfig(Section):
    """`alignpro optimal`: training-free Gibbs resampling of N rewrites of ρ_sft."""

    out: Path
    seed: int = Field(0, ge=0)
    data: DataConfig
    target: PrompterOrModel
    reward: RewardConfig
    prompter: ModelConfig
    prompting: PromptingConfig = PromptingConfig()
    prompts: int = Field(128, ge=1)
    candidates: int = Field(16, ge=2)
    responses_per_rewrite: int = Field(2, ge=1)
    rewrite: SamplingConfig = SamplingConfig()
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    kl_coef: float = Field(0.05, gt=0)

    @property
    def target_model(self) -> ModelConfig:
        """The target's configuration, also where it is the prompter's base model."""
        return self.prompter if isinstance(self.target, str) else self.target


def _check_group(objective: ObjectiveConfig, group: int, key: str) -> None:
    needs_group = objective.loss == "gibbs" or objective.advantage in ("leave_one_out", "group_normalized")
    if needs_group and group < 2:
        what = "loss=gibbs" if objective.loss == "gibbs" else f"advantage={objective.advantage}"
        raise ValueError(
            f"{key}={group} with objective.{what}: a baseline from the same prompt's other samples needs at least 2; "
            "raise it, or take objective.advantage=running_baseline"
        )


def _check_on_policy(sampling: SamplingConfig, key: str) -> None:
    if sampling.temperature == 0 or sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0:
        raise ValueError(
            f"{key}: the policy is trained on samples of its own whole distribution: it takes temperature > 0, top_k=0, "
            "top_p=1 and min_p=0"
        )


def _check_minibatches(objective: ObjectiveConfig, prompts_per_step: int) -> None:
    if objective.minibatches > prompts_per_step:
        raise ValueError(
            f"objective.minibatches={objective.minibatches} is more than rollout.prompts_per_step={prompts_per_step}: "
            "a minibatch holds whole groups, so there can be at most one a prompt"
        )
