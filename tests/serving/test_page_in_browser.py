"""The page in a real browser, before a real proxy: the demo's prompter and target, both in its process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from proxies import Proxy, Shouting, proxied, running
from rewriting_runs import run_config
from upstream import Upstream

from alignpro.config import ServeConfig, dump_config, validate_config
from alignpro.demo.run import WEIGHTS
from alignpro.serving.server import open_service

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

PROMPT = "pls reverse the word stone"
DONE = "!document.getElementById('send').disabled && !document.getElementById('answers').hidden"
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>&amp;"


@contextmanager
def demo_proxy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve two runs of the demo's prompter in front of its target; gives the page's address."""
    monkeypatch.setenv("TOKENS", "sesame")
    (folder / "reward.py").write_text("def score(prompts, responses):\n    return [float(len(y)) for y in responses]\n")
    reward = {"components": [{"kind": "function", "function": f"{folder}/reward.py:score"}]}
    runs = []
    for name in ("first", "second"):
        runs.append(folder / name)
        runs[-1].mkdir()
        (runs[-1] / "model").symlink_to(WEIGHTS / "prompter")
        sampling = {"rewrite": {"max_tokens": 40}, "respond": {"max_tokens": 12}}
        config = run_config(runs[-1], str(WEIGHTS / "prompter"), rollout=sampling, reward=reward)
        (runs[-1] / "config.yaml").write_text(dump_config(config))
    keys = {
        "runs": [str(run) for run in runs],
        "target": str(WEIGHTS / "target"),
        "listen": {"port": 0},
        "log": {"requests": False},
        "access": {"tokens_env": "TOKENS", "admin_tokens_env": "TOKENS"},
        "page": {"recent_requests": 5, "recent_texts": True, "rewards": True},
        "rewriting": {"guards": [], "deadline_ms": 20_000},
    }
    config = validate_config(ServeConfig, keys)
    with running(config, lambda: open_service(config), seconds=60) as proxy:
        yield f"http://127.0.0.1:{proxy.port}/"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path) as opened:
        yield opened


