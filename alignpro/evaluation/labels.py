"""The names of methods in figures and reports."""

from __future__ import annotations

_LABELS = {
    "no_finetuning": "No fine-tuning",
    "sft_prompter": "Reference prompter",
    "gibbs": "Gibbs",
    "align_pro": "Align-Pro",
    "oracle": "Oracle (RLHF)",
    "candidates": "Candidates",
    "gepa": "GEPA",
    "miprov2": "MIPROv2",
}
_INSTRUCTION, _GIBBS, _BEST_OF, _DIAL = "instruction_", "gibbs_", "best_of_", "dial_"


def method_label(method: str) -> str:
    """The name of a method, by its key or that of its arm."""
    if method in _LABELS:
        return _LABELS[method]
    if method.startswith(_GIBBS) and method.removeprefix(_GIBBS).isdecimal():
        return f"Gibbs, N = {method.removeprefix(_GIBBS)}"
    if method.startswith(_BEST_OF) and method.removeprefix(_BEST_OF).isdecimal():
        return f"Best of {method.removeprefix(_BEST_OF)}"
    if method.startswith(_DIAL):
        return f"Dial, s = {method.removeprefix(_DIAL)}"
    if method.startswith(_INSTRUCTION):
        return f"Instruction: {method.removeprefix(_INSTRUCTION).replace('_', ' ')}"
    return method.replace("_", " ")
