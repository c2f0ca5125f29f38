"""The page's routes: its files with their headers, what it is told, the last requests, and rewards of answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from proxies import CHAT, Proxy, Shouting, proxied
from rewriting_runs import run_config
from upstream import Upstream

from alignpro.config import GuardConfig, ServeConfig, dump_config, validate_config
from alignpro.errors import ConfigError
from alignpro.serving import recent_requests
from alignpro.serving.page_routes import POLICY
from alignpro.serving.prompt_writer import UNUSABLE

FILES = Path(__file__).parents[2] / "alignpro" / "serving" / "page"
REWARD = "def score(prompts, responses):\n    return [len(each) / len(x.text) for x, each in zip(prompts, responses)]\n"
NEEDY = "def score(prompts, responses):\n    return [float(prompt.metadata['answer'] == 'x') for prompt in prompts]\n"


def _get(proxy: Proxy, path: str, **headers: str) -> Any:
    return proxy.ask(path=path, method="GET", **headers)


def test_the_page_is_files_of_the_package_under_a_strict_policy(proxy: Proxy) -> None:
    index = _get(proxy, "/")
    assert (index.status, index.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert index.body == (FILES / "index.html").read_bytes()
    named = re.findall(r'(?:src|href)="(page/[^"]+)"', index.body.decode())
    imported = [name for file in FILES.glob("*.js") for name in re.findall(r'from "\./(.*)"', file.read_text())]
    assert {*named, *(f"page/{name}" for name in imported)} == {
        f"page/{file.name}" for file in FILES.iterdir() if file.name != "index.html"
    }
    for path in ("", *named):
        reply = _get(proxy, f"/{path}")
        assert reply.status == 200, path
        assert reply.headers["content-security-policy"] == POLICY.decode()
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert _get(proxy, f"/{path}", if_none_match=f'"old", {reply.headers["etag"]}').status == 304
        assert _get(proxy, f"/{path}", if_none_match='"old"').status == 200
        assert proxy.ask(path=f"/{path}", method="HEAD").headers["content-length"] == str(len(reply.body))


def test_its_policy_leaves_nothing_to_inject() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.decode().split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert "unsafe" not in POLICY.decode()
    html = (FILES / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)|https?:", html)
    for file in FILES.glob("*.js"):
        code = file.read_text()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Storage|cookie|https?:", code
        )


def test_every_field_has_a_label_and_every_reference_an_element() -> None:
    html = (FILES / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    labelled = set(re.findall(r'<label for="([^"]+)"', html))
    fields = set(re.findall(r'<(?:input|select|textarea) id="([^"]+)"', html))
    assert fields - labelled == {"show-changes"}, "which is inside its label"
    for names in re.findall(r'aria-(?:labelledby|describedby)="([^"]+)"', html):
        assert set(names.split()) <= set(ids)
    used = {name for file in FILES.glob("*.js") for name in re.findall(r'\bat\("([^"]+)"\)', file.read_text())}
    assert used <= set(ids)


def test_every_reason_and_every_guard_has_words() -> None:
    told = (FILES / "rewrite.js").read_text()
    reasons, guards = (
        set(re.findall(r"^  (\w+):", told.split(f"const {name} = {{")[1].split("};")[0], re.MULTILINE))
        for name in ("REASONS", "GUARDS")
    )
    of_responses = {"refusal_kept"}
    assert guards == set(get_args(GuardConfig.model_fields["kind"].annotation)) - of_responses
    assert reasons >= UNUSABLE | {"opt_out", "no_run", "canary", "shadow", "deadline", "queue_full", "no_user_text"}


def test_the_page_is_told_what_it_can_do(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxied(upstream.url, Shouting()) as proxy:
        state = {"runs": ["loud", "quiet"], "model": None, "token": False, "recent": None, "rewards": False}
        assert _get(proxy, "/page/state").json() == state
        assert _get(proxy, "/page/requests").json()["error"]["code"] == "not_kept"
        reply = proxy.ask({"run": "loud", "prompt": "x", "answers": ["y"]}, path="/page/rewards")
        assert (reply.status, reply.json()["error"]["code"]) == (404, "not_scored")
        assert proxy.metric('alignpro_requests_total{route="page",status="200"}') == 1
    monkeypatch.setenv("TOKENS", "t")
    with proxied(upstream.url, access={"tokens_env": "TOKENS"}, model="m", page={"rewards": True}) as proxy:
        state = {"runs": [], "model": "m", "token": True, "recent": None, "rewards": True}
        assert _get(proxy, "/page/state").json() == state
        assert _get(proxy, "/").status == 200, "the page itself holds no secret"
        assert proxy.ask({}, path="/page/rewards").status == 401
    with proxied(upstream.url, page={"enabled": False}) as proxy:
        assert [_get(proxy, path).status for path in ("/", "/page/state", "/page/page.js")] == [404, 404, 404]


def test_the_last_requests_are_kept_without_texts_unless_asked(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_requests, "LONGEST_TEXT", 8)
    for texts in (False, True):
        with proxied(upstream.url, Shouting(), page={"recent_requests": 2, "recent_texts": texts}) as proxy:
            assert _get(proxy, "/page/state").json()["recent"] == {"kept": 2, "texts": texts, "token": False}
            for content in ("forgotten", "a secret", "long secret"):
                proxy.ask(CHAT | {"messages": [{"role": "user", "content": content}]}, x_request_id=content[:1])
            _get(proxy, "/v1/models")
            proxy.settle()
            reply = _get(proxy, "/page/requests")
            assert reply.headers["cache-control"] == "no-store"
            hosts = {"localhost": 200, "[::1]:80": 200, "rebound.example": 403, "127.0.0.1.example:80": 403}
            assert {host: _get(proxy, "/page/requests", host=host).status for host in hosts} == hosts
            newest, older = reply.json()["requests"]
        assert [newest["request_id"], older["request_id"]] == ["l", "a"]
        assert (newest["rewrite"], newest["run"], newest["status"], newest["tokens"]) == ("applied", "loud", 200, 5)
        assert ("secret" in reply.body.decode().lower()) == texts
        if texts:
            assert (older["prompt_text"], older["rewrite_text"]) == ("a secret", "A SECRET")
            assert (newest["prompt_text"], newest["rewrite_text"]) == ("long sec…", "LONG SEC…")


def test_the_last_requests_are_for_administrators(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENS", "t")
    monkeypatch.setenv("ADMINS", "root")
    access = {"tokens_env": "TOKENS", "admin_tokens_env": "ADMINS"}
    with proxied(upstream.url, access=access, page={"recent_requests": 2}) as proxy:
        tokens = ({}, {"authorization": "Bearer t"}, {"authorization": "Bearer root"})
        assert [_get(proxy, "/page/requests", **each).status for each in tokens] == [401, 401, 200]
    for open_to_others in (
        {"access": {"tokens_env": "TOKENS"}},
        {"listen": {"host": "::"}, "access": {"anyone": True}},
    ):
        with pytest.raises(ConfigError, match=r"page\.recent_requests lists the requests of all clients: name tokens"):
            validate_config(ServeConfig, {"target": "http://a/v1", "page": {"recent_requests": 1}, **open_to_others})


def _run_of(tmp_path: Path, code: str, **sections: Any) -> Path:
    """A run directory named loud, as far as a reward needs it."""
    run = tmp_path / "loud"
    (run / "model").mkdir(parents=True)
    (run / "reward.py").write_text(code)
    reward = {"components": [{"kind": "function", "function": f"{run}/reward.py:score"}]}
    reward["guards"] = [{"kind": "copy_rate", "high": 0.5, "penalty": 5.0}]
    (run / "config.yaml").write_text(
        dump_config(run_config(run, reward=reward | sections.pop("reward", {}), **sections))
    )
    return run


def test_answers_are_scored_by_the_reward_of_the_run(upstream: Upstream, tmp_path: Path) -> None:
    run = _run_of(tmp_path, REWARD)
    with proxied(upstream.url, Shouting(), runs=[str(run)], page={"rewards": True}) as proxy:
        asked: dict[str, Any] = {"run": "loud", "prompt": "abcd", "answers": ["a", "abcd"]}
        assert proxy.ask(asked, path="/page/rewards").json() == {"rewards": [0.25, 1.0]}
        for wrong, status, said in (
            ({"run": "other"}, 404, "No run of this id"),
            ({"run": "quiet"}, 404, "No run of this id"),
            ({"prompt": 1}, 400, "prompt: expected a string"),
            ({"answers": []}, 400, "answers: expected 1 to 16"),
            ({"answers": [1]}, 400, "answers: expected an array of strings"),
        ):
            reply = proxy.ask(asked | wrong, path="/page/rewards")
            assert (reply.status, said in reply.json()["error"]["message"]) == (status, True), wrong
        for body in (b"{", b"[]", b'"' + 100_000 * b"["):
            assert proxy.ask(body, path="/page/rewards").json()["error"]["code"] == "invalid_json"


def test_a_reward_that_cannot_score_says_so_without_the_prompt(
    upstream: Upstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _run_of(tmp_path, NEEDY)
    with proxied(upstream.url, Shouting(), runs=[str(run)], page={"rewards": True}) as proxy:
        reply = proxy.ask({"run": "loud", "prompt": "my secret", "answers": ["y"]}, path="/page/rewards")
        assert (reply.status, reply.json()["error"]["code"]) == (422, "cannot_score")
        assert reply.json()["error"]["message"] == (
            "the reward of run loud cannot score this prompt (KeyError): it may need a column of its training data"
        )
    assert "the reward of run loud failed: KeyError" in caplog.text
    assert "secret" not in caplog.text


def test_only_rewards_of_functions_score(upstream: Upstream, tmp_path: Path) -> None:
    component = {"kind": "model", "model": {"path": "nowhere"}}
    run = _run_of(tmp_path, "", reward={"components": [component]})
    with proxied(upstream.url, Shouting(), runs=[str(run)], page={"rewards": True}) as proxy:
        reply = proxy.ask({"run": "loud", "prompt": "x", "answers": ["y"]}, path="/page/rewards")
        assert reply.status == 422
        assert "has a component of kind model: the page scores by functions alone" in reply.json()["error"]["message"]


def _luminance(colour: str) -> float:
    """Of WCAG 2."""
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_its_texts_stand_out_by_day_and_by_night() -> None:
    css = (FILES / "page.css").read_text()
    day, night = (
        dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    )
    assert day.keys() == night.keys()
    pairs = [("ink", "ground"), ("ink", "panel"), ("soft", "ground"), ("soft", "panel"), ("accent", "panel")]
    pairs += [("on-accent", "accent"), ("added-ink", "added"), ("removed-ink", "removed")]
    for colours in (day, night):
        for text, ground in pairs:
            lighter, darker = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)