def test_a_prompt_its_rewrite_and_both_answers(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with demo_proxy(tmp_path, monkeypatch) as url:
        for name, window in {
            "desktop": {},
            "dark": {"dark": True},
            "phone": {"width": 360, "height": 740, "phone": True},
        }.items():
            browser.open(url, **window)
            browser.wait_for("document.getElementById('run').options.length === 2")
            _try(browser, "sesame", run="second")
            assert browser.text("#verdict").startswith("Rewritten by second (")
            browser.value("document.getElementById('show-changes').click()")
            assert "stone" in browser.text("#diff")
            assert browser.text("#diff") != PROMPT
            browser.value("document.getElementById('show-changes').click()")
            assert "stone" in browser.text("#diff")
            for answer in ("#original", "#rewritten"):
                text = browser.text(f"{answer} .answer")
                assert text
                assert browser.text(f"{answer} .facts").startswith(f"Reward {len(text)} · First text after ")
            assert f"Prompt: {PROMPT}" in browser.text("#requests")
            assert browser.value("document.documentElement.scrollWidth") <= window.get("width", 1280)
            assert browser.screenshot(name).stat().st_size > 10_000
        assert browser.complaints == []


def _try(browser: Browser, token: str, *, run: str) -> None:
    """Fill in the form with the keyboard alone, and wait for the end."""
    browser.value("document.getElementById('token').focus()")
    browser.type(token)
    browser.press("Tab")
    browser.type(PROMPT)
    browser.value(f"document.getElementById('run').value = {json.dumps(run)}")
    browser.wait_for("document.getElementById('model').value === 'target'")
    browser.value("document.getElementById('admin-token').value = 'sesame'")
    browser.press("Enter", control=True)
    browser.wait_for(DONE)
    browser.wait_for("document.getElementById('requests').children.length > 0")


def _send(browser: Browser, prompt: str, model: str) -> None:
    browser.value(f"document.getElementById('model').value = {json.dumps(model)}")
    browser.value("document.getElementById('prompt').value = ''; document.getElementById('prompt').focus()")
    browser.type(prompt)
    browser.press("Enter", control=True)


def test_what_models_and_clients_say_is_text(
    browser: Browser, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = {"choices": [{"index": 0, "delta": {"content": HOSTILE}}]}
    monkeypatch.setattr("upstream.EVENTS", [b"data: " + json.dumps(event).encode() + b"\n\n"])
    with proxied(upstream.url, Shouting(), page={"recent_requests": 5, "recent_texts": True}) as proxy:
        browser.open(f"http://127.0.0.1:{proxy.port}/")
        browser.wait_for("document.getElementById('model').value === 'm'")
        _send(browser, HOSTILE, "m")
        browser.wait_for(DONE)
        browser.wait_for("document.getElementById('requests').children.length === 2")
        assert browser.text("#original .answer") == browser.text("#rewritten .answer") == HOSTILE
        assert HOSTILE.upper() in browser.text("#requests")
        assert "client_gone" not in browser.text("#requests")
        changed = browser.value("Array.from(document.querySelectorAll('#diff ins'), (each) => each.childNodes[1].data)")
        assert "ONERROR" in changed
        assert browser.value("document.title") == "Try a prompt · Align-Pro"
        assert browser.value("document.querySelectorAll('main img, main script, body > script').length") == 0
        assert browser.complaints == []


def test_errors_and_stops_are_told(browser: Browser, upstream: Upstream) -> None:
    with proxied(upstream.url, Shouting()) as proxy:
        browser.open(f"http://127.0.0.1:{proxy.port}/")
        browser.wait_for("document.getElementById('run').options.length === 2")
        _send(browser, "hello", "limited")
        browser.wait_for(DONE)
        assert browser.text("#original .problem") == browser.text("#rewritten .problem") == "no"
        assert browser.text("#status") == "An answer failed."
        _send(browser, "hello", "dies-in-stream")
        browser.wait_for(DONE)
        assert "broke off" in browser.text("#original .problem")
        assert browser.text("#original .answer") == "stone river "
        _send(browser, "hello", "stalls")
        browser.wait_for("document.querySelectorAll('.answer')[1].innerText.includes('river')")
        browser.value("document.getElementById('stop').focus()")
        browser.press("Enter")
        browser.wait_for(DONE)
        assert browser.text("#status") == "Stopped."
        assert browser.value("document.activeElement.id") == "send"
        upstream.wait_for(lambda: upstream.cancelled == 2)


def test_assistive_technology_is_told_of_everything(browser: Browser, upstream: Upstream) -> None:
    with proxied(upstream.url, Shouting(), page={"recent_requests": 5}) as proxy:
        browser.open(f"http://127.0.0.1:{proxy.port}/")
        browser.wait_for("document.getElementById('run').options.length === 2")
        browser.press("Tab")
        assert browser.value("document.activeElement.textContent") == "Skip to the prompt"
        _send(browser, "hello", "m")
        browser.wait_for(DONE)
        told = browser.roles()
        named = {
            ("heading", "Align-Pro"),
            ("form", "Try a prompt"),
            ("textbox", "Prompt"),
            ("combobox", "Run"),
            ("combobox", "Model of the target"),
            ("button", "Send"),
            ("button", "Stop"),
            ("region", "Rewrite"),
            ("checkbox", "Show changes"),
            ("region", "Answer to your prompt"),
            ("region", "Answer to the rewrite"),
            ("region", "Last requests"),
        }
        assert named <= told
        assert {"banner", "main", "status", "deletion", "insertion"} <= {role for role, _ in told}
        assert ("StaticText", "[added:") in told


def test_words_are_compared(browser: Browser, proxy: Proxy) -> None:
    browser.open(f"http://127.0.0.1:{proxy.port}/")
    cases = {
        ("a b c", "a b c"): ["same a b c"],
        ("", "new"): ["added new"],
        ("old", ""): ["removed old"],
        ("can u flip the word stone pls", "reverse: stone"): [
            "removed can u flip the word",
            "added reverse:",
            "same  stone",
            "removed  pls",
        ],
        ("née Ω x", "née Ω\u0301 x"): ["same née ", "removed Ω", "added Ω\u0301", "same  x"],
    }
    compare = "import('./page/diff.js').then((m) => m.wordDiff(A, B).map(({kind, text}) => `${kind} ${text}`))"
    for (before, after), pieces in cases.items():
        assert browser.value(compare.replace("A", json.dumps(before)).replace("B", json.dumps(after))) == pieces
    long = "import('./page/diff.js').then((m) => m.wordDiff('a '.repeat(9e4), 'b '.repeat(9e4)).map(({kind}) => kind))"
    assert browser.value(long) == ["removed", "added", "same"]
