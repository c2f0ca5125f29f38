"""What all methods of an experiment have in common: where they are run."""

from __future__ import annotations

from pydantic import Field

from alignpro.config.section import Section


class MethodSection(Section):
    """A method of an experiment. By default it has cells for all tasks and targets."""

    tasks: list[str] | None = Field(None, min_length=1)
    """The tasks of the experiment for which it is run; by default all."""
    targets: list[str] | None = Field(None, min_length=1)
    """The targets of the experiment with which it is run; by default all."""

    def runs(self, task: str, target: str) -> bool:
        """Whether it has cells for a task and a target."""
        return (self.tasks is None or task in self.tasks) and (self.targets is None or target in self.targets)
