"""Generation: sampling parameters, completions, chains and the engine that produces them.

May import `models`, `errors` and `alignpro_kernels`, never `distributed`: an engine is one process's own.
"""

from alignpro.engine.engine import Engine
from alignpro.engine.sampler import derive_seed
from alignpro.engine.types import Chain, Completion, EngineStats, SamplingParams

__all__ = ["Chain", "Completion", "Engine", "EngineStats", "SamplingParams", "derive_seed"]
