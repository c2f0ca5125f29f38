"""The cases of a model directory: one and four responses to each prompt, and chains in which it is prompter and target."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engine.cases import Case
from benchmarks.given_model import encode, read_texts, shape_of
from benchmarks.workload import Workload

PROMPTS, TOKENS = 32, 64
QUICK_PROMPTS, QUICK_TOKENS = 2, 4


def cases_of(directory: Path, prompts: Path | None, *, quick: bool) -> list[Case]:
    """Return the cases of a model.

    Args:
        directory: The model, with its tokenizer if prompts are given.
        prompts: A file of prompts; they are random tokens if absent.
        quick: Whether to take tiny cases.

    Raises:
        typer.BadParameter: The model or the prompts cannot be read.
    """
    shape = shape_of(directory)
    given = () if prompts is None else encode(directory, read_texts(prompts))
    count, tokens = (QUICK_PROMPTS, QUICK_TOKENS) if quick else (PROMPTS, TOKENS)
    count = min(count, len(given)) if given else count
    length = sum(map(len, given)) // len(given) if given else tokens

    def workload(name: str, K: int, M: int) -> Workload:
        return Workload(
            name,
            shape,
            shape,
            meta_prompt=0,
            prompt=length,
            rewrite=tokens,
            template=0,
            response=tokens,
            prompts=count,
            K=K,
            M=M,
        )

    kind = "real" if given else "random"
    title = f"{directory.name}: {count} {kind} prompts of {length} tokens"
    return [
        Case(workload("n1", 1, 1), f"n1: {title}, one response each", chain=False, given=given),
        Case(workload("n4", 1, 4), f"n4: {title}, four responses each", chain=False, given=given),
        Case(workload("chains", 4, 1), f"chains: {title}, four rewrites each and a response", chain=True, given=given),
    ]
