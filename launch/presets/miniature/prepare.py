"""Create the inputs of the miniature preset: a BPE tokenizer, two untrained models and the SFT records.

    python launch/presets/miniature/prepare.py --data DIR --out DIR

The data directory holds preference and instruction files in any format that `alignpro` reads. All text goes through the
project's own loader, without manual cleaning.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from alignpro.config import DataConfig
from alignpro.data import Prompt, load_prompts

VOCABULARY = 4096
CONTEXT = 640
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def main() -> None:
    """Write ``init/`` and ``records/`` under ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    prompts = list(load_all(arguments.data))
    tokenizer = train_tokenizer(texts(prompts))
    save(tokenizer, Qwen2Config(architectures=["Qwen2ForCausalLM"], **SHAPE), arguments.out / "init/prompter")
    save(tokenizer, LlamaConfig(architectures=["LlamaForCausalLM"], **SHAPE), arguments.out / "init/target")
    records = arguments.out / "records"
    write(records / "responses.jsonl", response_records(prompts))
    write(records / "rewrites.jsonl", rewrite_records(prompts))


def load_all(directory: Path) -> Iterator[Prompt]:
    """Yield the prompts of all data files, in the order of their names."""
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".jsonl", ".csv", ".parquet", ".gz"):
            data = load_prompts(DataConfig(source=str(path)))
            print(f"{path.name}: {data.report}")
            yield from data.prompts


def texts(prompts: Iterable[Prompt]) -> Iterator[str]:
    """Yield all text that a model will read or write."""
    for prompt in prompts:
        yield from (message.content for message in prompt.messages)
        yield from (t for t in (prompt.rewrite, prompt.response, prompt.chosen, prompt.rejected) if t)


def train_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any script and any broken character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save(tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig, directory: Path) -> None:
    """Write a model directory for ``from_scratch: true``: configuration and tokenizer, no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def response_records(prompts: Iterable[Prompt]) -> Iterator[dict[str, Any]]:
    """Yield (x, y) pairs for the target; y is the reference response or, without one, the preferred response."""
    for prompt in prompts:
        response = prompt.response or prompt.chosen
        if response:
            yield {"messages": messages(prompt), "response": response}


def rewrite_records(prompts: Iterable[Prompt]) -> Iterator[dict[str, Any]]:
    """Yield (x, x') pairs for the prompter: every prompt with itself, and with its rewrite if the data has one."""
    for prompt in prompts:
        if not prompt.text.strip():
            continue
        yield {"messages": messages(prompt), "rewrite": prompt.text}
        if prompt.rewrite:
            yield {"messages": messages(prompt), "rewrite": prompt.rewrite}


def messages(prompt: Prompt) -> list[dict[str, str]]:
    """Return the conversation as JSON objects."""
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


if __name__ == "__main__":
    main()
