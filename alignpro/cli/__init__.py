"""The command-line interface: one thin function per command, in files by subject.

Every training command takes YAML files and dotted overrides; later ones win:

    alignpro train base.yaml mine.yaml optimizer.learning_rate=1e-4

Each command imports what it needs, even the configuration, which takes pydantic and OmegaConf: `alignpro --help` is immediate.
May import everything.
"""

from alignpro.cli.application import app, main

__all__ = ["app", "main"]
