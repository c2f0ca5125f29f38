"""A run directory that came from someone else runs no code, whatever its files and keys say: see SECURITY.md."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import save_tiny
from tiny_runs import Workshop
from transformers import dynamic_module_utils

from alignpro.cli import main
from alignpro.environments.rewriter import Rewriter
from alignpro.errors import AlignProError, CheckpointError, ModelError
from alignpro.models.pickled_files import foreign_globals
from alignpro.training.checkpoint import MANIFEST, CheckpointStore, write_manifest

Finished = Callable[..., Path]


class Payload:
    """Pickled, it creates a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.canary, "w")


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that every payload creates."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "canary"


@pytest.fixture
def run(finished: Finished, tmp_path: Path, canary: Path) -> Path:
    """Return a finished run with payload.py, an importable module whose import is noticed."""
    run = tmp_path / "theirs"
    shutil.copytree(finished("train"), run)
    code = f"open({str(canary)!r}, 'w').close()\n"
    code += "from transformers import Qwen2Config as C, Qwen2ForCausalLM as M\nclass Model(M): pass\nclass Config(C): pass\n"
    for place in (run, run / "model"):
        (place / "payload.py").write_text(code)
    return run


def change_yaml(file: Path, **values: Any) -> None:
    """Set dotted keys, with __ for the dot."""
    content = yaml.safe_load(file.read_text())
    for key, value in values.items():
        *sections, last = key.split("__")
        inner = content
        for section in sections:
            inner = inner[section]
        inner[last] = value
    file.write_text(yaml.safe_dump(content))


