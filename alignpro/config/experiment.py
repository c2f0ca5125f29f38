"""The configuration of `alignpro experiment`: what is crossed, and what all its runs have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from alignpro.config.data import DataConfig, PromptingConfig
from alignpro.config.endpoints import SpendingConfig
from alignpro.config.jobs import CandidateCount, InstructionName, Strength
from alignpro.config.method import MethodSection
from alignpro.config.policy_methods import SoftPromptMethod, TargetAdapterMethod
from alignpro.config.refusals import RefusalsConfig
from alignpro.config.rewards import RewardConfig
from alignpro.config.rival import RivalKind, SearchSection
from alignpro.config.rollout import EngineConfig, SamplingConfig
from alignpro.config.section import OutputPath, Section
from alignpro.config.self_reward import SelfRewardMethod

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class ExperimentPrompter(Section):
    """A prompter: the model that is trained, and how it is made ready for it."""

    policy: dict[str, Any]
    """As in `alignpro train`."""
    prior: dict[str, Any] | None = None
    """Sections of `alignpro sft` for the prompter that all methods start from, which is made once; its ``policy`` has what
    differs from ``policy``, such as an adapter. Without it, they start from ``policy`` as it is."""


class ExperimentTask(Section):
    """A task: prompts, and what is good."""

    data: DataConfig
    """The prompts for training; the share ``holdout`` of them is for the evaluation, unless ``heldout`` is given."""
    heldout: DataConfig | None = None
    """Other prompts for the evaluation, such as those of another source; ``holdout: 0`` takes all of them."""
    reward: RewardConfig
    instructions: dict[InstructionName, str] = Field(default_factory=dict)
    """Name → what a person would add to a prompt, or a template with ``{{ prompt }}``; see `alignpro eval`."""


class UnchangedMethod(MethodSection):
    """The target is given the prompt as it is."""

    kind: Literal["none"]


class InstructionMethod(MethodSection):
    """The hand-written instructions of the task; each is a cell of its own."""

    kind: Literal["instruction"]


class PriorMethod(MethodSection):
    """The prompter before training."""

    kind: Literal["prior"]


class GibbsMethod(MethodSection):
    """The best of N rewrites of the prompter before training, resampled by exp(R/λ) and answered anew."""

    kind: Literal["gibbs"]
    candidates: list[CandidateCount] = Field(default=[4, 16, 64], min_length=1)


class BestOfMethod(MethodSection):
    """The best of N rewrites of the prompter before training, answered anew."""

    kind: Literal["best_of"]
    candidates: list[CandidateCount] = Field(default=[4, 16, 64], min_length=1)


class TrainMethod(MethodSection):
    """A prompter trained by `alignpro train`."""

    kind: Literal["train"]
    label: str | None = None
    """Its name in the report; by default that of its key."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sections of `alignpro train` that differ from the experiment's ``train``."""
    transfer: bool = True
    """Whether its prompters are evaluated on other targets too, where the experiment's ``transfer`` is set."""


class DialMethod(MethodSection):
    """A prompter that another method trains, at other strengths s: ρ_sft^{1−s} ρ^s, token by token. Each is a cell of its own."""

    kind: Literal["dial"]
    label: str | None = None
    """Its name in the report, to which the strength is added; by default Dial, with the method's key if there are several."""
    of: str
    """The key of a method of the kind ``train``."""
    strengths: list[Strength] = Field(default=[0.25, 0.5, 0.75, 1.25], min_length=1)


class RLHFMethod(MethodSection):
    """The target itself, trained by `alignpro rlhf`: the oracle."""

    kind: Literal["rlhf"]
    label: str | None = None
    """Its name in the report; by default that of its key."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sections of `alignpro rlhf` that differ from the experiment's ``rlhf``."""


class RivalMethod(MethodSection):
    """An instruction that an optimiser of prompts finds: GEPA or MIPROv2, within a number of responses of the target."""

    kind: RivalKind
    target_calls: Annotated[int, Field(ge=4)] | str
    """Most responses of the target, or the ``train`` method that takes as many."""
    search: SearchSection = SearchSection()
    label: str | None = None
    """Its name in the report; by default that of the optimiser, with the method's key if there are several."""


