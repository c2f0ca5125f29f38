"""GEPA and MIPROv2 as dspy has them, asking through the counted target and proposer alone.

What dspy optimises is the instruction of one predictor. Its adapter does not format a prompt of dspy's own: the target gets the
user's prompt with the instruction as a hand-written one would be added, so that what is found can be evaluated as one. dspy's
caches and retries are off, and so are few-shot examples, which are no instruction.

- GEPA: Agrawal et al. (2025), "GEPA: Reflective Prompt Evolution Can Outperform Reinforcement Learning".
- MIPROv2: Opsahl-Ong et al. (2024), "Optimizing Instructions and Demonstrations for Multi-Stage Language Model Programs".
"""

from __future__ import annotations

import importlib
import io
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from pydantic import ValidationError

from alignpro.config import RivalConfig, RivalKind
from alignpro.data import Prompt
from alignpro.errors import AlignProError, ConfigError
from alignpro.experiments.rivals.asking import TargetAsker, usable
from alignpro.experiments.rivals.proposing import ProposerAsker

logger = logging.getLogger(__name__)

_MINIBATCH: dict[RivalKind, int] = {"gepa": 3, "miprov2": 16}
_FULL_EVERY = 5
"""Partial evaluations between two of MIPROv2's whole ones."""


class _Failed(BaseException):
    """Carries an error of the target through dspy, which counts an `Exception` as a failed example and goes on."""

    def __init__(self, error: AlignProError) -> None:
        self.error = error


