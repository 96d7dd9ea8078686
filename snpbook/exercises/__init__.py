"""The exercises: a registry of tasks with checks, hints, reference solutions and known wrong answers.

A check runs the reader's function against cases and names the first case that fails and the rule behind it.
Each exercise is proven by its own reference and wrong answers. One module per chapter registers what it asks.
"""

from snpbook.exercises import first_light
from snpbook.exercises.desk import check, hint, task
from snpbook.exercises.registry import exercise, exercises

__all__ = ["check", "exercise", "exercises", "first_light", "hint", "task"]
