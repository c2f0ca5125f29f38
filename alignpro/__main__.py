"""``python -m alignpro``, ``deepspeed --module alignpro`` and the command ``alignpro``."""

from __future__ import annotations

import sys

from alignpro.distributed.interrupts import EXIT_CODE, exit_at_interrupt, quiet_interrupts
from alignpro.models.cpu.threads import set_environment


def main() -> None:
    """Run the command line. Ctrl-C ends it quietly, even while it is being loaded.

    Raises:
        SystemExit: Always.
    """
    set_environment()
    with quiet_interrupts():
        try:
            with exit_at_interrupt():
                from alignpro.cli import main as run
            run()
        except KeyboardInterrupt:
            sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main()
