"""The card of a saved model: how a prompter is used without this package, what it was trained from, and how good it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignpro.config import RewriteForm
from alignpro.prompting.memory import FILE_NAME, Memory
from alignpro.prompting.prompter_prompt import PrompterTemplate

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

{form}

With transformers{peft}:

```python
from pathlib import Path

from jinja2 import Template
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = Path("path/to/this/directory")
tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
prompt = "explain dns to my mum"
message = Template((directory / "{file}").read_text()).render(prompt=prompt, history=[])
turns = [{{"role": "user", "content": message}}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True{variables})
output = model.generate(**inputs, max_new_tokens={max_tokens}, do_sample=False{ends})
written = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
print({rewrite})
```

Behind a server with OpenAI's interface, such as vLLM's:

```sh
{serve}
```

```python
import json
import urllib.request
from pathlib import Path

from jinja2 import Template

template = Template((Path("path/to/this/directory") / "{file}").read_text())
prompt = "explain dns to my mum"
turns = [{{"role": "user", "content": template.render(prompt=prompt, history=[])}}]
body = {{"model": "prompter", "messages": turns, "max_tokens": {max_tokens}, "temperature": 0{request}}}
request = urllib.request.Request("http://localhost:8000/v1/chat/completions", json.dumps(body).encode())
request.add_header("Content-Type", "application/json")
with urllib.request.urlopen(request) as answer:
    written = json.load(answer)["choices"][0]["message"]["content"].strip()
print({rewrite})
```
"""

_FORMS: Mapping[RewriteForm, str] = {
    "whole": "Its answer is the rewrite.",
    "addition": "Its answer is added to the prompt, after a blank line; both are the rewrite.",
}
_REWRITES: Mapping[RewriteForm, str] = {
    "whole": "written",
    "addition": 'f"{prompt}\\n\\n{written}" if written else prompt',
}
"""The rewrite in Python."""

_PLAIN_CARD = """\
---
library_name: {library}
tags: [align-pro]
---

# A model trained with Align-Pro

It is used like the model that it was trained from.
"""

CARD_FILE = "README.md"


def write_card(directory: Path, prompter: PrompterTemplate, max_tokens: int) -> None:
    """Write ``README.md`` and the meta-prompt beside a saved prompter.

    Args:
        directory: Of the saved model.
        prompter: How it was trained: its meta-prompt, and what it writes of a rewrite.
        max_tokens: Most tokens that it writes.
    """
    adapter = (directory / "adapter_config.json").is_file()
    (directory / META_PROMPT_FILE).write_text(prompter.meta_prompt.source, encoding="utf-8")
    card = _CARD.format(
        library="peft" if adapter else "transformers",
        file=META_PROMPT_FILE,
        meta_prompt=prompter.meta_prompt.source.strip(),
        form=_FORMS[prompter.form],
        rewrite=_REWRITES[prompter.form],
        peft=" and peft" if adapter else "",
        max_tokens=max_tokens,
        serve=_serve(directory),
        variables="".join(f", {name}={value!r}" for name, value in prompter.chat.variables.items()),
        ends=f", eos_token_id={list(prompter.stop_token_ids)}" if adapter else "",
        request=_request(prompter, adapter),
    )
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def write_memory(directory: Path, memory: Memory) -> None:
    """Write the memory of a saved prompter, and a section of its card on it.

    Args:
        directory: Of the saved model, with its card.
        memory: What the prompter saw at the end of its training.
    """
    (directory / FILE_NAME).write_bytes(memory.dumps())
    lines = [
        f"It was trained with {len(memory.rewrites)} past rewrites of {len(memory)} training prompts in `{FILE_NAME}`: before "
        "its message it sees those of similar prompts with their rewards, written by the template in the first line of that "
        "file. `alignpro rewrite`, `eval` and `serve` show them; the code above does not, and the rewrites are then those of a "
        "prompter that sees none.",
    ]
    write_section(directory, "Memory", lines)


def write_section(directory: Path, name: str, lines: Sequence[str]) -> None:
    """Add a section to the card of a saved model, or replace the one of that name; a model without a card gets a plain one.

    Args:
        directory: Of the saved model.
        name: The section's heading.
        lines: Its content in Markdown.

    Raises:
        OSError: The card cannot be read or written.
    """
    path = directory / CARD_FILE
    adapter = (directory / "adapter_config.json").is_file()
    card = (
        path.read_text(encoding="utf-8")
        if path.is_file()
        else _PLAIN_CARD.format(library="peft" if adapter else "transformers")
    )
    begin, end = (f"<!-- {edge} of: {name} -->" for edge in ("begin", "end"))
    section = "\n".join([begin, f"## {name}", "", *lines, end, ""])
    if begin in card and end in card:
        head, _, rest = card.partition(begin)
        card = head + section + rest.partition(end)[2].removeprefix("\n")
    else:
        card = f"{card.rstrip()}\n\n{section}"
    path.write_text(card, encoding="utf-8")


def licence_of(directory: Path) -> str | None:
    """The licence of a model as its directory tells it: in the card's front matter, or the first line of a LICENSE file."""
    card = directory / CARD_FILE
    if card.is_file():
        found = re.match(r"---\n(?:.*\n)*?license(?:_name)?: *(.+)\n(?:.*\n)*?---", card.read_text("utf-8", "replace"))
        if found:
            return found[1].strip()
    for file in sorted(directory.glob("LICEN[SC]E*")):
        return next((line.strip() for line in file.read_text("utf-8", "replace").splitlines() if line.strip()), None)
    return None


def _request(prompter: PrompterTemplate, adapter: bool) -> str:
    """What a request says beside the message, in Python: the template's variables, and how a text ends with an adapter.

    A whole model's directory tells its end tokens; the base model of an adapter may have others.
    """
    told = {"chat_template_kwargs": prompter.chat.variables} if prompter.chat.variables else {}
    ends = {"stop_token_ids": list(prompter.stop_token_ids)} if adapter else {}
    return "".join(f', "{name}": {value!r}' for name, value in {**told, **ends}.items())


def _serve(directory: Path) -> str:
    """The command that serves a saved prompter with vLLM."""
    adapter = directory / "adapter_config.json"
    if not adapter.is_file():
        return "vllm serve path/to/this/directory --served-model-name prompter"
    settings = json.loads(adapter.read_text(encoding="utf-8"))
    base, rank = settings.get("base_model_name_or_path") or "BASE", settings.get("r")
    if rank is None:
        return "# a soft prompt is used through peft: no server takes it"
    return f"vllm serve {base} --enable-lora --max-lora-rank {max(16, rank)} --lora-modules prompter=path/to/this/directory"
