"""The proxy that rewrites prompts in front of any OpenAI-compatible target, and the page to try it.

One process: HTTP on an event loop, the engine with the prompters (and a local target) on a thread of its own. What passes
between the two sides is in `contract`. HTTP:

| file | subject |
|---|---|
| `page_routes`, `page/` | the page at ``/``: plain HTML, CSS and JavaScript |
| `recent_requests`, `run_rewards` | what the page shows: the last requests, rewards of answers |

The rewriting side:

| file | subject |
|---|---|
| `rewriting` | all of it, opened with runs and a target; loading and unloading of runs |
| `rewriter` | one request: share, shadow mode, earlier turns, the body that is sent |
| `prompt_span`, `json_spans` | which text may be rewritten; its replacement in the bytes of the request |
| `prompt_writer` | one prompt: deadline, queue, cache, guards |
| `candidates` | the choice among several rewrites by the reward of the target's answers |
| `engine_thread` | the thread that generates |
| `local_target`, `chat_request`, `text_stream` | a target in this process: its answers, what it refuses, its streams |

May import `environments`, `rewards`, `targets` and what they may import.
"""
