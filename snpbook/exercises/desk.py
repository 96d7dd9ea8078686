"""The reader's desk: `check` an answer, ask for a `hint`. Keeps count of hints and records progress.

Hints are counted while the kernel lives and not in the file, so that a notebook run from its start says the same.
"""

from collections import Counter
from dataclasses import replace
from html import escape
from pathlib import Path

from snpbook.exercises.checking import Outcome, tried
from snpbook.exercises.progress import Progress
from snpbook.exercises.registry import HINTS, Answer, exercise
from snpbook.views.static import Static

_asked: Counter[str] = Counter()


def check(identifier: str, answer: Answer, *, progress: Path | None = None) -> Outcome:
    """Try `answer` on the exercise `identifier`, record the attempt, and say how it did.

    `progress` is the file to record in, by default the user's. Raises only for an id that does not exist.
    """
    outcome = tried(exercise(identifier), answer)
    record = Progress(progress)
    record.add(identifier, outcome.score)
    return replace(outcome, note=record.note)


def hint(identifier: str) -> Static:
    """The next hint of the exercise, firmer each time; after the last one, the worked solution."""
    asked = exercise(identifier)
    _asked[identifier] += 1
    number = _asked[identifier]
    if number <= HINTS:
        title, text = f"Hint {number} of {HINTS} for {asked.id}", asked.hints[number - 1]
        return Static(f"{title}: {text}", _fold(title, f"<p>{escape(text)}</p>"))
    title, code = f"Worked solution of {asked.id}", asked.reference_source
    body = f"<p>{escape(asked.solution)}</p><pre>{escape(code)}</pre>"
    return Static(f"{title}: {asked.solution}\n\n{code}", _fold(title, body))


def task(identifier: str) -> Static:
    """What the exercise asks."""
    asked = exercise(identifier)
    needs = ", ".join(asked.prerequisites) or "nothing"
    facts = f"{asked.minutes} minutes, difficulty {asked.difficulty} of 3, needs {needs}"
    title = f"Exercise {asked.id}: {asked.title}"
    html = f"<p><strong>{escape(title)}</strong><br>{escape(facts)}</p><p>{escape(asked.task)}</p>"
    return Static(f"{title}\n{facts}\n{asked.task}", html)


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"
