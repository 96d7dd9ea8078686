"""What the reader meets: outcomes that are never a traceback, hints that grow firmer, progress that is never lost."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snpbook.exercises import check, desk, exercise, hint, task
from snpbook.exercises.checking import same
from snpbook.exercises.progress import VARIABLE, Progress, default_path
from tests.views.reading import read

ID = "first_light.1"
REFERENCE = exercise(ID).reference


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "reader" / "progress.json"
    monkeypatch.setenv(VARIABLE, str(path))
    desk._asked.clear()
    yield path
    desk._asked.clear()


def raises(*_: Any) -> None:
    raise KeyError("vmpl7")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (raises, "KeyError: 'vmpl7'"),
        (lambda: 3, "TypeError: "),
        (lambda words, asid: None, "found nothing"),
        (lambda words, asid: ..., "found nothing"),
        (lambda words, asid: words, "expected 3, found "),
        (lambda words, asid: "three", "expected 3, found three"),
        (3, "without ()"),
        (None, "without ()"),
    ],
)
def test_no_answer_ends_in_a_traceback(answer: Any, words: str) -> None:
    outcome = check(ID, answer)
    assert not outcome
    assert words in repr(outcome)
    assert "Not yet" in read(outcome._repr_html_()).words


def test_a_stub_is_not_begun_and_a_wrong_answer_has_failed() -> None:
    stub = check(ID, lambda words, asid: None)
    assert not stub.begun
    assert "not begun" in read(stub._repr_html_()).words
    assert "failed" not in read(stub._repr_html_()).words
    wrong = check(ID, exercise(ID).wrong[0].answer)
    assert wrong.begun
    assert "failed" in read(wrong._repr_html_()).words


def test_an_answer_that_returns_in_some_cases_is_told_the_rule() -> None:
    outcome = check(ID, lambda words, asid: REFERENCE(words, asid) if asid == 1 else None)
    assert outcome.begun
    assert outcome.passed
    assert outcome.rule.endswith("mask before you compare (your function does not return a value here)")
    assert outcome.cite


def test_a_right_answer_of_another_shape_passes() -> None:
    assert check(ID, lambda words, asid: float(REFERENCE(words, asid)))
    assert check(ID, lambda words, asid: np.uint16(REFERENCE(words, asid)))


def test_outcome_reads_the_same_in_both_forms() -> None:
    outcome = check(ID, exercise(ID).wrong[0].answer)
    page = read(outcome._repr_html_())
    for words in (outcome.case, outcome.expected, outcome.found, outcome.rule, "5 of 7"):
        assert words in page.words
        assert words in repr(outcome)
    assert "✓ passed" in read(check(ID, REFERENCE)._repr_html_()).words


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        ([1, 2], np.array([1, 2]), True),
        (np.array([1, 2]), (1, 3), False),
        (np.array([1, 2]), np.array([1, 2, 3]), False),
        ({"a": np.array([1])}, {"a": [1]}, True),
        ({"a": 1}, {"b": 1}, False),
        (np.array([1, 2]), 1, False),
        (b"x", b"x", True),
        ("1", 1, False),
    ],
)
def test_meaning_is_compared(found: Any, expected: Any, equal: bool) -> None:
    assert same(found, expected) is equal


def test_hints_grow_firmer_and_end_in_the_solution() -> None:
    shown = [hint(ID) for _ in range(5)]
    assert [str(view).split(":")[0] for view in shown] == [
        f"Hint 1 of 3 for {ID}", f"Hint 2 of 3 for {ID}", f"Hint 3 of 3 for {ID}",
        f"Worked solution of {ID}", f"Worked solution of {ID}",
    ]  # fmt: skip
    assert "def usable_pages(" in shown[3].text
    for view in shown:
        assert view.html.startswith("<details><summary>")
        read(view.html)


def test_task_says_what_it_takes() -> None:
    assert "10 minutes, difficulty 1 of 3" in task(ID).text
    assert exercise(ID).task in read(task(ID).html).words


def test_attempts_and_the_best_score_are_kept(file: Path) -> None:
    for answer in (raises, REFERENCE, exercise(ID).wrong[0].answer):
        assert check(ID, answer).note == ""
    record = Progress().records[ID]
    assert (record.attempts, record.best, record.solved) == (3, 1.0, True)
    assert repr(Progress()) == "Progress(1 solved, 1 tried)"
    assert list(file.parent.iterdir()) == [file]


def test_another_file_may_be_named(tmp_path: Path, file: Path) -> None:
    check(ID, REFERENCE, progress=tmp_path / "class.json")
    assert Progress(tmp_path / "class.json").records[ID].solved
    assert not file.exists()


def test_the_default_lies_in_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    assert default_path() == Path.home() / ".snpbook" / "progress.json"


BROKEN = ["", "{", "[]", '{"format": 2, "exercises": {}}', '{"format": 1, "exercises": {"x": 3}}', "\0\1"]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_told_and_kept(file: Path, content: str) -> None:
    file.parent.mkdir()
    for number in (1, 2):
        file.write_text(content)
        outcome = check(ID, REFERENCE)
        kept = file.with_name(f"progress.json.broken{number}")
        assert f"kept as {kept.name}" in outcome.note
        assert outcome.note in repr(outcome)
        assert outcome.note in read(outcome._repr_html_()).words
        assert kept.read_text() == content
    assert json.loads(file.read_text())["exercises"][ID]["attempts"] == 1


def test_reading_alone_moves_nothing(file: Path) -> None:
    file.parent.mkdir()
    file.write_text("{")
    assert Progress().note
    assert [path.name for path in file.parent.iterdir()] == ["progress.json"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv(VARIABLE, str(blocked / "progress.json"))
    outcome = check(ID, REFERENCE)
    assert outcome
    assert "could not be saved" in outcome.note
