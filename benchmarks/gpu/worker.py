"""The process that runs smoke checks one after another: python -m benchmarks.gpu.worker DEVICE EVENTS NAME…

What happens goes to the file descriptor EVENTS, a JSON object per line. A check that outlasts its time limit ends the
process with a traceback of all threads, and so does a check that leaves the device unusable: the caller then starts
another process with the checks that are left.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence

from benchmarks.gpu.checks import CHECKS, Check, NotHereError

IMPORT_SECONDS = 40.0
CPU_PATIENCE = 4
"""By how much checks may take longer on a CPU, where kernels are interpreted."""


def main(device: str, events: int, names: Sequence[str]) -> None:
    """Run the named checks."""
    patience = CPU_PATIENCE if device == "cpu" else 1
    with os.fdopen(events, "w", buffering=1) as stream:
        faulthandler.dump_traceback_later(patience * IMPORT_SECONDS, exit=True)
        import torch

        for check in (check for name in names for check in CHECKS if check.name == name):
            print(json.dumps({"begins": check.name}), file=stream)
            faulthandler.dump_traceback_later(patience * check.seconds, exit=True)
            result, error = attempt(check, torch.device(device))
            print(json.dumps(result), file=stream)
            # After an error of the device itself, every later call of this process fails too.
            if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
                break
        faulthandler.cancel_dump_traceback_later()


def attempt(check: Check, device: object) -> tuple[dict[str, object], Exception | None]:
    """Run one check and return its result, ready for JSON, and its error."""
    import torch

    assert isinstance(device, torch.device)
    started = time.monotonic()
    result: dict[str, object] = {"name": check.name}
    error: Exception | None = None
    try:
        result |= {"status": "PASS", "detail": check.run(device)}
    except NotHereError as reason:
        result |= {"status": "SKIP", "detail": str(reason)}
    except Exception as caught:  # whatever it is, it is the result of this check alone
        error = caught
        first = (str(caught).strip().splitlines() or [""])[0]
        result |= {
            "status": "FAIL",
            "detail": f"{type(caught).__name__}: {first}",
            "traceback": traceback.format_exc(),
        }
    return result | {"seconds": round(time.monotonic() - started, 2)}, error


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
