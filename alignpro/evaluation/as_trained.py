"""What an evaluation takes from the training of its prompter where its own configuration does not say it.

A prompter that is asked with another meta-prompt, or whose rewrites are cut at another length, is another prompter. So keys of
`prompting`, `rewrite` and `respond` that are not given are those of the run that trained it, and so is how prompts are held out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignpro.config import ComparisonConfig, ModelConfig, Section
from alignpro.prompting.meta_prompt import available_meta_prompts
from alignpro.prompting.model_card import META_PROMPT_FILE
from alignpro.training.recorded_holdout import keep_holdout, recorded_section

logger = logging.getLogger(__name__)

ComparisonT = TypeVar("ComparisonT", bound=ComparisonConfig)
SectionT = TypeVar("SectionT", bound=Section)


def as_trained(
    config: ComparisonT, models: Sequence[ModelConfig | None], prompters: Sequence[ModelConfig | None]
) -> ComparisonT:
    """Fill in what was not given.

    Args:
        config: The comparison.
        models: Those that are compared, whose runs say how prompts were held out.
        prompters: Those that rewrite: the first that is of a run says how it was asked.

    Raises:
        ConfigError: The runs held prompts out in different ways, or a config.yaml cannot be read.
    """
    filled: dict[str, Any] = {"data": keep_holdout(config.data, run_directories(models))}
    for run in run_directories(prompters):
        prompting, rollout = recorded_section(run, "prompting"), recorded_section(run, "rollout") or {}
        if prompting is None:
            continue
        prompting = dict(prompting)
        copy = run / "model" / META_PROMPT_FILE
        if prompting.get("meta_prompt") not in (None, *available_meta_prompts()) and copy.is_file():
            prompting["meta_prompt"] = str(copy)  # of the file as it was then
        filled["prompting"] = _filled(config.prompting, prompting, "prompting", run)
        filled["rewrite"] = _filled(config.rewrite, rollout.get("rewrite", {}), "rewrite", run)
        filled["respond"] = _filled(config.respond, rollout.get("respond", {}), "respond", run)
        break
    return config.model_copy(update=filled)


def run_directories(models: Sequence[ModelConfig | None]) -> list[Path]:
    """The run directories that models come from, as far as they can be run directories."""
    return [Path(model.path).parent for model in models if model is not None and Path(model.path).name == "model"]


def _filled(section: SectionT, recorded: Mapping[str, Any], name: str, run: Path) -> SectionT:
    """A section with recorded values for the keys that were not given."""
    kind = type(section)
    others = {
        key: value
        for key, value in recorded.items()
        if key in kind.model_fields and key not in section.model_fields_set
    }
    changed = {key: value for key, value in others.items() if value != getattr(section, key)}
    if not changed:
        return section
    said = ", ".join(f"{name}.{key}={value}" for key, value in changed.items())
    logger.info("%s, as in the training of %s", said, run)
    return kind.model_validate(section.model_dump(include=section.model_fields_set) | changed)
