"""What a reader has solved: one small JSON file, which no fault may lose.

The file holds no times and no names, so that it can be handed in. One that cannot be read is kept aside under another
name, with a sentence that says so.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FORMAT = 1
VARIABLE = "SNPBOOK_PROGRESS"
"""The environment variable that names another file, for classrooms and tests."""


def default_path() -> Path:
    """The progress file of this user."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path.home() / ".snpbook" / "progress.json"


@dataclass(frozen=True, slots=True)
class Record:
    """One exercise: how often an answer was checked, and the best share of cases that passed."""

    attempts: int = 0
    best: float = 0.0

    @property
    def solved(self) -> bool:
        return self.best == 1


class Progress:
    """The progress file at `path`. `note` says what is wrong with it, and is empty while nothing is."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        self.note = ""
        self.records: dict[str, Record] = self._read()

    def __repr__(self) -> str:
        solved = sum(record.solved for record in self.records.values())
        return f"Progress({solved} solved, {len(self.records)} tried)"

    def add(self, exercise: str, score: float) -> None:
        """Count an attempt, and write the file anew; where that fails, `note` says why."""
        old = self.records.get(exercise, Record())
        self.records[exercise] = replace(old, attempts=old.attempts + 1, best=max(old.best, score))
        content = {"format": FORMAT, "exercises": {key: asdict(value) for key, value in sorted(self.records.items())}}
        fresh = self.path.with_name(f"{self.path.name}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            fresh.replace(self.path)
        except OSError as error:
            self.note = f"progress could not be saved in {self.path} ({error.strerror}); set {VARIABLE} to another file"

    def _read(self) -> dict[str, Record]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, not {FORMAT}")
            return {key: Record(int(r["attempts"]), float(r["best"])) for key, r in content["exercises"].items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            self.note = f"progress could not be read from {self.path} ({error.strerror})"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.note = self._set_aside(error)
        return {}

    def _set_aside(self, error: Exception) -> str:
        kept = next(p for n in range(1, 1000) if not (p := self.path.with_name(f"{self.path.name}.broken{n}")).exists())
        self.path.replace(kept)
        return f"the progress file could not be understood ({error}); it was kept as {kept.name} and a new one begun"
