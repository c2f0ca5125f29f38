"""`alignpro rival`: the best instruction that an optimiser of prompts finds within a number of responses of the target."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from alignpro.config import ConfigSource, ModelConfig, RivalConfig, SearchSection, dump_config, resolve_config
from alignpro.config.endpoints import HOW_SERVERS_ARE_ASKED, SPENDING
from alignpro.config.fingerprint import fingerprint
from alignpro.data import Prompt, choose, load_prompts, split
from alignpro.engine import Engine
from alignpro.errors import DataError
from alignpro.evaluation.evaluate import prepare_directory
from alignpro.evaluation.labels import method_label
from alignpro.experiments.rivals.answers import FILE_NAME, AnswerFile
from alignpro.experiments.rivals.asking import CallsSpent, Scoreboard, TargetAsker
from alignpro.experiments.rivals.optimizers import InstructionSearch, require_dspy
from alignpro.experiments.rivals.proposing import ProposerAsker
from alignpro.models.progress_bars import without_progress_bars
from alignpro.rewards import RewardStack, build_reward
from alignpro.targets.base import Target
from alignpro.targets.build import build_target
from alignpro.targets.local import LocalTarget
from alignpro.targets.servers import Servers, open_servers
from alignpro.training.durability import disk_errors, replace_text
from alignpro.versions import versions

logger = logging.getLogger(__name__)

RESULT_FILE, INSTRUCTION_FILE = "rival.json", "instruction.txt"


@without_progress_bars()
def search_instruction(config: ConfigSource[RivalConfig]) -> dict[str, Any]:
    """Search an instruction, and write ``instruction.txt`` and ``rival.json``.

    A search that was interrupted is repeated with the answers that it has got, and goes on where it stopped.

    Returns:
        The content of ``rival.json``.

    Raises:
        TrainingError: The directory holds a finished search, or one with another configuration.
        DataError: There are too few training prompts.
        AlignProError: The configuration, a model, the data or the reward cannot be used.
    """
    config = resolve_config(RivalConfig, config)
    require_dspy(config.kind)
    out = prepare_directory(config.out, RESULT_FILE)
    replace_text(out / "config.yaml", dump_config(config))
    answers = AnswerFile(out / FILE_NAME, _fingerprint(config))
    try:
        with open_servers(config, config.target_endpoints, out, config.respond, config.reward.endpoints) as servers:
            result = _search(config, servers, answers)
    finally:
        answers.close()
    with disk_errors(str(out), "make room, then repeat the command"):
        replace_text(out / INSTRUCTION_FILE, result["instruction"])
        # Written last and atomically: this file marks the search as finished.
        replace_text(out / RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    logger.info(
        "%s: %.4f on its validation prompts: %s", method_label(config.kind), result["mean"], result["instruction"]
    )
    return result


def _fingerprint(config: RivalConfig) -> str:
    """A digest of all that answers depend on: an interrupted search may go on with another budget, or more threads."""
    threads = SearchSection.model_fields["threads"].default
    search = config.search.model_copy(update={"threads": threads})
    endpoint = {"endpoint": set(HOW_SERVERS_ARE_ASKED)}
    without = {**dict.fromkeys(("out", *SPENDING), True), "target": endpoint, "search": {"proposer": endpoint}}
    return fingerprint(config.model_copy(update={"search": search}), without=without)


def _search(config: RivalConfig, servers: Servers, answers: AnswerFile) -> dict[str, Any]:
    target = build_target(config.target, None, config.prompting, config.respond, connect=servers.connect)
    proposer = _proposer(config, target, servers)
    reward = build_reward(config.reward, session=servers)
    training, validation = search_prompts(config, target, reward)
    scoreboard = Scoreboard([prompt.id for prompt in validation])
    engine = config.engine.model_dump()
    asker = TargetAsker(
        target,
        Engine(dict(target.models), **engine),
        reward,
        config.respond,
        answers,
        limit=config.target_calls,
        seed=config.seed,
        scoreboard=scoreboard,
    )
    proposing = ProposerAsker(
        proposer, Engine(dict(proposer.models), **engine), config.search.propose, answers, seed=config.seed
    )
    search = InstructionSearch(config, asker, proposing, training, validation)
    for instruction in config.instructions.values():
        asker.ask_all(instruction, validation)
    bank = scoreboard.means()
    start = max(bank, key=lambda each: bank[each])
    try:
        search.run(start)
    except CallsSpent:
        logger.info(
            "%s: asked for response %s of %s: it ends here, with the best instruction so far",
            method_label(config.kind),
            f"{asker.calls + 1:,}",
            f"{asker.limit:,}",
        )
    best = scoreboard.best(asker.calls)
    assert best is not None  # because the bank was evaluated
    names = {text: name for name, text in config.instructions.items()}
    local = isinstance(target, LocalTarget) and isinstance(proposer, LocalTarget)
    return {
        "kind": config.kind,
        "instruction": best.instruction,
        "hand_written": names.get(best.instruction),
        "mean": best.mean,
        "target_calls": asker.calls,
        "limit": asker.limit,
        "refused": asker.refused,
        "proposer_calls": proposing.calls,
        "unusable_proposals": search.unusable,
        "tokens": asker.tokens + proposing.tokens if local else None,
        "seconds": answers.seconds,
        "curve": [[each.calls, each.mean] for each in scoreboard.curve],
        "instructions": scoreboard.means(),
        "validation_prompts": len(validation),
        "training_prompts": len(training),
        "seed": config.seed,
        "versions": versions(),
    }


def _proposer(config: RivalConfig, target: Target, servers: Servers) -> Target:
    """What writes instructions; the target's own weights are not loaded twice."""
    named = config.search.proposer
    if named != "target":
        return build_target(named, None, config.prompting, config.search.propose, connect=servers.connect)
    if isinstance(target, LocalTarget) and isinstance(config.target, ModelConfig):
        return LocalTarget.build(target.model, config.target, config.prompting, config.search.propose)
    return target


def search_prompts(config: RivalConfig, target: Target, reward: RewardStack) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that the proposer sees, and those on which instructions are compared: of all that are not held out.

    Those that a training sets aside as ``data.validation`` are among them: it chooses its checkpoint by them, and a rival may
    choose its instruction by them.

    Raises:
        DataError: There are fewer than two of either.
    """
    data = load_prompts(config.data).prompts
    prompts, _ = split(data, config.data.holdout, config.data.holdout_by)
    # By text, since dspy knows nothing else of a prompt.
    prompts = list({prompt.text: prompt for prompt in reversed(reward.scorable(target.answerable(prompts)))}.values())
    validation = choose(prompts, config.search.validation)
    taken = {prompt.id for prompt in validation}
    training = choose([prompt for prompt in prompts if prompt.id not in taken], config.search.training)
    if len(validation) < config.search.validation or len(training) < 2:
        raise DataError(
            f"{config.data.source}: {len(prompts)} training prompts; the search needs {config.search.validation} for validation "
            "and at least 2 others: give more prompts, or lower search.validation"
        )
    return training, validation


def read_result(directory: Path) -> dict[str, Any]:
    """The content of the rival.json of a finished search."""
    content: dict[str, Any] = json.loads((directory / RESULT_FILE).read_text(encoding="utf-8"))
    return content
