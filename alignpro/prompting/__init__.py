"""Prompts as the two models see them: meta-prompts, chat templates and tokenizers.

| file | subject |
|---|---|
| `prompter_prompt` | x → the prompter's tokens, and its tokens → the rewrite x' |
| `target_prompt` | a rewrite x' → the target's tokens, and its tokens → the response y |
| `rewrite_form` | what the prompter writes of a rewrite: all of it, or an addition to the prompt |
| `meta_prompt`, `meta_prompts/` | the instruction around x that asks for a rewrite |
| `memory`, `bm25` | past rewrites of training prompts with their rewards; which of them are shown with x |
| `memory_template`, `memory_templates/` | how they are written before the instruction |
| `memory_context` | how much of it fits in the prompter's input |
| `moves`, `moves.yaml` | generic moves that rewrite real prompts, for the prompter's SFT; which move a rewrite made |
| `rewrite_template` | one rewrite by rule: a text to append, or a template |
| `chat_template` | a conversation ↔ tokens, with no special tokens from user text |
| `template_source` | where a chat template comes from; the fixed date |
| `plain_text` | text → tokens, in which the text of special tokens is plain text |
| `reasoning` | what a model writes between think tags |
| `tokenization` | loading tokenizers |
| `length_filter` | leaving out prompts that are too long or refused |

May import `data`, `config` and `errors`.
"""
