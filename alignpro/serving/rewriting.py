"""The rewriting side of the proxy in one piece: runs, engine, rewriter and, if it is in this process, the target."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from alignpro.config import FunctionRewardConfig, ModelConfig, TrainConfig
from alignpro.config.serving_rewriting import RewritingConfig
from alignpro.data import Prompt
from alignpro.environments.trained_prompter import TrainedPrompter
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model
from alignpro.models.progress_bars import without_progress_bars
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.rewards import build_reward
from alignpro.serving.candidates import CandidateChooser
from alignpro.serving.contract import ServedTarget
from alignpro.serving.engine_thread import EngineThread
from alignpro.serving.local_target import LocalServedTarget
from alignpro.serving.prompt_writer import ServedRun
from alignpro.serving.rewriter import PromptRewriter

logger = logging.getLogger(__name__)


class Rewriting:
    """The runs that are served, and what serves them; made by `open`."""

    def __init__(
        self,
        config: RewritingConfig,
        engine: EngineThread,
        target_model: LanguageModel | None,
        target: LocalServedTarget | None,
        answers: ServedTarget | None,
    ) -> None:
        self.rewriter = PromptRewriter(config, engine, ())
        self.target = target
        """The target, if it is in this process."""
        self._config, self._engine, self._answers = config, engine, answers
        self._target_model = target_model
        self._numbers = itertools.count()
        self._changing = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        config: RewritingConfig,
        runs: Sequence[Path],
        target: ModelConfig | None = None,
        *,
        answers: ServedTarget | None = None,
    ) -> Rewriting:
        """Load runs, and the target if it runs in this process.

        Args:
            config: How prompts are rewritten.
            runs: Run directories; the first is the default.
            target: A model that answers in this process.
            answers: What responds to candidates, if the target is elsewhere.

        Raises:
            ModelError: A directory holds no finished run of a prompter, two have the same name, or a model cannot be loaded.
            ConfigError: The reward of a run cannot choose among candidates.
        """
        model = None if target is None else await asyncio.to_thread(_load_target, target)
        engine = EngineThread({} if model is None else {"target": model}, config.engine)
        local = None
        try:
            if target is not None and model is not None:
                template = ChatTemplate(model.tokenizer, target.chat_template, stop_token_ids=model.end_token_ids)
                name = config.target.name or Path(target.path).name
                local = LocalServedTarget(model, engine, template, name, config.target)
            opened = cls(config, engine, model, local, local or answers)
            await opened.serve(runs)
        except BaseException:
            await engine.close()
            raise
        return opened

    @property
    def failure(self) -> str | None:
        """Why nothing is rewritten any more; None as long as the engine works."""
        return self._engine.failure

    @property
    def waiting(self) -> int:
        """Prompts that are being rewritten or wait for it."""
        return sum(self._engine.waiting(run.name) for run in self.rewriter.served)

    async def serve(self, paths: Sequence[Path]) -> Sequence[str]:
        """Serve the runs in directories, in place of those before; requests that are being rewritten are not affected.

        All are loaded before one is served, so that for a moment those before are in memory as well.

        Args:
            paths: Run directories; the first is the default.

        Returns:
            Their ids: the names of the directories.

        Raises:
            ModelError: As for `open`; what is served has not changed.
        """
        async with self._changing:
            known: dict[str, Path] = {}
            for path in (each.absolute() for each in paths):
                if known.setdefault(path.name, path) != path:
                    raise ModelError(
                        f"run directory {path}: {known[path.name]} is served under the name {path.name}: rename one of them"
                    )
            await self._replace([await self._load(path) for path in known.values()])
            return self.rewriter.runs

    async def _load(self, path: Path) -> ServedRun:
        trust = self._config.trust_remote_code
        prompter = await asyncio.to_thread(TrainedPrompter.load, path, trust_remote_code=trust)
        chooser = None if self._config.candidates is None else await asyncio.to_thread(self._chooser, path, prompter)
        return ServedRun(path.name, f"{path.name}#{next(self._numbers)}", prompter, chooser)

    async def close(self) -> None:
        """End it; unfinished rewrites are skipped."""
        await self.rewriter.close()
        await self._engine.close()

    async def _replace(self, runs: Sequence[ServedRun]) -> None:
        models = {run.name: run.prompter.model for run in runs}
        if self._target_model is not None:
            models["target"] = self._target_model

        def change() -> None:
            self.rewriter.served = tuple(runs)

        await self._engine.replace(models, change)
        logger.info("runs that rewrite: %s", ", ".join(self.rewriter.runs) or "none")

    def _chooser(self, path: Path, prompter: TrainedPrompter) -> CandidateChooser:
        assert self._config.candidates is not None
        config = prompter.config
        if not isinstance(config, TrainConfig):
            raise ModelError(
                f"run directory {path}: is a run of `alignpro sft`, which has no reward to choose candidates by"
            )
        functions = [each for each in config.reward.components if isinstance(each, FunctionRewardConfig)]
        if functions and not self._config.trust_remote_code:
            raise ModelError(
                f"run directory {path}: choosing candidates runs the code of its reward ({functions[0].function}); if you "
                "trust it, say so: trust_remote_code"
            )
        if self._answers is None:
            raise ModelError("candidates need a target that answers: there is none")
        reward = build_reward(config.reward)
        reward.scorable([Prompt.from_text("a request has no columns of the data")])
        return CandidateChooser(self._config.candidates, reward, self._answers, self._config.seed)


@without_progress_bars()
def _load_target(target: ModelConfig) -> LanguageModel:
    return load_language_model(target)
