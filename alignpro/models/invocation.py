"""From where in a prompt an activated LoRA acts, and on which tokens of a pass; `token_lora` makes it act on these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from typing import TYPE_CHECKING

from torch import Tensor

from alignpro.data import Prompt
from alignpro.errors import DataError

if TYPE_CHECKING:
    from peft import PeftModel


class ActiveTokens:
    """The tokens that a LoRA acts on during a forward pass; one object is shared by all layers of a model.

    Each thread has its own: a model and its base may run in two.
    """

    def __init__(self) -> None:
        self._rows: dict[int, Tensor | bool] = {}  # by thread; a `threading.local` could not be copied with the model

    @property
    def rows(self) -> Tensor | bool | None:
        """(A,) int64, distinct packed indices; True for all tokens, False for none; None leaves the choice to peft."""
        return self._rows.get(get_ident())

    @contextmanager
    def set(self, rows: Tensor | bool) -> Iterator[None]:
        """Make the LoRA act on these tokens within the context, in this thread."""
        thread, before = get_ident(), self.rows
        self._rows[thread] = rows
        try:
            yield
        finally:
            if before is None:
                del self._rows[thread]
            else:
                self._rows[thread] = before

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The ``context_fn`` of `torch.utils.checkpoint`, so that recomputation uses the active tokens of the forward pass."""
        return nullcontext(), nullcontext() if self.rows is None else self.set(self.rows)


def invocation_tokens(model: PeftModel) -> tuple[int, ...]:
    """Return the invocation tokens of the model's adapter; empty if it is not an activated LoRA."""
    return tuple(getattr(model.active_peft_config, "alora_invocation_tokens", None) or ())


def invocation_start(prompt: Sequence[int], invocation: Sequence[int]) -> int:
    """Return the index of the first token that an activated LoRA acts on.

    As in peft, this is the start of the last occurrence of its invocation tokens.

    Raises:
        DataError: The invocation tokens do not occur in the prompt.
    """
    wanted = tuple(invocation)
    for start in range(len(prompt) - len(wanted), -1, -1):
        if tuple(prompt[start : start + len(wanted)]) == wanted:
            return start
    raise DataError(
        f"the prompt does not contain the invocation tokens {list(wanted)}, from which the activated LoRA acts: is it "
        "rendered with the chat template that the adapter was trained with?"
    )


def with_invocation(encode: Callable[[Prompt], list[int]], invocation: Sequence[int]) -> Callable[[Prompt], list[int]]:
    """Return an encoder of prompts that raises a `DataError` for one on which an activated LoRA would not act.

    Args:
        encode: Prompt → input ids.
        invocation: The invocation tokens of the LoRA; none for a model without one.
    """

    def encoded(prompt: Prompt) -> list[int]:
        ids = encode(prompt)
        try:
            if invocation:
                invocation_start(ids, invocation)
        except DataError as error:
            raise DataError(f"policy.adapter.invocation: {error}") from error
        return ids

    return encoded
