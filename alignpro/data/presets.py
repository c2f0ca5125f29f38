"""Public data sets by name: where to find each, and how to convert its rows to a `Prompt`.

The paper names the data sets but not their splits; the splits and variants here are our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignpro.data.columns import to_prompt
from alignpro.data.file_formats import Row, Table
from alignpro.data.prompt import Prompt
from alignpro.errors import DataError


@dataclass(frozen=True)
class Preset:
    """A data set on the Hugging Face Hub and its column mapping."""

    hub_id: str
    split: str
    columns: Mapping[str, str]
    description: str
    known_bad: int = 0
    """Number of rows known to be broken in the data set, allowed in addition to ``data.max_bad_rows``."""

    def convert(self, row: Mapping[str, Any], source: str) -> Prompt:
        """Convert one row of the data set to a `Prompt`; pure.

        Raises:
            BadRow: The row has no usable prompt.
        """
        return to_prompt(row, self.columns, source)


def presets() -> dict[str, Preset]:
    """The presets by name."""
    return {
        "ultrafeedback": Preset(
            "HuggingFaceH4/ultrafeedback_binarized",
            "train_prefs",
            {
                "prompt": "prompt",
                "chosen": "chosen",  # [user, assistant]
                "rejected": "rejected",
                **_metadata("score_chosen", "score_rejected"),
            },
            "61 thousand instructions with a preferred and another response",
        ),
        "helpsteer": Preset(
            "nvidia/HelpSteer",
            "train",
            {
                "prompt": "prompt",
                "response": "response",
                **_metadata("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
            },
            "35 thousand responses to some 10 thousand prompts, rated 0 to 4 in five respects",
        ),
        "orca": Preset(
            "Intel/orca_dpo_pairs",
            "train",
            {"system": "system", "prompt": "question", "chosen": "chosen", "rejected": "rejected"},
            "13 thousand instructions with system messages and response pairs",
        ),
        "hh-rlhf": Preset(
            "Anthropic/hh-rlhf",
            "train",
            {"chosen": "chosen", "rejected": "rejected"},  # transcripts that differ in the last turn
            "161 thousand pairs of multi-turn dialogues",
            # Transcripts that end before the last answer: 4 of 2,312 in the harmless test split.
            known_bad=2000,
        ),
        "bpo": Preset(
            "THUDM/BPO",
            "train",
            {"prompt": "prompt", "rewrite": "optimized_prompt", "chosen": "good_res", "rejected": "bad_res"},
            "14 thousand prompts with an optimised form (Cheng et al. 2023) and response pairs",
        ),
    }


def available_presets() -> dict[str, str]:
    """The presets with their descriptions."""
    return {name: f"{preset.hub_id} ({preset.split}): {preset.description}" for name, preset in presets().items()}


def read_preset(name: str, preset: Preset, split: str | None) -> Table:
    """Download the rows of a preset, or read them from the cache.

    Raises:
        DataError: The data set or the split cannot be loaded.
    """
    import datasets

    split = split or preset.split
    try:
        loaded = datasets.load_dataset(preset.hub_id, split=split)
    except Exception as error:  # the Hub client has no common exception class
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"data.source {name}: cannot load split {split!r} of {preset.hub_id}: {reason}; "
            "without network access, download its files elsewhere and name them in data.source"
        ) from error
    where = f"{preset.hub_id}/{split}"
    rows = [Row(f"{where}:row {number}", dict(values)) for number, values in enumerate(loaded, start=1)]
    return Table(where, tuple(loaded.column_names), rows)


def _metadata(*columns: str) -> dict[str, str]:
    return {f"metadata.{column}": column for column in columns}
