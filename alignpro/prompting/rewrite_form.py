"""The form of a rewrite: the prompter writes all of it, or an addition that follows the prompt.

An addition keeps the user's words by construction, costs a few tokens where a whole rewrite copies the prompt first, and lets
all rewrites of a prompt share the target's cache of that prompt.
"""

from __future__ import annotations

from alignpro.config import RewriteForm

_BETWEEN = "\n\n"


def rewrite_from(form: RewriteForm, prompt: str, written: str) -> str:
    """The rewrite x' that a target gets for what the prompter wrote.

    Args:
        form: ``whole``: what was written is the rewrite. ``addition``: it follows the prompt after a blank line.
        prompt: The text of the user's last turn, x.
        written: What the prompter wrote, stripped; an empty addition leaves the prompt as it is.
    """
    if form == "whole":
        return written
    return f"{prompt}{_BETWEEN}{written}" if written else prompt


def written_part(form: RewriteForm, prompt: str, rewrite: str) -> str | None:
    """What the prompter has to write for a rewrite, stripped; None if no addition to the prompt gives it.

    White space between prompt and addition does not matter, so ``rewrite_from`` may return it with a blank line there.
    """
    if form == "whole":
        return rewrite.strip()
    start, text = prompt.strip(), rewrite.strip()
    return text[len(start) :].strip() if text.startswith(start) else None
