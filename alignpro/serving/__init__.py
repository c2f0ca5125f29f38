"""The proxy that rewrites prompts in front of any OpenAI-compatible target, and the page to try it.

One process: HTTP on an event loop, the engine with the prompters (and a local target) on a thread of its own. What passes
between the two sides is in `contract`. May import `environments`, `rewards`, `targets` and what they may import.
"""
