"""Where sentences end, as tokens: so that a model can be sampled sentence by sentence."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_MARKS = (".", "!", "?", "…", "。", "！", "？")


def sentence_end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of tokens with which a sentence ends, ascending: their text ends with its mark, or has a line break.

    A mark within a number or an abbreviation ends one too; what is cut there is a shorter piece of the same text.

    Args:
        tokenizer: The model's.
    """
    special = set(tokenizer.all_special_ids)
    ids = [each for each in range(len(tokenizer)) if each not in special]
    texts = tokenizer.batch_decode([[each] for each in ids], clean_up_tokenization_spaces=False)
    return tuple(each for each, text in zip(ids, texts, strict=True) if "\n" in text or text.rstrip().endswith(_MARKS))
