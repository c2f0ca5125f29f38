"""A bank of rewriting moves: real prompts → (x, x') pairs for the prompter's SFT, and which move a rewrite made."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from alignpro.config import RewriteForm
from alignpro.data import Prompt
from alignpro.errors import ConfigError
from alignpro.prompting.rewrite_template import RewriteTemplate

_DEFAULT = Path(__file__).with_name("moves.yaml")

COPY = "copy"
"""The move of a rewrite that is its prompt."""
OTHER = "other"
"""The move of a rewrite that no template of the bank writes."""


@dataclass(frozen=True)
class MoveUse:
    """Which moves the rewrites of a prompter make."""

    shares: Mapping[str, float]
    """Move → its share of the rewrites, with `COPY` and `OTHER`, the most frequent first; sums to 1."""
    entropy: float
    """Of these shares without `COPY` and `OTHER`, renormalised; nats. 0 if a single move, or none, was made."""
    kept: float
    """Share of the rewrites that contain their prompt word for word."""

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            "entropy": self.entropy,
            "moves": math.exp(self.entropy),
            "copies": self.shares.get(COPY, 0.0),
            "other": self.shares.get(OTHER, 0.0),
            "kept": self.kept,
            "shares": dict(self.shares),
        }


class MoveBank:
    """Named moves, each with one template or several.

    Args:
        moves: Name → templates.
    """

    def __init__(self, moves: Mapping[str, Sequence[RewriteTemplate]]) -> None:
        self.moves = moves
        longest_first = [(name, template) for name, templates in moves.items() for template in templates]
        self._templates = sorted(longest_first, key=lambda each: -len(each[1].before + each[1].after))

    def pairs(
        self, prompts: Sequence[Prompt], per_prompt: int, copies: float, seed: int, joined: float = 0.0
    ) -> list[Prompt]:
        """Rewrite each prompt by ``per_prompt`` different moves, drawn uniformly; a share of the rewrites are copies.

        What is drawn depends on the seed and the prompt alone, so it is the same whatever other prompts there are.

        Args:
            prompts: The prompts; those with a rewrite of their own keep it as one more pair, which comes first. A prompt that
                occurs with several rewrites is rewritten by moves once.
            per_prompt: Pairs of moves per prompt; at most as many as there are moves.
            copies: Probability that a rewrite is the prompt itself, in [0, 1].
            seed: Of the draws.
            joined: Probability that a rewrite that is no copy is rewritten again by another move, in [0, 1].
        """
        made = []
        names = list(self.moves)
        seen: set[str] = set()
        for prompt in prompts:
            made += [prompt] if prompt.rewrite is not None else []
            if prompt.id in seen:
                continue
            seen.add(prompt.id)
            draw = random.Random(f"alignpro/moves/{seed}/{prompt.id}")
            for name in draw.sample(names, min(per_prompt, len(names))):
                template = draw.choice(self.moves[name])
                if draw.random() < copies:
                    made.append(replace(prompt, rewrite=prompt.text))
                    continue
                text = template(prompt.text)
                if joined and len(names) > 1 and draw.random() < joined:
                    second = draw.choice([each for each in names if each != name])
                    text = draw.choice(self.moves[second])(text)
                made.append(replace(prompt, rewrite=text))
        return made

    def of_form(self, form: RewriteForm) -> MoveBank:
        """The moves whose rewrites a prompter that writes this form can write.

        Raises:
            ConfigError: There is none.
        """
        kept = {
            name: [each for each in templates if form == "whole" or each.adds] for name, templates in self.moves.items()
        }
        if not any(kept.values()):
            raise ConfigError(
                "prompting.form=addition: none of the moves adds a text after the prompt: give templates without {{ prompt }}"
            )
        return MoveBank({name: templates for name, templates in kept.items() if templates})

    def move_of(self, prompt: str, rewrite: str) -> str:
        """The move whose template a rewrite matches, the longest if several do; else `COPY` or `OTHER`.

        The text around the prompt decides, so a rewrite that restates the prompt in other words still matches. Of two moves
        one after the other it is the second.
        """
        if rewrite.split() == prompt.split():
            return COPY
        for name, template in self._templates:
            if template.matches(rewrite):
                return name
        return OTHER

    def use(self, prompts: Sequence[str], rewrites: Sequence[Sequence[str]]) -> MoveUse:
        """Count the moves of rewrites.

        Args:
            prompts: [P].
            rewrites: [P][N], N ≥ 1 rewrites of each.
        """
        pairs = [(prompt, each) for prompt, group in zip(prompts, rewrites, strict=True) for each in group]
        counts = Counter(self.move_of(prompt, rewrite) for prompt, rewrite in pairs)
        made = [count for name, count in counts.items() if name not in (COPY, OTHER)]
        return MoveUse(
            {name: count / len(pairs) for name, count in counts.most_common()},
            -sum(count / sum(made) * math.log(count / sum(made)) for count in made) if len(made) > 1 else 0.0,
            sum(prompt.strip() in rewrite for prompt, rewrite in pairs) / len(pairs),
        )


def load_moves(name: str) -> MoveBank:
    """Read a bank of moves.

    Args:
        name: ``default``, or a YAML file that maps names to a template or a list of templates (`RewriteTemplate`).

    Raises:
        ConfigError: The file does not exist or is not such a mapping, or a template is wrong; the message names the entry.
    """
    path = _DEFAULT if name == "default" else Path(name).expanduser()
    where = f"moves {name}"
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeyLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: no such file; expected `default`, or a YAML file of moves") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise ConfigError(f"{where}: expected a mapping of names to templates")
    return MoveBank({str(move): _templates(f"{where}: {move}", str(move), given) for move, given in loaded.items()})


def _templates(where: str, move: str, given: object) -> list[RewriteTemplate]:
    if move in (COPY, OTHER):
        raise ConfigError(f"{where}: this name is reserved; choose another")
    texts = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"{where}: expected a template or a list of templates, each a text (quote it if it has a colon)"
        )
    return [
        RewriteTemplate(text, where if len(texts) == 1 else f"{where}, template {i}") for i, text in enumerate(texts, 1)
    ]


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that occurs twice in a mapping, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the name {key.value!r} occurs more than once", key.start_mark
                )
        return super().construct_mapping(node, deep)
