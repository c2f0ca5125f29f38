"""Plans of many runs: prompters × targets × tasks × methods × seeds as cells, each in a directory and processes of its own.

Owns the directory of an experiment and the order of its cells. A cell's training, search and evaluation are commands of
`alignpro`, with configurations that are written beside their results. May import `evaluation`, `training` and what they may
import.
"""
