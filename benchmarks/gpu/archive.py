"""One file with all results and logs of a run: a machine may give back only a few files."""

from __future__ import annotations

import tarfile
from pathlib import Path

from benchmarks.hardware import ROOT


def write(archive: Path, results: Path, logs: Path) -> None:
    """Write results and logs; the results have their paths in the repository, if they lie there.

    The archive is replaced as a whole, so that a run that is cut leaves a complete one.
    """
    part = archive.with_name(archive.name + ".part")
    inside = results.relative_to(ROOT) if results.is_relative_to(ROOT) else Path("results")
    with tarfile.open(part, "w:gz") as file:
        for folder, name in ((results, str(inside)), (logs, "logs")):
            if folder.is_dir():
                file.add(folder, arcname=name)
    part.replace(archive)
