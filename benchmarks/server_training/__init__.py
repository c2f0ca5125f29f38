"""Whether a prompter trained against a model behind a server gains what the same training in process gains."""
