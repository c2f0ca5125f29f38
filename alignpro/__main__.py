"""``python -m alignpro``, ``deepspeed --module alignpro`` and the command ``alignpro``."""

from __future__ import annotations

import os
import sys

from alignpro.distributed.interrupts import EXIT_CODE, exit_at_interrupt, quiet_interrupts
from alignpro.models.cpu.threads import set_environment


def main() -> None:
    """Run the command line. Ctrl-C ends it quietly, even while it is being loaded.

    Raises:
        SystemExit: Always, except that after `alignpro rewrite` the process ends here.
    """
    set_environment()
    with quiet_interrupts():
        try:
            with exit_at_interrupt():
                from alignpro.cli import main as run
            run()
        except KeyboardInterrupt:
            sys.exit(EXIT_CODE)
        except SystemExit as stop:
            if sys.argv[1:2] == ["rewrite"] and isinstance(stop.code, int | None):
                _end_process(stop.code or 0)
            raise


def _end_process(status: int) -> None:
    """End without the interpreter's own end, which takes seconds to free what torch and transformers have made.

    For a command that leaves no open file, thread or other process. Returns if its output cannot be written.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader has gone; the interpreter says so as always
        return
    os._exit(status)


if __name__ == "__main__":
    main()
