"""What a run would do and need: the amount of work (`dry_run`), memory and what servers cost by formula (`memory`, `spending`),
and the micro-batch that fits.

No weights are loaded, only the models' config.json files. May import `config`, `models`, `distributed` and `errors`; the
command line, launch/sizing and the benchmarks read it.
"""
