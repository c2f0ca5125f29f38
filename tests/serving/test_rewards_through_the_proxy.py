"""What was evaluated is what is served: through the proxy, over sockets, answers have the rewards that `alignpro eval` writes.

They are equal to the last digit: of greedy answers, of an evaluation that samples and sends the seeds of its draws, and of
sampled answers to what the proxy rewrites. The short tests have the demo's packaged prompter and a few prompts; the slow ones
the run and the held-out prompts of `alignpro demo` itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_server import BatchingServer, EngineModel
from openai import OpenAI
from proxies import Proxy, running
from rewriting_runs import run_config

from alignpro.cli import main
from alignpro.config import ServeConfig, dump_config, validate_config
from alignpro.data import Prompt
from alignpro.demo import world
from alignpro.demo.run import WEIGHTS, configurations
from alignpro.engine import derive_seed
from alignpro.serving.server import open_service

TARGET = WEIGHTS / "target"
LIMITS = {"rewrite": {"max_tokens": 40}, "respond": {"max_tokens": 12}}
AS_IT_IS = {"guards": [], "skip_truncated": False, "deadline_ms": 600_000}
"""Training and evaluation use every rewrite, and wait for it."""


@dataclass(frozen=True)
class Case:
    """A run of a prompter, and its evaluation with the target in the same process."""

    run: Path
    evaluation: Mapping[str, Any]
    """The configuration, without ``out``."""

    @property
    def prompts(self) -> dict[str, Prompt]:
        """The held-out prompts by id."""
        records = map(json.loads, Path(self.evaluation["data"]["source"]).read_text().splitlines())
        prompts = [Prompt.from_text(each["prompt"], metadata=each["metadata"]) for each in records]
        return {prompt.id: prompt for prompt in prompts}

    def rewards(self, out: Path, **changes: Any) -> dict[str, Any]:
        """What `alignpro eval` writes to rewards.json."""
        config = {**self.evaluation, "out": str(out), **changes}
        out.with_suffix(".yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
        with pytest.raises(SystemExit) as stopped:
            main(["eval", str(out.with_suffix(".yaml"))])
        assert not stopped.value.code
        written: dict[str, Any] = json.loads((out / "rewards.json").read_text())
        return written

    def sampling(self, **more: Any) -> dict[str, Any]:
        """The sampling of rewrites and responses."""
        return {name: {**self.evaluation[name], **more} for name in LIMITS}


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return the demo's prompter before training, and six prompts."""
    folder = tmp_path_factory.mktemp("packaged")
    run = folder / "align_pro"
    run.mkdir()
    (run / "model").symlink_to(WEIGHTS / "prompter")
    (run / "config.yaml").write_text(dump_config(run_config(run, str(WEIGHTS / "prompter"), rollout=LIMITS)))
    world.write_records(folder / "heldout.jsonl", world.prompt_records(6, 0, heldout=True))
    evaluation = {
        "data": {"source": str(folder / "heldout.jsonl"), "holdout": 0},
        "target": {"path": str(TARGET), "device": "cpu"},
        "reward": {"components": [{"kind": "function", "function": "alignpro.demo.world:reward"}]},
        "prompter": {"path": str(run / "model"), "device": "cpu"},
        "prompts": 6,
        "rewrites_per_prompt": 2,
        "responses_per_rewrite": 2,
        **LIMITS,
    }
    return Case(run, evaluation)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return a finished `alignpro demo`."""
    out = tmp_path_factory.mktemp("finished") / "demo"
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(out)])
    assert not stopped.value.code
    evaluation = configurations(out.with_name("other"), 0)[2].model_dump(mode="json", exclude={"out"})
    for each in (evaluation["data"], evaluation["prompter"], evaluation["oracle"]):
        key = "source" if "source" in each else "path"
        each[key] = each[key].replace(str(out.with_name("other")), str(out))
    return Case(out / "align_pro", evaluation)


@contextmanager
def target_at(place: str) -> Iterator[str]:
    """The demo's target as `alignpro serve` takes it: its path, or the URL of a server that has it."""
    if place == "in the proxy":
        yield str(TARGET)
        return
    with BatchingServer(EngineModel(TARGET), model="target", is_logged=False) as server:
        yield server.url


@contextmanager
def serving(target: str, *runs: Path) -> Iterator[Proxy]:
    """`alignpro serve`, with every rewrite used."""
    common = {"listen": {"port": 0}, "log": {"requests": False}, "rewriting": AS_IT_IS}
    config = validate_config(ServeConfig, {"target": target, "runs": [str(run) for run in runs], **common})
    with running(config, lambda: open_service(config), 120) as proxy:
        yield proxy
        assert proxy.metric('alignpro_errors_total{code="internal_error"}') == 0


