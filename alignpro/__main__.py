"""``python -m alignpro`` and ``deepspeed --module alignpro``."""

from alignpro.cli import main

main()