Method = Annotated[
    UnchangedMethod
    | InstructionMethod
    | PriorMethod
    | GibbsMethod
    | BestOfMethod
    | TrainMethod
    | DialMethod
    | RLHFMethod
    | TargetAdapterMethod
    | SoftPromptMethod
    | SelfRewardMethod
    | RivalMethod,
    Field(discriminator="kind"),
]


_NAMED_BY_KEY = TrainMethod | DialMethod | TargetAdapterMethod | SoftPromptMethod | SelfRewardMethod | RivalMethod
"""Methods that the report knows by their key; the others by their arm of the evaluation."""
_ARMS = ("no_finetuning", "sft_prompter", "oracle")
"""Arms that the report compares others with, beside instructions."""


_OF_THE_CELL = {
    ("run", "out"): "`out` of the experiment",
    ("run", "seed"): "`seeds` of the experiment",
    ("self_reward", "alpha"): "`alphas` of the method",
}
"""Section and key of a training that an experiment sets for each cell → where to give it."""


class ExperimentEvaluation(Section):
    """How every cell is evaluated: on the same prompts with the same number of responses."""

    prompts: int = Field(128, ge=2)
    rewrites_per_prompt: int = Field(4, ge=2)
    responses_per_rewrite: int = Field(2, ge=2)
    refusals: RefusalsConfig | None = None
    """As in `EvalConfig`: on which prompts refusals of every method are counted."""


