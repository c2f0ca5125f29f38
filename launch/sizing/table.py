"""Print the sizing table of docs/launch.md: memory per GPU for the paper's four pairs of prompter and target, by set-up.

python launch/sizing/table.py
"""

from __future__ import annotations

from pathlib import Path

from alignpro.config import TrainConfig, load_config
from alignpro.planning.memory import GIB, MemoryEstimate, estimate_setups, setups_of

HERE = Path(__file__).parent
PROMPTERS = {"phi-3.5-mini": "Phi-3.5-mini", "qwen2.5-1.5b": "Qwen2.5-1.5B"}
TARGETS = {"llama-3.1-8b": "Llama-3.1-8B", "qwen2.5-7b": "Qwen2.5-7B"}
RANKS = (1, 8)
DEVICE_GIB = 80
USABLE_SHARE = 0.9
"""Share of a device's memory available to tensors; the allocator and libraries need the rest."""


def rows() -> list[str]:
    """Return the table as lines of Markdown."""
    setups = setups_of(_config(next(iter(PROMPTERS)), next(iter(TARGETS))), 1)
    lines = [f"| prompter, target | GPUs | {' | '.join(setups)} |", f"|---|---|{'---|' * len(setups)}"]
    for prompter, first in PROMPTERS.items():
        for target, second in TARGETS.items():
            config = _config(prompter, target)
            for ranks in RANKS:
                needs = estimate_setups(config, ranks)
                cells = [_cell(needs[setup]) if setup in needs else "—" for setup in setups]
                lines.append(f"| {first}, {second} | {ranks} | {' | '.join(cells)} |")
    return lines


def _cell(need: MemoryEstimate) -> str:
    """Format the higher of the two peaks in GiB, in bold where it fits, and the host memory in parentheses."""
    peak = need.peak / GIB
    text = f"**{peak:.0f}**" if peak <= USABLE_SHARE * DEVICE_GIB else f"{peak:.0f}"
    return text if need.training.host == 0 else f"{text} (+{need.training.host / GIB:.0f})"


def _config(prompter: str, target: str) -> TrainConfig:
    paths = [f"policy.path={HERE / 'models' / prompter}", f"target.path={HERE / 'models' / target}"]
    reward = f"reward.components[0].model.path={HERE / 'models' / 'llama-3.1-8b'}"
    return load_config(TrainConfig, [str(HERE / "pair.yaml"), *paths, reward])


if __name__ == "__main__":
    print("\n".join(rows()))