def endpoint(proxy: Proxy) -> dict[str, Any]:
    return {"endpoint": {"base_url": proxy.url, "model": "target"}}


def check_greedy(case: Case, place: str, folder: Path) -> None:
    """The prompts as they are, sent to the proxy, are worth what the prompter's rewrites are worth without it."""
    greedy = case.sampling(temperature=0)
    here = case.rewards(folder / "here", **greedy)
    with target_at(place) as target, serving(target, case.run) as proxy:
        models = dict.fromkeys(("prompter", "reference", "oracle"))
        only = {"arms": ["no_finetuning"], "gibbs_candidates": 0, "bound": False}
        there = case.rewards(folder / "there", target=endpoint(proxy), **greedy, **models, **only)
        assert proxy.metric('alignpro_rewrites_total{run="align_pro"}') > 0
    assert there["prompts"] == here["prompts"]
    expected, found, plain = (
        [[value for answers in prompt for value in answers] for prompt in arm["raw"]]
        for arm in (here["arms"]["align_pro"], there["arms"]["no_finetuning"], here["arms"]["no_finetuning"])
    )
    assert found == expected != plain


def check_sampled(case: Case, place: str, folder: Path, here: Mapping[str, Any]) -> None:
    """An evaluation whose target is the proxy sends it the seeds of its draws, and gets the same rewards in all arms."""
    with target_at(place) as target, serving(target) as proxy:
        there = case.rewards(folder / "there", target=endpoint(proxy))
    assert there["prompts"] == here["prompts"]
    assert there["arms"].keys() == here["arms"].keys()
    for name, arm in here["arms"].items():
        assert (there["arms"][name]["raw"], there["arms"][name]["penalised"]) == (arm["raw"], arm["penalised"]), name


def check_sampled_answers_to_rewrites(case: Case, place: str, folder: Path) -> None:
    """A client that asks for the draws of the evaluation, by seed, gets the rewards of the prompter's greedy rewrites."""
    respond, seed = case.evaluation["respond"], 5
    greedy = {"rewrite": {**case.evaluation["rewrite"], "temperature": 0}}
    alone = {
        "arms": ["no_finetuning", "align_pro"],
        "gibbs_candidates": 0,
        "oracle": None,
        "bound": False,
        "seed": seed,
    }
    here = case.rewards(folder / "here", **greedy, **alone)
    expected = here["arms"]["align_pro"]["raw"]
    assert {value for prompt in expected for answers in prompt for value in answers} == {0, 1}
    prompts, found = case.prompts, []
    with (
        target_at(place) as target,
        serving(target, case.run) as proxy,
        OpenAI(base_url=proxy.url, api_key="unused", max_retries=0) as client,
    ):
        for i, prompt in enumerate(prompts[id_] for id_ in here["prompts"]):
            of_rewrites = []
            for k, answers in enumerate(expected[i]):
                answer = client.chat.completions.create(
                    model="target",
                    messages=[{"role": "user", "content": prompt.text}],
                    n=len(answers),
                    seed=derive_seed(derive_seed(seed, "evaluation", i), "respond", k),
                    temperature=1.0,
                    max_tokens=respond["max_tokens"],
                )
                texts = [choice.message.content or "" for choice in answer.choices]
                of_rewrites.append(world.reward([prompt] * len(texts), texts))
            found.append(of_rewrites)
        assert proxy.metric('alignpro_rewrites_total{run="align_pro"}') > 0
    assert found == expected


PLACES = ["in the proxy", "behind a server"]


def test_greedy(packaged: Case, tmp_path: Path) -> None:
    check_greedy(packaged, "behind a server", tmp_path)


def test_sampled(packaged: Case, tmp_path: Path) -> None:
    check_sampled(packaged, "in the proxy", tmp_path, packaged.rewards(tmp_path / "here"))


def test_sampled_answers_to_rewrites(packaged: Case, tmp_path: Path) -> None:
    check_sampled_answers_to_rewrites(packaged, "behind a server", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_the_demo_greedy(demo: Case, place: str, tmp_path: Path) -> None:
    check_greedy(demo, place, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_the_demo_sampled(demo: Case, place: str, tmp_path: Path) -> None:
    """All arms of the demo's own evaluation, as it was written at its end."""
    check_sampled(demo, place, tmp_path, json.loads((demo.run.parent / "rewards.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_the_demo_sampled_answers_to_rewrites(demo: Case, place: str, tmp_path: Path) -> None:
    check_sampled_answers_to_rewrites(demo, place, tmp_path)