class ExperimentConfig(Section):
    """`alignpro experiment`: prompters × targets × tasks × methods × seeds."""

    out: OutputPath
    title: str = "Align-Pro"
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(default=[0, 1, 2], min_length=1)
    launcher: list[str] = Field(default_factory=list)
    """What starts a training, such as ``[deepspeed, --num_gpus, "8", --module]``; by default this Python."""
    prompters: dict[str, ExperimentPrompter] = Field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name → a target, as in `alignpro train`; in a ``mixture``, a name stands for another target of the experiment."""
    tasks: dict[str, ExperimentTask] = Field(min_length=1)
    methods: dict[str, Method] = Field(min_length=1)
    transfer: bool | list[str] = False
    """Whether each trained prompter is evaluated on the other targets as well, or on which."""
    prompting: PromptingConfig = PromptingConfig()
    kl_coef: float = Field(0.05, gt=0)
    """λ, of all methods that have one."""
    rewrite: SamplingConfig = SamplingConfig()
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    train: dict[str, Any] = Field(default_factory=dict)
    """Sections of `alignpro train` that all its cells have in common."""
    rlhf: dict[str, Any] = Field(default_factory=dict)
    """Sections of `alignpro rlhf` that all its cells have in common."""
    evaluation: ExperimentEvaluation = ExperimentEvaluation()
    spending: SpendingConfig = SpendingConfig()
    """Prices and budget of servers, of each training and of each evaluation."""

    @field_validator("prompters", "targets", "tasks", "methods")
    @classmethod
    def _check_names(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            _check_name(name)
        return given

    @property
    def transfer_targets(self) -> list[str]:
        """The targets on which every trained prompter is evaluated: single ones, since a mixture is several."""
        if isinstance(self.transfer, list):
            return self.transfer
        return [name for name, each in self.targets.items() if "mixture" not in each] if self.transfer else []

    def _check_targets(self) -> None:
        for name, each in self.targets.items():
            parts = each.get("mixture", ())
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, str) and (part not in self.targets or "mixture" in self.targets[part]):
                    raise ValueError(f"targets.{name}.mixture: {part!r} is no single target of this experiment")
        for name in self.transfer if isinstance(self.transfer, list) else ():
            if name not in self.targets or "mixture" in self.targets[name]:
                raise ValueError(f"transfer: {name!r} is no single target of this experiment")
        trained = [method for method in self.methods.values() if isinstance(method, TrainMethod)]
        if self.transfer and not any(method.transfer for method in trained):
            raise ValueError("transfer needs a `train` method, whose prompters it evaluates")

    @model_validator(mode="after")
    def _check(self) -> ExperimentConfig:
        self._check_targets()
        for i, seed in enumerate(self.seeds):
            if seed in self.seeds[:i]:
                raise ValueError(f"seeds: {seed} is given twice")
        self._check_sections("train", self.train)
        self._check_sections("rlhf", self.rlhf)
        of_prompters = [name for name, method in self.methods.items() if needs_prompter(method)]
        if of_prompters and not self.prompters:
            raise ValueError(f"methods.{of_prompters[0]} needs a prompter: name one in `prompters`")
        for name, method in self.methods.items():
            self._check_places(name, method)
            self._check_sections(f"methods.{name}.settings", getattr(method, "settings", {}))
            if isinstance(method, _NAMED_BY_KEY) and (name in _ARMS or name.startswith("instruction")):
                raise ValueError(
                    f"methods.{name}: this is what every evaluation calls another method: name it otherwise"
                )
            if isinstance(method, RivalMethod):
                self._check_rival(name, method)
            if isinstance(method, TrainMethod) and "self_reward" in self.train | method.settings:
                raise ValueError(f"methods.{name}: self_reward is a method of its own: set kind=self_reward")
            if isinstance(method, TargetAdapterMethod | SoftPromptMethod):
                self._check_models_of_targets(name, method)
            if isinstance(method, DialMethod) and not isinstance(self.methods.get(method.of), TrainMethod):
                raise ValueError(f"methods.{name}.of={method.of}: expected the key of a method of the kind train")
        wanting = [name for name, method in self.methods.items() if isinstance(method, InstructionMethod)]
        if wanting and not any(task.instructions for task in self.tasks.values()):
            raise ValueError(f"methods.{wanting[0]} needs `instructions` in a task")
        return self

    def _check_sections(self, where: str, sections: Mapping[str, Any]) -> None:
        """Check that sections of a training leave alone what tells its cell from others."""
        for (section, key), instead in _OF_THE_CELL.items():
            given = sections.get(section)
            if isinstance(given, Mapping) and key in given:
                raise ValueError(
                    f"{where}.{section}.{key}: would be that of all cells, which count as runs of their own: use {instead}"
                )

    def _check_places(self, name: str, method: MethodSection) -> None:
        """Check that the tasks and targets of a method are some of the experiment."""
        for key, given, known in (("tasks", method.tasks, self.tasks), ("targets", method.targets, self.targets)):
            for each in given or ():
                if each not in known:
                    raise ValueError(
                        f"methods.{name}.{key}: {each!r} is none of the experiment: expected one of {', '.join(known)}"
                    )

    def _check_models_of_targets(self, name: str, method: TargetAdapterMethod | SoftPromptMethod) -> None:
        """Check that the weights of every target are here, if the method needs them."""
        if isinstance(method, SoftPromptMethod) and method.before == "prompter":
            return
        for target, each in self.targets.items():
            if not any(method.runs(task, target) for task in self.tasks):
                continue
            if "path" not in each and isinstance(method, SoftPromptMethod):
                raise ValueError(
                    f"methods.{name}.before=target: targets.{target} is not a model of this process, and a soft prompt is "
                    "vectors, not text that could be sent to it: leave one of them out, or use before=prompter"
                )
            if "path" not in each:
                raise ValueError(
                    f"methods.{name}: targets.{target} is not a model of this process, so no adapter can be put on it: leave one "
                    "of them out, or train a prompter of its own"
                )

    def _check_rival(self, name: str, method: RivalMethod) -> None:
        at = [task for task in self.tasks if any(method.runs(task, target) for target in self.targets)]
        bare = [task for task in at if not self.tasks[task].instructions]
        if bare:
            raise ValueError(f"methods.{name} begins with hand-written `instructions`: give some in tasks.{bare[0]}")
        given = method.target_calls
        if isinstance(given, str) and not isinstance(self.methods.get(given), TrainMethod):
            raise ValueError(
                f"methods.{name}.target_calls={given}: expected a number, or the name of a `train` method that takes as many"
            )


def needs_prompter(method: Method) -> bool:
    """Whether a method has one cell for each prompter."""
    if isinstance(method, SoftPromptMethod):
        return method.before == "prompter"
    return isinstance(method, PriorMethod | GibbsMethod | BestOfMethod | TrainMethod | DialMethod | SelfRewardMethod)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is the name of a directory: use at most 64 letters, digits, '_', '-' and '.', the first a letter or digit"
        )
