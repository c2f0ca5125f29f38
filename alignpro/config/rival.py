"""The configuration of `alignpro rival`: an optimiser of instructions with a limited number of responses of the target."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from alignpro.config.data import DataConfig, PromptingConfig
from alignpro.config.endpoints import SpendingConfig, TargetEndpointConfig
from alignpro.config.jobs import InstructionName
from alignpro.config.models import ModelConfig
from alignpro.config.rewards import RewardConfig
from alignpro.config.rollout import EngineConfig, SamplingConfig
from alignpro.config.section import OutputPath, Section
from alignpro.config.targets import RemoteTargetConfig, check_spending


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "name"
    remote = isinstance(value, RemoteTargetConfig) or (isinstance(value, dict) and "endpoint" in value)
    return "server" if remote else "model"


_Answering = Annotated[ModelConfig, Tag("model")] | Annotated[RemoteTargetConfig, Tag("server")]
OneTarget = Annotated[_Answering, Discriminator(_kind)]
"""A model of this process, or a server."""
Proposer = Annotated[Annotated[Literal["target"], Tag("name")] | _Answering, Discriminator(_kind)]
"""What writes new instructions: the target itself, a model of this process, or a server."""

RivalKind = Literal["gepa", "miprov2"]


class SearchSection(Section):
    """How an optimiser of instructions searches."""

    proposer: Proposer = "target"
    propose: SamplingConfig = SamplingConfig(max_tokens=512)
    """How the proposer is sampled."""
    validation: int = Field(32, ge=2)
    """Training prompts on which instructions are compared with each other."""
    training: int = Field(64, ge=2)
    """Other training prompts, which the proposer sees with responses and rewards."""
    minibatch: int | None = Field(None, ge=1)
    """Prompts of a partial evaluation: of GEPA those of ``training`` that a proposal is written for and compared with
    its parent on (3 if it is not set); of MIPROv2 those of ``validation`` between two whole evaluations (16)."""
    proposals: int = Field(8, ge=2)
    """Instructions that MIPROv2 proposes before it searches; GEPA proposes one at a time until its calls are spent."""
    threads: int = Field(8, ge=1)
    """Questions to a server at the same time; a model of this process answers those of an evaluation in one batch."""


class RivalConfig(SpendingConfig):
    """`alignpro rival`: the instruction that an optimiser of prompts finds within a number of responses of the target."""

    out: OutputPath
    seed: int = Field(0, ge=0, lt=2**63)
    kind: RivalKind
    data: DataConfig
    """Only prompts that are not held out are used: those of a training, and those of ``validation``, by which a training chooses
    its checkpoint and a rival its instruction."""
    target: OneTarget
    reward: RewardConfig
    instructions: dict[InstructionName, str] = Field(min_length=1)
    """The hand-written instructions that it begins with; see `alignpro eval`."""
    target_calls: int = Field(ge=4)
    """Most responses of the target, those to the hand-written instructions included, and those of the guard `refusal_kept`."""
    search: SearchSection = SearchSection()
    prompting: PromptingConfig = PromptingConfig()
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()

    @property
    def target_is_local(self) -> bool:
        """Whether the target is a model of this process."""
        return isinstance(self.target, ModelConfig)

    @property
    def target_endpoints(self) -> list[TargetEndpointConfig]:
        """The servers that are asked as target or proposer, each once."""
        remote = [each for each in (self.target, self.search.proposer) if isinstance(each, RemoteTargetConfig)]
        found: list[TargetEndpointConfig] = []
        for each in remote:
            if each.endpoint not in found:
                found.append(each.endpoint)
        return found

    @model_validator(mode="after")
    def _check(self) -> RivalConfig:
        check_spending(self, [*self.target_endpoints, *self.reward.endpoints])
        unchanged = int(self.reward.keeps_refusals)  # a response to each prompt as it is
        needed = (len(self.instructions) + unchanged) * self.search.validation
        if self.target_calls <= needed:
            guard = " with the guard refusal_kept" if unchanged else ""
            raise ValueError(
                f"target_calls={self.target_calls}: {len(self.instructions)} hand-written instructions on "
                f"{self.search.validation} validation prompts{guard} take {needed} alone: raise target_calls, or lower "
                "search.validation"
            )
        return self
