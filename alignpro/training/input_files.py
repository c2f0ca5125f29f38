"""Whether the files that a configuration names are there: checks that need neither torch nor the network, and so come first."""

from __future__ import annotations

from collections.abc import Iterator

from alignpro.config import DataConfig, ModelConfig, ModelRewardConfig, PolicyConfig, Section
from alignpro.data.loading import check_files
from alignpro.prompting.pretrained import require_pretrained
from alignpro.training.held_out_pairs import require_better_than_length


def check_input_files(config: Section) -> None:
    """Check that the directories of models and the files of data are there.

    A name on the hub is looked for in its cache alone, and only where the hub is not to be asked.

    Raises:
        ModelError: A model is not there, or is a reward model that has to know more than length and does not.
        DataError: A file of data is not there.
    """
    for key, section in sections(config):
        if isinstance(section, ModelConfig):
            for name, path in model_paths(key, section):
                require_pretrained(path, name, ask_hub=False)
        if isinstance(section, ModelRewardConfig) and section.must_beat_length:
            require_better_than_length(section.model.path)
    if isinstance(data := getattr(config, "data", None), DataConfig):
        check_files(data)


def model_paths(key: str, model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the value of everything in a model's section that names a model or a tokenizer."""
    yield f"{key}.path", model.path
    if model.tokenizer is not None:
        yield f"{key}.tokenizer", model.tokenizer
    if isinstance(model, PolicyConfig) and model.reference is not None:
        yield f"{key}.reference", model.reference


def sections(config: Section, key: str = "") -> Iterator[tuple[str, Section]]:
    """Yield all sections within one, with their dotted keys."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        several = isinstance(value, list | dict)
        items = value.items() if isinstance(value, dict) else enumerate(value if several else [value])
        for index, each in items:
            if isinstance(each, Section):
                where = f"{key}{name}" + (f".{index}" if several else "")
                yield where, each
                yield from sections(each, f"{where}.")
