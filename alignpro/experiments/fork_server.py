"""``python -m alignpro.experiments.fork_server PROGRAM MODULE…``: load modules once, then fork for each command.

Loading takes seconds, which is longer than many an evaluation of a small model. Reads a JSON line for each command from
standard input, ``{"arguments": [...], "log": "..."}``, and writes two lines to standard output: the child's process id,
once it leads a session of its own, and its exit status, negative after a signal. It ends with its input, or its parent.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Sequence

from alignpro.experiments.process import end_with_parent


def serve(program: str, modules: Sequence[str]) -> None:
    """Answer the requests of standard input until it ends.

    Args:
        program: The module that is run with the arguments of each command, as by ``python -m``.
        modules: What is loaded before.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # what a library prints while it is loaded is no reply
        os.dup2(nowhere, descriptor)
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # a collection in a child would copy the pages of all that is loaded
    for line in requests:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(program, request["arguments"], request["log"], replies)
        _, status = os.waitpid(child, 0)
        os.write(replies, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _run(program: str, arguments: Sequence[str], log: str, replies: int) -> None:
    """Run a command as ``python -m`` does, and end the process."""
    status = 1
    try:
        os.setsid()  # Ctrl-C reaches the experiment only, which passes it on
        end_with_parent()
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        os.write(replies, f"{os.getpid()}\n".encode())
        os.close(replies)
        sys.argv = [program, *arguments]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:  # the end of a process, which says why as the interpreter would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 0xFF)  # without the interpreter's own end, which takes seconds to free what is loaded


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
