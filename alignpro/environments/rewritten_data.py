"""Rewrite a whole data set with a trained prompter, to a file that a second call continues."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignpro.config import DataConfig
from alignpro.data import Prompt, load_prompts
from alignpro.engine import derive_seed
from alignpro.environments.rewriter import Rewriter, Rewritten
from alignpro.errors import AlignProError, DataError

logger = logging.getLogger(__name__)

CHUNK = 1024
"""Number of prompts that are rewritten and saved at a time, so that an error does not lose everything."""


def rewrite_data(
    rewriter: Rewriter,
    source: str,
    out: Path,
    *,
    n: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    candidates: int | None = None,
) -> None:
    """Rewrite all prompts of a data source and write JSON Lines, `CHUNK` prompts at a time.

    A line has the prompt's ``id``, its text (``prompt``), the ``rewrites`` and, with a target, their ``responses``.
    Duplicates are rewritten once. A prompt that cannot be rewritten, because it does not fit or a chat template refuses it,
    is skipped and counted.

    Until all prompts have been tried, a file ``<out>.job.json`` holds the settings, and a call with the same ones continues
    behind the lines of an earlier call.

    Args:
        rewriter: The prompter, with or without the target.
        source: As ``data.source``: a preset, or files.
        out: The output file; lines written before an error are kept.
        n: Rewrites per prompt.
        temperature: Sampling temperature of the rewrites; the target decodes greedily.
        seed: Seed of the rewrites.
        candidates: As for `Rewriter.rewrite`.

    Raises:
        DataError: The data cannot be read, no prompt can be rewritten, ``out`` is finished, or it was begun with other
            settings.
    """
    prompts = load_prompts(DataConfig(source=source, holdout=0)).prompts
    job = {
        "run": str(rewriter.config.run.out),
        "prompts": hashlib.sha256("".join(prompt.id for prompt in prompts).encode()).hexdigest()[:16],
        "target": rewriter.environment is not None,
        "n": n,
        "temperature": temperature,
        "seed": seed,
        "strength": None if rewriter.strength == 1 else rewriter.strength,
        "candidates": candidates,
    }
    done = _begin(out, job)
    # A prompt draws from its place in the data, so that neither skipped rows nor a second call change its rewrites.
    seeds = [derive_seed(derive_seed(seed, i - i % CHUNK), i % CHUNK) for i in range(len(prompts))]
    waiting = [i for i, prompt in enumerate(prompts) if prompt.id not in done]
    if done:
        logger.info("%s: %d of %d prompts are rewritten already", out, len(prompts) - len(waiting), len(prompts))
    skipped: list[AlignProError] = []
    with out.open("a", encoding="utf-8", errors="surrogatepass") as file:
        for start in range(0, len(waiting), CHUNK):
            chunk = waiting[start : start + CHUNK]
            chosen = [prompts[i] for i in chunk]
            own = [seeds[i] for i in chunk]
            groups = rewriter.rewrite_each(chosen, own, n=n, temperature=temperature, candidates=candidates)
            for prompt, group in zip(chosen, groups, strict=True):
                if isinstance(group, AlignProError):
                    skipped.append(_at(prompt, group))
                else:
                    file.write(json.dumps(_row(prompt, group, rewriter), ensure_ascii=False) + "\n")
            file.flush()
            tried = len(prompts) - len(waiting) + start + len(chunk)
            logger.info("%d of %d prompts rewritten", tried - len(skipped), len(prompts))
    _report(skipped, len(prompts), out)
    _job_file(out).unlink()


def _row(prompt: Prompt, group: Sequence[Rewritten], rewriter: Rewriter) -> dict[str, Any]:
    row: dict[str, Any] = {"id": prompt.id, "prompt": prompt.text, "rewrites": [each.rewrite for each in group]}
    return row if rewriter.environment is None else row | {"responses": [each.response for each in group]}


def _at(prompt: Prompt, error: AlignProError) -> AlignProError:
    """The error of a prompt, with its place in the data."""
    where = prompt.source or prompt.id
    return error if where in str(error) else type(error)(f"{where}: {error}")


def _report(skipped: Sequence[AlignProError], total: int, out: Path) -> None:
    if not skipped:
        return
    count = f"{len(skipped)} of {total} prompts cannot be rewritten (the first: {skipped[0]})"
    if len(skipped) == total:
        out.unlink()
        _job_file(out).unlink()
        raise DataError(count)
    logger.warning("%s; they were skipped", count)


def _job_file(out: Path) -> Path:
    return out.with_name(out.name + ".job.json")


def _begin(out: Path, job: dict[str, Any]) -> set[str]:
    """Create the output file, or check that it can be continued. Returns the ids of the prompts that it has."""
    path = _job_file(out)
    try:
        if not out.exists():
            path.write_text(json.dumps(job))
            out.touch(exist_ok=False)
            return set()
        if not path.exists():
            raise DataError(f"{out}: already exists; choose another file, or remove it")
        begun = json.loads(path.read_text())
        if different := [f"{key} was {begun.get(key)!r}" for key, value in job.items() if begun.get(key) != value]:
            raise DataError(
                f"{out}: was begun with other settings ({', '.join(different)}); repeat those, or remove it to start anew"
            )
        return _ids_of_whole_lines(out)
    except (OSError, ValueError) as error:
        raise DataError(f"{out}: cannot be written: {error}") from error


def _ids_of_whole_lines(out: Path) -> set[str]:
    """The ids in an output file; a last line that was not written whole is cut off."""
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return {json.loads(line.decode("utf-8", "surrogatepass"))["id"] for line in whole.splitlines()}