def change_json(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def their_classes(run: Path, canary: Path) -> None:
    file = f"{run}/payload.py"
    change_yaml(run / "config.yaml", environment=f"{file}:Model", objective__loss=f"{file}:Model")
    change_yaml(run / "config.yaml", objective__advantage=f"{file}:Model", prompting__meta_prompt=f"{run}/meta.jinja")
    change_yaml(run / "config.yaml", reward__components=[{"kind": "function", "function": f"{file}:Model"}])
    escape = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    (run / "meta.jinja").write_text(escape + "{{ prompt }}")


def their_model_code(run: Path, canary: Path) -> None:
    change_json(
        run / "model/config.json",
        auto_map={"AutoConfig": "payload.Config", "AutoModelForCausalLM": "payload.Model"},
    )
    change_json(run / "model/tokenizer_config.json", auto_map={"AutoTokenizer": ["payload.Model", "payload.Model"]})


def their_unknown_architecture(run: Path, canary: Path) -> None:
    their_model_code(run, canary)
    change_json(run / "model/config.json", model_type="unheard_of")


def their_generation(run: Path, canary: Path) -> None:
    change_json(run / "model/generation_config.json", custom_generate="payload")
    (run / "model/custom_generate").mkdir()
    shutil.copy(run / "payload.py", run / "model/custom_generate/generate.py")


def their_chat_template(run: Path, canary: Path) -> None:
    escape = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    (run / "model/chat_template.jinja").write_text(escape + "{{ messages[0].content }}")


def their_pickled_weights(run: Path, canary: Path) -> None:
    (run / "model/model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(canary)}, run / "model/pytorch_model.bin")


def their_adapter(run: Path, canary: Path) -> None:
    change_json(run / "model/adapter_config.json", peft_type="LORA", task_type="CAUSAL_LM", r=2)
    change_json(run / "model/adapter_config.json", base_model_name_or_path=str(run / "model/base"))
    change_json(run / "model/adapter_config.json", target_modules=["q_proj"], megatron_core="payload")
    change_json(run / "model/adapter_config.json", megatron_config={"a": 1})
    save_tiny("qwen2", run / "model/base")
    torch.save({"q_proj": Payload(canary)}, run / "model/adapter_model.bin")


def their_yaml(run: Path, canary: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write(f"title: !!python/object/apply:os.system ['touch {canary}']\n")


@pytest.mark.parametrize(
    "poison",
    [
        their_classes,
        their_model_code,
        their_unknown_architecture,
        their_generation,
        their_chat_template,
        their_pickled_weights,
        their_adapter,
        their_yaml,
    ],
)
def test_using_their_run_runs_none_of_its_code(
    run: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[[Path, Path], None]
) -> None:
    monkeypatch.syspath_prepend(str(run))
    poison(run, canary)
    try:
        Rewriter.load(run, with_target=True).rewrite(["flip the word stone"])
    except AlignProError as refusal:
        assert str(run) in str(refusal) or "escape" in str(refusal) or "unsafe" in str(refusal)
    assert not canary.exists()


@pytest.mark.parametrize("section", ["policy", "target"])
def test_the_configuration_of_a_run_cannot_trust_its_own_code(
    run: Path, canary: Path, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    their_model_code(run, canary)
    change_yaml(run / "config.yaml", **{f"{section}__trust_remote_code": True})
    if section == "target":
        change_yaml(run / "config.yaml", target__path=str(run / "model"))
    with pytest.raises(SystemExit) as stopped:
        main(["rewrite", "--run", str(run), "--answer", "flip the word stone"])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert f"run directory {run}: its config.yaml lets code run" in error
    assert f"{section}.trust_remote_code" in error and "--trust-remote-code" in error
    assert not canary.exists()


def test_the_command_line_can_trust_it(run: Path, canary: Path) -> None:
    change_yaml(run / "config.yaml", policy__trust_remote_code=True)
    change_json(run / "model/config.json", auto_map={"AutoModelForCausalLM": "payload.Model"})
    Rewriter.load(run, trust_remote_code=True)
    assert canary.exists()


def test_attention_kernels_from_the_hub_are_code(run: Path) -> None:
    change_yaml(run / "config.yaml", policy__attention="someone/kernels")
    with pytest.raises(ModelError, match=r"config.yaml lets code run .*policy.attention=someone/kernels"):
        Rewriter.load(run)


@pytest.mark.parametrize("file", ["policy_optimizer.pt", "random.pt"])
def test_resuming_from_their_checkpoint_runs_none_of_its_code(
    workshop: Workshop, run: Path, canary: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(run / "checkpoints", keep=9)
    torch.save({"optimizer": Payload(canary), "python": Payload(canary)}, store.path(2) / file)
    sign_again(store.path(2))
    assert workshop.run("train", run, "--resume", "--at=2") == 1
    error = capsys.readouterr().err
    assert f"checkpoint {store.path(2)}: cannot be read" in error and "Traceback" not in error
    assert not canary.exists()


def sign_again(checkpoint: Path) -> None:
    """Write the manifest anew, as someone who has changed a file would."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    write_manifest(checkpoint, manifest["step"], manifest["run"])


def test_deepspeeds_pickles_are_checked_before_deepspeed_reads_them(old_runs: Path, canary: Path) -> None:
    from alignpro.training.deepspeed_backend import require_plain_pickles

    policy = old_runs / "runs/zero2/checkpoints/step_000002/policy"
    require_plain_pickles(policy)
    file = policy / "mp_rank_00_model_states.pt"
    torch.save({"module": Payload(canary)}, file)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt: could run code .* io.open"):
        require_plain_pickles(policy)
    torch.save({"module": Payload(canary)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt: it is not a file of torch.save"):
        require_plain_pickles(policy)
    assert not canary.exists()


def test_a_pickle_in_a_protocol_that_torch_does_not_write_is_refused(tmp_path: Path, canary: Path) -> None:
    """A later protocol names its globals in a way that is not read here."""
    torch.save({"w": Payload(canary)}, tmp_path / "weights.pt", pickle_protocol=4)
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        foreign_globals(tmp_path / "weights.pt")
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    (tmp_path / "weights.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="torchscript"):
        foreign_globals(tmp_path / "weights.pt")


@pytest.mark.parametrize("command", ["train", "reward"])
def test_refused_pickled_weights_are_one_error_that_names_the_file(
    workshop: Workshop, tmp_path: Path, canary: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(workshop.root / "target", model)
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(canary)}, model / "pytorch_model.bin")
    key = {"train": "target", "reward": "model"}[command]
    assert workshop.run(command, tmp_path / "run", f"{key}.path={model}") == 1
    error = capsys.readouterr().err
    assert f"{model}/pytorch_model.bin could run code when it is read (it names io.open)" in error
    assert "Traceback" not in error and "weights_only" not in error
    assert not canary.exists()
