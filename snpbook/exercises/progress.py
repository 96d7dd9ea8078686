"""What a reader has solved: one small JSON file, which no fault may lose.

The file holds no times and no names, so that it can be handed in. One that cannot be read is kept aside under another
name, with a sentence that says so.
"""

import json
import os
from dataclasses import asdict, dataclass
from itertools import count
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
        self._broken: Path | None = None
        self.records = self._read()

    def __repr__(self) -> str:
        solved = sum(record.solved for record in self.records.values())
        return f"Progress({solved} solved, {len(self.records)} tried)"

    def add(self, exercise: str, score: float) -> None:
        """Count an attempt, and write the file anew; where that fails, `note` says why."""
        old = self.records.get(exercise, Record())
        self.records[exercise] = Record(old.attempts + 1, max(old.best, score))
        content = {"format": FORMAT, "exercises": {key: asdict(value) for key, value in sorted(self.records.items())}}
        fresh = self.path.with_name(f"{self.path.name}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._broken:
                self.path.replace(self._broken)
            fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            fresh.replace(self.path)
        except OSError as error:
            self.note = f"progress could not be saved in {self.path} ({error.strerror}); set {VARIABLE} to another file"
        self._broken = None

    def _read(self) -> dict[str, Record]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, not {FORMAT}")
            return {key: Record(int(r["attempts"]), float(r["best"])) for key, r in content["exercises"].items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            self.note = f"progress could not be read from {self.path} ({error.strerror})"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._broken = self._free_name()
            self.note = (
                f"the progress file {self.path} could not be understood ({error}); "
                f"it is kept as {self._broken.name} and a new one begun"
            )
        return {}

    def _free_name(self) -> Path:
        """A name beside the file that nothing has yet."""
        names = (self.path.with_name(f"{self.path.name}.broken{number}") for number in count(1))
        return next(name for name in names if not name.exists())
