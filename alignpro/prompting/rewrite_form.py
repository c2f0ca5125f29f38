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

    White space before the addition does not matter, as `rewrite_from` puts a blank line there; a text that goes on in the
    prompt's last word is none.
    """
    if form == "whole":
        return rewrite.strip()
    start, text = prompt.strip(), rewrite.strip()
    rest = text[len(start) :]
    within_word = start[-1:].isalnum() and rest[:1].isalnum()
    return rest.strip() if text.startswith(start) and not within_word else None
