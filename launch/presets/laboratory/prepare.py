"""Write what the laboratory needs to ``--out``: models and prompts of the embedded world, pairs of a second target.

    python launch/presets/laboratory/prepare.py --out DIR

The first target answers a request well in its canonical form ("reverse: stone"). The second one, which `alignpro sft`
makes of it from these pairs, was taught otherwise: it answers plain requests, whatever their words, and hardly anything
canonical. It also rephrases a request that begins with "rephrase:", so that an adapter of it can be a prompter.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path
from typing import Any

from alignpro.demo import world
from alignpro.demo.phrases import TASKS
from alignpro.demo.run import WEIGHTS

TRAINING_PROMPTS, HELDOUT_PROMPTS, PAIRS = 4000, 112, 16_000
RIGHT_SHARE = (0.95, 0.3, 0.2, 0.1)
"""Share of the second target's correct answers to requests with 0, 1, 2 and 3 of opener, closer and typo."""
CANONICAL_RIGHT = 0.1


def main() -> None:
    """Write ``models/``, ``prompts.jsonl``, ``heldout.jsonl`` and ``second.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    shutil.copytree(WEIGHTS, out / "models", dirs_exist_ok=True)
    world.write_records(out / "prompts.jsonl", world.prompt_records(TRAINING_PROMPTS, 0, heldout=False))
    world.write_records(out / "heldout.jsonl", world.prompt_records(HELDOUT_PROMPTS, 0, heldout=True))
    world.write_records(out / "second.jsonl", [*answers(PAIRS // 2), *rephrasings(PAIRS // 2)])


def answers(count: int) -> list[dict[str, Any]]:
    """The second target's answers: one in three requests is canonical."""
    rng = random.Random("laboratory/answers")
    records = []
    for _ in range(count):
        task, argument = rng.choice(TASKS), world.draw_argument(rng, heldout=False)
        request = world.draw_request(rng, task, argument, heldout=False)
        text, share = request.text, RIGHT_SHARE[request.clutter]
        if rng.random() < 1 / 3:
            text, share = world.canonical(task, argument), CANONICAL_RIGHT
        records.append({"prompt": text, "response": request.answer if rng.random() < share else "what?"})
    return records


def rephrasings(count: int) -> list[dict[str, Any]]:
    """What it answers when it is asked to rephrase: the kinds of rewrites that the demo's prompter starts from."""
    pairs = world.prompter_records(count, seed=1)
    return [{"prompt": f"rephrase: {pair['prompt']}", "response": pair["rewrite"]} for pair in pairs]


if __name__ == "__main__":
    main()
