"""What travels to a GPU machine: the packages of cpu.txt that its image lacks."""

from __future__ import annotations

import runpy
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GATHER = runpy.run_path(str(ROOT / "requirements" / "gather_wheels.py"))


def test_the_packages_that_an_image_lacks_travel_in_the_pinned_versions() -> None:
    present = GATHER["names"](ROOT / "requirements" / "gpu_image.txt")
    pins = GATHER["missing"](present, ROOT / "requirements" / "cpu.txt")
    names = {GATHER["normalised"](pin.partition("==")[0]) for pin in pins}
    needed = "pydantic pydantic-core annotated-types typing-inspection omegaconf py3langid datasets dill multiprocess"
    assert names >= {*needed.split(), "deepspeed", "hjson"}
    assert not names & {"torch", "triton", "transformers", "numpy", "scipy", "pyarrow", "pandas", "matplotlib"}


def test_a_freeze_of_another_image_can_be_given(tmp_path: Path) -> None:
    freeze = tmp_path / "freeze.txt"
    freeze.write_text(
        "# made by pip\n-e git+https://example.org/x\nPydantic_Core==2.1\ntorch @ file:///torch.whl\nnumpy\n"
    )
    assert GATHER["names"](freeze) == {"pydantic-core", "torch", "numpy"}
    pins = tmp_path / "pins.txt"
    pins.write_text('# pins\ntorch==2.13.0+cpu; sys_platform == "linux"\npydantic_core==2.50.4\nhjson==3.1.0\n')
    assert GATHER["missing"](GATHER["names"](freeze), pins) == ["hjson==3.1.0"]


def test_wheels_are_gathered_with_the_file_that_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, folder, present = tmp_path / "index", tmp_path / "wheels", tmp_path / "present.txt"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny_one-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_one.py", "")
        wheel.writestr("tiny_one-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-one\nVersion: 1.0\n")
        wheel.writestr("tiny_one-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_one-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    present.write_text("".join(f"{line}\n" for line in GATHER["missing"](set(), ROOT / "requirements" / "cpu.txt")))
    GATHER["main"](["--to", str(folder), "--present", str(present), "--also", "tiny-one"])
    assert (folder / "requirements.txt").read_text() == "tiny_one==1.0\n"
    assert [file.name for file in folder.glob("*.whl")] == ["tiny_one-1.0-py3-none-any.whl"]
