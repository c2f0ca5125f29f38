"""A conversation through a real prompter, over sockets: what the target is sent agrees with what it has answered."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from openai import OpenAI
from proxies import running
from rewriting_runs import save_run
from upstream import Upstream, chat_answer

from alignpro.config import ServeConfig, validate_config
from alignpro.serving.headers import rewrite_hash
from alignpro.serving.server import open_service


def test_the_target_sees_its_answers_below_what_it_was_asked(upstream: Upstream, tmp_path: Path) -> None:
    settings = {"engine": {"pool_bytes": 1 << 22}, "guards": [], "skip_truncated": False, "deadline_ms": 60_000}
    keys = {"target": upstream.url, "runs": [str(save_run(tmp_path / "run"))], "rewriting": settings}
    config = validate_config(ServeConfig, {**keys, "listen": {"port": 0}, "log": {"requests": False}})
    messages: list[Any] = [{"role": "system", "content": "Be brief."}]
    hashes = []
    with (
        running(config, lambda: open_service(config), 60) as proxy,
        OpenAI(base_url=proxy.url, api_key="unused", max_retries=0) as client,
    ):
        for number in range(3):
            upstream.answers["m"] = chat_answer(f"answer {number}")
            messages.append({"role": "user", "content": f"question {number}"})
            raw = client.chat.completions.with_raw_response.create(model="m", messages=messages)
            assert raw.headers["x-alignpro-rewrite"] == "applied"
            hashes.append(raw.headers["x-alignpro-rewrite-hash"])
            message = raw.parse().choices[0].message
            messages.append({"role": "assistant", "content": message.content})
    sent = [json.loads(each.body)["messages"] for each in upstream.received]
    assert [len(each) for each in sent] == [2, 4, 6]
    for earlier, later in itertools.pairwise(sent):
        assert later[: len(earlier)] == earlier, "a prefix that the target has in its cache"
    last = [turn["content"] for turn in sent[-1]]
    assert [last[0], last[2], last[4]] == ["Be brief.", "answer 0", "answer 1"]
    assert [rewrite_hash(text) for text in last[1::2]] == hashes
    assert not any("question" in text for text in last)
