"""Typed run configuration.

A run is described by YAML files and dotted overrides (``optimizer.learning_rate=1e-4``), merged left to right.
OmegaConf merges and interpolates, pydantic types and validates. An unknown key or a bad value is an error that names the
key. The sections are defined here by subject; `loading` reads and writes configurations, and `messages` formats errors.
May import `errors`, and `objectives` to check what a loss needs.
"""

from alignpro.config.data import DataConfig, PromptingConfig, RewriteForm, SFTDataConfig
from alignpro.config.endpoints import (
    BudgetConfig,
    EndpointConfig,
    PriceConfig,
    SpendingConfig,
    TargetEndpointConfig,
)
from alignpro.config.experiment import (
    BestOfMethod,
    DialMethod,
    ExperimentConfig,
    GibbsMethod,
    InstructionMethod,
    Method,
    PriorMethod,
    RivalMethod,
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
from alignpro.config.judging import JudgeConfig, JudgeModelConfig, JudgingConfig
from alignpro.config.learning import KLConfig, ObjectiveConfig, OptimizerConfig
from alignpro.config.loading import ConfigSource, dump_config, load_config, resolve_config, validate_config
from alignpro.config.memory import MemoryConfig
from alignpro.config.models import AdapterConfig, ModelConfig, PolicyConfig, TrainableModelConfig
from alignpro.config.policy_methods import SoftPromptMethod, TargetAdapterMethod
from alignpro.config.refusals import RefusalsConfig
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
from alignpro.config.rival import RivalConfig, RivalKind, SearchSection
from alignpro.config.rollout import EngineConfig, ResponseRolloutConfig, RolloutConfig, SamplingConfig
from alignpro.config.run import DeepSpeedConfig, RunConfig, RunSection
from alignpro.config.section import Section
from alignpro.config.self_reward import SelfRewardConfig, SelfRewardMethod
from alignpro.config.serving import AccessConfig, ListenConfig, ServeConfig, ServeLimitsConfig, ServeLogConfig
from alignpro.config.serving_page import PageConfig
from alignpro.config.sweep import RangeConfig, SweepConfig
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
    "AccessConfig",
    "AdapterConfig",
    "BestOfMethod",
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
    "JudgeConfig",
    "JudgeModelConfig",
    "JudgeRewardConfig",
    "JudgingConfig",
    "KLConfig",
    "ListenConfig",
    "MemoryConfig",
    "Method",
    "MixedEndpointConfig",
    "MixedModelConfig",
    "ModelConfig",
    "ModelRewardConfig",
    "ObjectiveConfig",
    "OptimalConfig",
    "OptimizerConfig",
    "PageConfig",
    "PolicyConfig",
    "PolicyOrTarget",
    "PriceConfig",
    "PriorMethod",
    "PrompterOrTarget",
    "PromptingConfig",
    "RLHFConfig",
    "RLHFMethod",
    "RangeConfig",
    "RefusalsConfig",
    "RemoteTargetConfig",
    "ResponseRolloutConfig",
    "RewardComponentConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RewriteForm",
    "RivalConfig",
    "RivalKind",
    "RivalMethod",
    "RolloutConfig",
    "RunConfig",
    "RunSection",
    "SFTConfig",
    "SFTDataConfig",
    "SamplingConfig",
    "SearchSection",
    "Section",
    "SelfRewardConfig",
    "SelfRewardMethod",
    "ServeConfig",
    "ServeLimitsConfig",
    "ServeLogConfig",
    "SoftPromptMethod",
    "SpendingConfig",
    "SweepConfig",
    "TargetAdapterMethod",
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
