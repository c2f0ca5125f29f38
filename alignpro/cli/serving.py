"""`alignpro serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignpro.cli.arguments import load_late
from alignpro.errors import ConfigError

if TYPE_CHECKING:
    from alignpro.config import ServeConfig

_PACKAGES = ("starlette", "uvicorn", "prometheus_client", "h11")


def serve(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Run directories whose prompters rewrite, the default first; without any, requests pass as they are.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="URL|PATH", help="Base URL of an OpenAI-compatible server, or a model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The only model that clients may ask a server for.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the target's key.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="[default: 8000]")] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(help="A rewrite that takes longer is not used: the prompt goes as it came.")
    ] = None,
    percent: Annotated[float | None, typer.Option(help="Share of users whose prompts are rewritten.")] = None,
    shadow: Annotated[
        bool | None, typer.Option("--shadow/--no-shadow", help="Rewrite and log, but send the prompt as it came.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|key=value",
            help="YAML files and overrides of any key; may be given several times.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every key with its value, and exit.")] = False,
) -> None:
    """Serve an OpenAI-compatible API that rewrites prompts in front of a target.

    SIGHUP reads the configuration again and serves its runs without dropping requests; SIGTERM lets requests in flight end.
    """
    given = {
        "runs": [str(run) for run in runs] if runs else None,
        "target": target,
        "model": model,
        "api_key_env": api_key_env,
        "listen.host": host,
        "listen.port": port,
        "rewriting.deadline_ms": deadline_ms,
        "rewriting.percent": percent,
        "rewriting.shadow": shadow,
    }
    arguments = [*(config or []), *(f"{key}={_quoted(value)}" for key, value in given.items() if value is not None)]

    def read() -> ServeConfig:
        from alignpro.config import ServeConfig, load_config

        return load_config(ServeConfig, arguments)

    loaded = read()
    if dry_run:
        from alignpro.config import dump_config

        typer.echo(dump_config(loaded), nl=False)
        return
    _serving()(loaded, read)


def _serving() -> Any:
    try:
        return load_late("alignpro.serving.server:serve")
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise ConfigError(f"`alignpro serve` needs {error.name}: pip install 'alignpro[serve]'") from None


def _quoted(value: Any) -> str:
    """A value as YAML, which is not interpolated."""
    return json.dumps(value).replace("${", "\\${")
