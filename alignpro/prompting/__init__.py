"""Prompts as the two models see them: meta-prompts, chat templates and tokenizers.

x → the prompter's ids (`prompter_prompt`), and the rewrite x' → the target's ids (`target_prompt`). May import
`data`, `config` and `errors`.
"""
