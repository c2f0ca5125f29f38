"""Jinja templates that users write around texts: which variables they may use is checked when they are read."""

from __future__ import annotations

from collections.abc import Collection

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignpro.errors import ConfigError


def parse_template(
    where: str, source: str, variables: Collection[str], needed: str
) -> tuple[jinja2.Template, frozenset[str]]:
    """Compile a template. Returns it with the variables that it uses.

    Args:
        where: The key and the template's name, for messages.
        source: The template.
        variables: Names of those that there are, in the order in which a message tells them.
        needed: The one of them that is the text to be rewritten.

    Raises:
        ConfigError: It is not a Jinja template, uses other variables, or lacks the needed one.
    """
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
    try:
        used = jinja2.meta.find_undeclared_variables(environment.parse(source))
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where}:{error.lineno}: {error.message}") from error
    if unknown := used.difference(variables):
        *names, last = variables
        known = f"{', '.join(names)} or {last}"
        raise ConfigError(f"{where}: unknown variable {', '.join(sorted(unknown))}; expected {known}")
    if needed not in used:
        raise ConfigError(f"{where}: never uses {{{{ {needed} }}}}, the text to be rewritten")
    return template, frozenset(used)
