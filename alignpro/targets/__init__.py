"""The frozen target: local, on the engine, or remote, behind an endpoint.

What is above an environment does not know which. May import `engine`, `endpoints`, `prompting`, `models`, `data`, `config`,
`errors`.
"""
