"""An OpenAI-compatible server as this project calls it: client, limits, ledger, budget.

Knows nothing of targets, rewards or judges, which use it. A `Query` is one prompt and the draws that are wanted of its
answer; the client sends what the ledger does not hold, within the limits of the server and the budget of the run. Needs
neither torch nor transformers. May import `config`, `errors`.
"""
