"""The names of methods whose kind names them in a report: two of one kind are told apart by their keys."""

from __future__ import annotations

from alignpro.config import DialMethod, ExperimentConfig, RivalMethod, SelfRewardMethod
from alignpro.evaluation.labels import method_label

Named = DialMethod | SelfRewardMethod | RivalMethod


def method_name(config: ExperimentConfig, key: str) -> str:
    """The label of a method, or the name of its kind, with the method's key if another one would have the same name.

    Args:
        config: The experiment.
        key: Of one of its methods, which is of one of the kinds `Named`.
    """
    names = {other: _own_name(method) for other, method in config.methods.items() if isinstance(method, Named)}
    alone = list(names.values()).count(names[key]) == 1
    return names[key] if alone else f"{names[key]} ({key})"


def _own_name(method: Named) -> str:
    match method:
        case DialMethod():
            return method.label or "Dial"
        case SelfRewardMethod():
            return method.label or "Self-reward"
        case RivalMethod():
            return method.label or method_label(method.kind)
