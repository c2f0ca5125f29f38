"""Tasks: small rewards of a prompt and a response, in [0, 1], that ask for a style and for staying on topic.

A target that is given a prompt as it is seldom has the style, and a prompt can ask for it, so a prompter has something to
learn; each is hard to satisfy by text that ignores the prompt. Each module has the reward, by the module's name, and
`INSTRUCTIONS` that a person would try; the configuration names the reward as a function:
``{kind: function, function: "alignpro.rewards.tasks.house_style:house_style"}``.

| file | good is, or what it has |
|---|---|
| `house_style` | 8 to 40 words that end with a full stop |
| `greeting` | a friendly opening, and then the subject |
| `numbered_list` | at least three numbered items |
| `plain_words` | short sentences of short words, as for a child |
| `worked_example` | an example that is announced as one and spelt out |
| `fitting_form` | a list where the prompt asks for several things, house style elsewhere |
| `question_or_request` | house style where the prompt is a question, a list where it is a request |
| `style_guide` | a list, a sentence or a greeting, by what the prompt is |
| `rules` | the reward of a task whose rule depends on the kind of prompt |
| `words` | words, sentences, and how much of a prompt a text is about |

May import `data`.
"""
