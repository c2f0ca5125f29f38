"""The card of a saved prompter: how to use it without this package."""

from __future__ import annotations

from pathlib import Path

from alignpro.prompting.meta_prompt import MetaPrompt

META_PROMPT_FILE = "meta_prompt.jinja"

_CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [prompt-optimization, align-pro]
---

# A prompter

Rewrites a user's prompt so that another model answers it better; trained with Align-Pro. The user's message to it is `{file}`
in this directory, a Jinja template of `prompt` and of `history`, the turns before it:

````jinja
{meta_prompt}
````

With transformers{peft}:

```python
from pathlib import Path

from jinja2 import Template
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = Path("path/to/this/directory")
tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
message = Template((directory / "{file}").read_text()).render(prompt="explain dns to my mum", history=[])
turns = [{{"role": "user", "content": message}}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens={max_tokens}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
```
"""


def write_card(directory: Path, meta_prompt: MetaPrompt, max_tokens: int) -> None:
    """Write ``README.md`` and the meta-prompt beside a saved prompter.

    Args:
        directory: Of the saved model.
        meta_prompt: With which it was trained.
        max_tokens: Most tokens of a rewrite.
    """
    adapter = (directory / "adapter_config.json").is_file()
    (directory / META_PROMPT_FILE).write_text(meta_prompt.source, encoding="utf-8")
    card = _CARD.format(
        library="peft" if adapter else "transformers",
        file=META_PROMPT_FILE,
        meta_prompt=meta_prompt.source.strip(),
        peft=" and peft" if adapter else "",
        max_tokens=max_tokens,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
