"""Typed run configuration.

A run is described by YAML files and dotted overrides (``optimizer.learning_rate=1e-4``), merged left to right.
OmegaConf merges and interpolates, pydantic types and validates. An unknown key or a bad value is an error that names the
key. The sections are defined here by subject; `loading` reads and writes configurations, and `messages` formats errors.
May import `errors`, and `objectives` to check what a loss needs.
"""

from alignpro.config.data import DataConfig, PromptingConfig, SFTDataConfig
from alignpro.config.endpoints import (
    BudgetConfig,
    EndpointConfig,
    PriceConfig,
    SpendingConfig,
    TargetEndpointConfig,
)
from alignpro.config.experiment import (
    DialMethod,
    ExperimentConfig,
    GibbsMethod,
    InstructionMethod,
    Method,
    PriorMethod,
    RLHFMethod,
    TrainMethod,
    UnchangedMethod,
    needs_prompter,
)
from alignpro.config.jobs import (
    ComparisonConfig,
    EvalConfig,
    HeadroomConfig,
    OptimalConfig,
    RewardModelConfig,
    RLHFConfig,
    SFTConfig,
    TaskConfig,
    TrainConfig,
)
from alignpro.config.learning import KLConfig, ObjectiveConfig, OptimizerConfig
from alignpro.config.loading import ConfigSource, dump_config, load_config, resolve_config, validate_config
from alignpro.config.models import AdapterConfig, ModelConfig, PolicyConfig, TrainableModelConfig
from alignpro.config.rewards import (
    FunctionRewardConfig,
    GuardConfig,
    HTTPRewardConfig,
    JSONServerConfig,
    JudgeRewardConfig,
    ModelRewardConfig,
    RewardComponentConfig,
    RewardConfig,
)
from alignpro.config.rollout import EngineConfig, ResponseRolloutConfig, RolloutConfig, SamplingConfig
from alignpro.config.run import DeepSpeedConfig, RunConfig, RunSection
from alignpro.config.section import Section
from alignpro.config.targets import (
    MixedEndpointConfig,
    MixedModelConfig,
    PolicyOrTarget,
    PrompterOrTarget,
    RemoteTargetConfig,
    TargetConfig,
    TargetMixtureConfig,
    TargetPart,
    default_name,
    separate_models,
    target_endpoints,
    target_parts,
)

__all__ = [
    "AdapterConfig",
    "BudgetConfig",
    "ComparisonConfig",
    "ConfigSource",
    "DataConfig",
    "DeepSpeedConfig",
    "DialMethod",
    "EndpointConfig",
    "EngineConfig",
    "EvalConfig",
    "ExperimentConfig",
    "FunctionRewardConfig",
    "GibbsMethod",
    "GuardConfig",
    "HTTPRewardConfig",
    "HeadroomConfig",
    "InstructionMethod",
    "JSONServerConfig",
    "JudgeRewardConfig",
    "KLConfig",
    "Method",
    "MixedEndpointConfig",
    "MixedModelConfig",
    "ModelConfig",
    "ModelRewardConfig",
    "ObjectiveConfig",
    "OptimalConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PolicyOrTarget",
    "PriceConfig",
    "PriorMethod",
    "PrompterOrTarget",
    "PromptingConfig",
    "RLHFConfig",
    "RLHFMethod",
    "RemoteTargetConfig",
    "ResponseRolloutConfig",
    "RewardComponentConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RunConfig",
    "RunSection",
    "SFTConfig",
    "SFTDataConfig",
    "SamplingConfig",
    "Section",
    "SpendingConfig",
    "TargetConfig",
    "TargetEndpointConfig",
    "TargetMixtureConfig",
    "TargetPart",
    "TaskConfig",
    "TrainConfig",
    "TrainMethod",
    "TrainableModelConfig",
    "UnchangedMethod",
    "default_name",
    "dump_config",
    "load_config",
    "needs_prompter",
    "resolve_config",
    "separate_models",
    "target_endpoints",
    "target_parts",
    "validate_config",
]
