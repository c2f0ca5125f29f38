"""Every causal architecture of transformers that can be built tiny: it computes what transformers does, or is refused."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from tiny_models import tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from alignpro.engine import Completion, Engine, SamplingParams
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "is_decoder": True,
    "sliding_window": 6,  # shorter than the sequences
    **dict.fromkeys(["initializer_range", "init_std"], 0.3),  # far from uniform
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embedding_dim"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"], 48),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 128),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "embedding_size"], 16),
    **dict.fromkeys(["num_key_value_heads", "num_experts_per_tok"], 2),
    **dict.fromkeys(["head_dim", "kv_lora_rank", "q_lora_rank", "v_head_dim"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim"], 4),
    **dict.fromkeys(["n_shared_experts", "n_group", "topk_group"], 1),
    "logit_scale": 1.0,
    "rotary_dim": 8,
}

RIGHT = """
    afmoe apertus arcee aria_text axk1 beam bert-generation biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm
    deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text
    gemma4_unified_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared
    helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lfm2
    llama mellum minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moshi nanochat olmo olmo2 olmo3
    olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2 vaultgemma
    whisper youtu
""".split()  # noqa: SIM905 - a list of 77 strings is harder to read

REFUSED = {
    "recurrent layers": """
        bailing_hybrid falcon_h1 falcon_mamba inkling2_text inkling_text jamba lfm3 mamba minimax nemotron_h olmo_hybrid
        qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma
    """,
    "treats positions or masks in a special way": """
        bart bigbird_pegasus blenderbot blenderbot-small doge marian mbart nemotron pegasus phimoe plbart stablelm
    """,
    "are not its output layer applied to its last hidden states": """
        bert camembert data2vec-text ernie minicpm3 modernbert-decoder roberta roberta-prelayernorm xlm-roberta
        xlm-roberta-xl
    """,
    "attention does not go through transformers' AttentionInterface": """
        big_bird bloom falcon gpt_neox_japanese megatron-bert mvp openai-gpt prophetnet rembert roformer rwkv trocr xglm
        xlm xlnet
    """,
    "attention sinks are not supported": """
        deepseek_v4 flint gpt_oss granite_swa granitemoe_swa hy_v4 mimo_v2_flash
    """,
    "does not give the same over keys and values kept from earlier passes": """
        diffllama hrm_text
    """,
    "mat1 and mat2 shapes cannot be multiplied": """
        electra
    """,
    "has no attribute 'last_hidden_state'": """
        llama4_text
    """,
    "has wrong shape": """
        xlstm
    """,
}
"""Why an architecture is refused → those that are."""

QUICK = """
    llama qwen2 qwen3 gemma gemma2 gemma3_text gpt2 gpt_neox mistral ministral3 mixtral phi phi3 opt olmo3 exaone4
    smollm3 qwen3_moe granite deepseek_v3 diffllama doge hrm_text mamba gpt_oss bloom bert
""".split()  # noqa: SIM905
"""The others take a minute together."""


def build(name: str) -> PreTrainedModel:
    """Return a tiny model of an architecture with random weights; settings that it does not have are left out."""
    config_class: Any = CONFIG_MAPPING[name]
    known = {field for each in config_class.__mro__ for field in getattr(each, "__annotations__", {})}
    known |= {*inspect.signature(config_class.__init__).parameters, *getattr(config_class, "attribute_map", {})}
    config = config_class(**{key: value for key, value in TINY.items() if key in known})
    # Older versions of transformers take SDPA for Gemma 2 by default, which ignores its soft cap, so that it is refused.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, **({"attn_implementation": "eager"} if capped else {})
    )
    return model.eval()


PROMPTS = [list(range(10, 15)), list(range(20, 30))]
NEW = 6


def plain(model: PreTrainedModel, completions: list[Completion] | None = None) -> list[list[int]] | list[list[float]]:
    """By transformers' pass over each sequence alone: greedy tokens, or the log-probabilities of completions."""
    found = []
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        if completions is None:
            greedy = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=False
            )
            found.append(greedy[0, len(prompt) :].tolist())
        else:
            drawn = torch.tensor([completions[row].tokens])
            logits = model(torch.cat([ids, drawn], dim=1), use_cache=False).logits[:, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(-1, drawn[..., None]).flatten().tolist())
    return found


@torch.no_grad()
def check(name: str) -> None:
    """Check that an architecture generates what transformers does, alone and beside another sequence."""
    model = build(name)
    expected = plain(model)
    language_model = LanguageModel(model, tokenizer("llama"), name).requires_grad_(False)
    greedy, drawn = SamplingParams(max_tokens=NEW, temperature=0.0), SamplingParams(max_tokens=NEW)
    alone = [Engine({"m": language_model}).generate("m", [prompt], greedy)[0][0].tokens for prompt in PROMPTS]
    assert alone == expected
    engine = Engine({"m": language_model}, audit=True)
    assert [one.tokens for (one,) in engine.generate("m", PROMPTS, greedy)] == expected
    completions = [one for (one,) in engine.generate("m", PROMPTS, drawn)]
    for completion, logprobs in zip(completions, plain(model, completions), strict=True):
        assert completion.logprobs == pytest.approx(logprobs, abs=2e-4)


def cases() -> list[Any]:
    """Each architecture that the installed version has, with the reason for which it is refused."""
    named = dict.fromkeys(RIGHT) | {name: why for why, names in REFUSED.items() for name in names.split()}
    return [
        pytest.param(name, why, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, why in named.items()
        if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]


@pytest.mark.parametrize(("name", "why"), cases())
def test_an_architecture_is_right_or_refused(name: str, why: str | None) -> None:
    if why is None:
        check(name)
    else:
        with pytest.raises(ModelError, match=f"model {name}: .*{re.escape(why)}"):
            LanguageModel(build(name), tokenizer("llama"), name)


def test_at_least_74_architectures_are_right() -> None:
    assert len(set(RIGHT)) >= 74