class InstructionSearch:
    """Searches an instruction with an optimiser of dspy.

    Args:
        config: The search.
        target: Asks the target.
        proposer: Asks the proposer.
        training: Prompts that the proposer may see with responses.
        validation: Prompts on which instructions are compared.

    Raises:
        ConfigError: dspy, or what it needs for this optimiser, is not installed.
    """

    def __init__(
        self,
        config: RivalConfig,
        target: TargetAsker,
        proposer: ProposerAsker,
        training: Sequence[Prompt],
        validation: Sequence[Prompt],
    ) -> None:
        self._dspy = require_dspy(config.kind)
        logging.getLogger("dspy").setLevel(logging.ERROR)
        self._config, self._target, self._proposer = config, target, proposer
        self._prompts: Mapping[str, Prompt] = {prompt.text: prompt for prompt in (*training, *validation)}
        self._training, self._validation = (
            [self._dspy.Example(prompt=prompt.text).with_inputs("prompt") for prompt in each]
            for each in (training, validation)
        )
        # dspy strips and dedents an instruction, and writes one of its own for an empty one: what it asks with is mapped back.
        self._as_written = {self._signature(text).instructions: text for text in reversed(config.instructions.values())}
        # A model of this process answers what is asked at the same time in one batch: a thread for each prompt of an evaluation.
        self._threads = len(validation) if config.target_is_local else config.search.threads
        self.unusable = 0
        """Texts of the proposer that were no instruction."""

    def run(self, start: str) -> None:
        """Search from an instruction until the optimiser ends.

        Raises:
            CallsSpent: All responses have been drawn, which is how a search usually ends.
            AlignProError: The target, the reward or the proposer failed.
        """
        proposer = self._proposer_model()
        search = self._gepa if self._config.kind == "gepa" else self._miprov2
        try:
            # dspy writes a line for each example to standard output.
            with (
                redirect_stdout(io.StringIO()),
                asking_once(self._target.announce),
                self._dspy.context(lm=proposer, adapter=self._lenient_adapter()),
            ):
                search(start, proposer)
        except _Failed as failed:
            raise failed.error from failed

    def _gepa(self, start: str, proposer: Any) -> None:
        proposal = importlib.import_module("dspy.teleprompt.gepa.instruction_proposal")
        propose = proposal.InstructionProposer(adapter=self._lenient_adapter())
        parse_error = self._parse_error()

        def propose_or_keep(candidate: dict[str, str], reflective_dataset: Any, **others: Any) -> dict[str, str]:
            # Two responses to one prompt of a batch come in the order of threads, and what is proposed must not depend on that.
            responses = {name: sorted(each, key=repr) for name, each in reflective_dataset.items()}
            try:
                proposed: dict[str, str] = propose(candidate=candidate, reflective_dataset=responses, **others)
            except (parse_error, ValidationError):  # the latter: the text is empty
                self.unusable += 1
                return candidate
            return {name: usable(text) for name, text in proposed.items()}

        optimizer = self._dspy.GEPA(
            metric=self._score_with_feedback,
            max_metric_calls=self._target.left,
            reflection_minibatch_size=self._config.search.minibatch or _MINIBATCH["gepa"],
            reflection_lm=proposer,
            instruction_proposer=propose_or_keep,
            num_threads=self._threads,
            seed=self._config.seed % 2**32,
        )
        optimizer.compile(self._program(start), trainset=self._training, valset=self._validation)

    def _miprov2(self, start: str, proposer: Any) -> None:
        """Search again from the best instruction so far, with new proposals, until all calls are spent."""
        for i in itertools.count():
            before = self._target.calls
            self._miprov2_once(
                start, proposer, (self._config.seed + i) % 2**32 or 2**32 - 1
            )  # 0 would be its default seed
            if self._target.calls == before:  # the proposer wrote nothing
                return
            start = self._target.best or start

    def _miprov2_once(self, start: str, proposer: Any, seed: int) -> None:
        whole = len(self._validation)
        batch = min(self._config.search.minibatch or _MINIBATCH["miprov2"], whole)
        trials = max(1, int((self._target.left - 2 * whole) / (batch + whole / _FULL_EVERY)))
        optimizer = self._dspy.MIPROv2(
            metric=self._score,
            prompt_model=proposer,
            task_model=proposer,  # not asked: the program's adapter asks the target
            auto=None,
            num_candidates=self._config.search.proposals,
            max_bootstrapped_demos=0,
            max_labeled_demos=0,
            num_threads=self._threads,
            init_temperature=self._config.search.propose.temperature,
            seed=seed,
        )
        try:
            optimizer.compile(
                self._program(start),
                trainset=self._training,
                valset=self._validation,
                num_trials=trials,
                minibatch=batch < whole,
                minibatch_size=batch,
                minibatch_full_eval_steps=_FULL_EVERY,
            )
        except self._parse_error():
            self.unusable += 1
            logger.warning("MIPROv2: the proposer wrote no instruction; only those before it were tried")
        except ValueError as error:
            # What dspy raises once all proposals have been evaluated on all validation prompts.
            if "No valid program found" not in str(error):
                raise

    def _program(self, instruction: str) -> Any:
        """A module of dspy with one predictor, whose instruction the target gets with the prompt."""
        dspy, adapter, signature = self._dspy, self._target_adapter(), self._signature(instruction)

        class Respond(dspy.Module):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.respond = dspy.Predict(signature)

            def forward(self, prompt: str) -> Any:
                with dspy.context(adapter=adapter()):
                    return self.respond(prompt=prompt)

        return Respond()

    def _signature(self, instruction: str) -> Any:
        return self._dspy.Signature("prompt -> response", instruction)

    def _target_adapter(self) -> Any:
        """An adapter that asks the target in place of a language model of dspy."""
        target, prompts, as_written = self._target, self._prompts, self._as_written

        class TargetAdapter(self._dspy.Adapter):  # type: ignore[name-defined]
            def __call__(
                self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any
            ) -> list[dict[str, Any]]:
                instruction = as_written.get(signature.instructions, signature.instructions)
                try:
                    answer = target.ask(usable(instruction), prompts[inputs["prompt"]])
                except AlignProError as error:
                    raise _Failed(error) from error
                return [{"response": answer.text, "value": answer.value}]

        return TargetAdapter

    def _lenient_adapter(self) -> Any:
        """dspy's adapter for conversations; an answer without its markers is the one field that was asked for.

        Small models write an instruction, but seldom the markers. It does not ask a second time in another format.
        """
        parse_error = self._parse_error()

        class LenientAdapter(self._dspy.ChatAdapter):  # type: ignore[name-defined]
            def parse(self, signature: Any, completion: str) -> dict[str, Any]:
                try:
                    fields: dict[str, Any] = super().parse(signature, completion)
                except parse_error:
                    if len(signature.output_fields) != 1 or not completion.strip():
                        raise
                    return {name: completion.strip() for name in signature.output_fields}
                return fields

        return LenientAdapter(use_json_adapter_fallback=False)

    def _proposer_model(self) -> Any:
        """A language model of dspy that asks the proposer, without its cache and its retries."""
        lm15, proposer = importlib.import_module("dspy.lm15"), self._proposer

        class ProposerEngine:
            def complete(self, request: Any) -> Any:
                system = request.system if isinstance(request.system, str) else None
                turns = [("system", system)] if system else []
                turns += [(message.role, message.text or "") for message in request.messages]
                try:
                    text = proposer.ask(turns)
                except AlignProError as error:
                    raise _Failed(error) from error
                return lm15.Response(
                    id=None,
                    model="proposer",
                    message=lm15.Message.assistant([lm15.TextPart(text)]),
                    finish_reason="stop",
                    usage=lm15.Usage(input_tokens=0, output_tokens=0, total_tokens=0),
                )

        return self._dspy.LM("proposer", engine=ProposerEngine(), cache=False, num_retries=0)

    def _parse_error(self) -> type[Exception]:
        error: type[Exception] = importlib.import_module("dspy.utils.exceptions").AdapterParseError
        return error

    def _score(self, example: Any, prediction: Any, trace: Any = None) -> float:
        return float(prediction.value)

    def _score_with_feedback(
        self, example: Any, prediction: Any, trace: Any = None, name: Any = None, own_trace: Any = None
    ) -> Any:
        """What GEPA reflects on: the reward, which knows no words of its own."""
        value = float(prediction.value)
        return self._dspy.Prediction(score=value, feedback=f"The reward of this response is {value:.4g}.")


@contextmanager
def asking_once(announce: Callable[[int], None] = lambda count: None) -> Iterator[None]:
    """Let dspy wait for slow answers within the context, and say how many questions an evaluation asks at the same time.

    By itself it asks again after two minutes when few questions are open: every call is counted and paid for, and a search that
    is repeated from its answers would be another one.

    Args:
        announce: Called with the number of questions before each evaluation, and with 0 after it.
    """
    module: Any = importlib.import_module("dspy.evaluate.evaluate")
    executor = module.ParallelExecutor

    class WaitingExecutor(executor):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named | {"timeout": 0})

        def execute(self, function: Any, data: Any) -> Any:
            announce(min(len(data), self.num_threads))
            try:
                return super().execute(function, data)
            finally:
                announce(0)

    module.ParallelExecutor = WaitingExecutor
    try:
        yield
    finally:
        module.ParallelExecutor = executor


def require_dspy(kind: RivalKind) -> Any:
    """The module dspy.

    Raises:
        ConfigError: It is not installed, or what the optimiser needs beside it.
    """
    for name in ("dspy", "gepa" if kind == "gepa" else "optuna"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"kind={kind}: needs {name}: pip install 'alignpro[rivals]'") from error
    return importlib.import_module("dspy")
