"""Prompts: the record type, loading, and the held-out split.

| file | subject |
|---|---|
| `prompt` | the record that is passed through the project |
| `file_formats` | JSON, JSON Lines, CSV, TSV, Parquet → rows |
| `conversation_formats` | messages, ShareGPT, transcripts → the turns of a conversation |
| `columns` | which column is which field of a record |
| `presets` | public data sets by name |
| `loading` | all of it: `data.source` → prompts, without duplicates and bad rows |
| `splits` | training and held-out prompts, a choice of some, clusters of prompts that are alike |

May import `config` and `errors`.
"""

from alignpro.data.columns import available_fields
from alignpro.data.loading import DataSet, LoadReport, load_prompts
from alignpro.data.presets import available_presets
from alignpro.data.prompt import Message, Prompt, replace_lone_surrogates
from alignpro.data.splits import choose, cluster_labels, is_held_out, split, split_for_training

__all__ = [
    "DataSet",
    "LoadReport",
    "Message",
    "Prompt",
    "available_fields",
    "available_presets",
    "choose",
    "cluster_labels",
    "is_held_out",
    "load_prompts",
    "replace_lone_surrogates",
    "split",
    "split_for_training",
]
