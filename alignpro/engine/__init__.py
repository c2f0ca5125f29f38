"""Generation: sampling parameters, completions, chains and the engine that produces them.

May import `models`, `config`, `errors` and `alignpro_kernels`, never `distributed`: an engine is one process's own.
"""

from alignpro.engine.engine import Engine
from alignpro.engine.sampler import derive_seed
from alignpro.engine.sequence import Request
from alignpro.engine.stats import EngineStats
from alignpro.engine.types import Chain, Completion, HasTokens, SamplingParams, TokenLogprobs, TokenPrompt

__all__ = [
    "Chain",
    "Completion",
    "Engine",
    "EngineStats",
    "HasTokens",
    "Request",
    "SamplingParams",
    "TokenLogprobs",
    "TokenPrompt",
    "derive_seed",
]
