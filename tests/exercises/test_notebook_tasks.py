"""What a chapter asks is what the registry asks: number, title, minutes, difficulty, prerequisites and task."""

import re

import pytest

from snpbook.exercises import exercise
from snpbook.spec.resources import resource
from snpbook.tools.notebooks import load

CHAPTERS = {
    "01_memory_encryption.ipynb": "memory_encryption",
    "02_reverse_map_table.ipynb": "reverse_map_table",
    "03_secure_processor.ipynb": "secure_processor",
    "04_host_setup.ipynb": "host_setup",
    "05_guest_launch.ipynb": "guest_launch",
    "06_inside_the_guest.ipynb": "inside_the_guest",
    "07_attestation.ipynb": "attestation",
    "08_private_memory.ipynb": "private_memory",
}
WORDS = {1: "easy", 2: "middling", 3: "hard"}
HEAD = re.compile(r"^\*\*(\d)\. (.+?)\*\* \((\d+) minutes, (\w+)(?:; needs (.+?))?\) (.+)", re.MULTILINE)


@pytest.mark.parametrize(("name", "chapter"), CHAPTERS.items())
def test_a_chapter_asks_what_the_registry_asks(name: str, chapter: str) -> None:
    notebook = load(resource("notebooks", name).read_text(encoding="utf-8"))
    asked = [HEAD.search(cell.source) for cell in notebook.cells if re.search(r"^\*\*\d\. ", cell.source, re.MULTILINE)]
    assert len(asked) >= 4
    for found in asked:
        assert found is not None
        number, title, minutes, difficulty, needs, task = found.groups()
        known = exercise(f"{chapter}.{number}")
        assert (title, int(minutes), difficulty) == (known.title, known.minutes, WORDS[known.difficulty])
        assert needs == (" and ".join(known.prerequisites) or None)
        assert task.replace("`", "").startswith(known.task.replace("`", ""))
