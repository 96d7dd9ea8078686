"""The exercises: a registry of tasks with checks, hints, reference solutions and known wrong answers.

A check runs the reader's function against cases and names the first case that fails and the rule behind it.
Each exercise is proven by its own reference and wrong answers.
"""
