"""Prompts: the record type, loading, and the held-out split.

May import `config` and `errors`.
"""

from alignpro.data.columns import available_fields
from alignpro.data.loading import DataSet, LoadReport, load_prompts
from alignpro.data.presets import available_presets
from alignpro.data.prompt import Message, Prompt, replace_lone_surrogates
from alignpro.data.splits import is_held_out, split

__all__ = [
    "DataSet",
    "LoadReport",
    "Message",
    "Prompt",
    "available_fields",
    "available_presets",
    "is_held_out",
    "load_prompts",
    "replace_lone_surrogates",
    "split",
]
