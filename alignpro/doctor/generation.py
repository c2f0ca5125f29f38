"""The engine, on a few chains of the demo's untrained models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alignpro.doctor.findings import Finding, first_error

if TYPE_CHECKING:
    import torch

    from alignpro.engine import EngineStats


def chains() -> Iterator[Finding]:
    """Run a few chains of the demo's untrained models through the engine: on the CPU, and on a GPU if there is one."""
    import torch

    from alignpro.errors import AlignProError
    from alignpro_kernels import BackendError

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            stats = _run_chains(torch.device(device))
        except (AlignProError, BackendError, RuntimeError) as error:
            yield Finding(
                "Generation", device, "problem", first_error(str(error)), "see the findings under Devices and Kernels"
            )
        else:
            yield Finding("Generation", device, "ok", _describe(stats))


def _run_chains(device: torch.device) -> EngineStats:
    """Generate 4 prompts → 4 rewrites each → 2 responses each; return the engine's statistics.

    Raises:
        ModelError: A sequence failed.
    """
    import torch

    from alignpro.demo.models import prompter_tokenizer, target_tokenizer, untrained_prompter, untrained_target
    from alignpro.engine import Engine, SamplingParams, TokenPrompt
    from alignpro.errors import ModelError
    from alignpro.models.language_model import LanguageModel

    with torch.random.fork_rng(), device:
        policy = LanguageModel(untrained_prompter().eval(), prompter_tokenizer(), "prompter")
        target = LanguageModel(untrained_target().eval(), target_tokenizer(), "target")
    engine = Engine({"policy": policy, "target": target}, audit=True)
    template = list(range(20, 52))  # the prefix of every prompt and every rewrite
    chains = engine.run_chains(
        [[*template, i] for i in range(4)],
        rewrite=SamplingParams(max_tokens=8, n=4),
        to_target=lambda _, sample: TokenPrompt(template + [token % target.vocabulary for token in sample.tokens]),
        respond=SamplingParams(max_tokens=8, n=2),
    )
    for completion in (c for group in chains for chain in group for c in (chain.sample, *chain.responses)):
        if completion.error:
            raise ModelError(completion.error)
    return engine.stats


def _describe(stats: EngineStats) -> str:
    computed = ", ".join(f"{kind} {count}" for kind, count in stats.computed.items())
    pages = ", ".join(f"{model} {count}" for model, count in stats.peak_pages.items())
    ticks = ", ".join(f"{how} {count}" for how, count in stats.decode_ticks.items())
    seconds = ", ".join(f"{phase} {spent:.3f} s" for phase, spent in stats.seconds.items())
    return (
        f"{stats.sequences} sequences in {stats.run_seconds:.2f} s ({seconds}); tokens computed: {computed}, "
        f"{stats.floor_ratio:.2f}× the minimum; {stats.cache_hit_tokens} from the cache; pages: {pages}; "
        f"{stats.preemptions} preemptions" + (f"; decode ticks: {ticks}" if ticks else "")
    )
