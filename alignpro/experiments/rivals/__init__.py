"""Rivals: optimisers of instructions, run with a limited number of responses of the same target and on the same rewards.

| module | subject |
|---|---|
| `answers` | what the target and the proposer were asked and answered, kept in a file, so that an interrupted search goes on |
| `asking` | every question to the target: counted, limited, scored |
| `unchanged` | responses to prompts as they are, which the guard `refusal_kept` needs |
| `gathering` | questions of several threads, answered in one batch |
| `proposing` | every question to the model that writes instructions: counted |
| `optimizers` | GEPA and MIPROv2 of dspy, which ask through these two alone |
| `run` | `alignpro rival` |

dspy is imported where it is used. May import what `experiments` may import.
"""
