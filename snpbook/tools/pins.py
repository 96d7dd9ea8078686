"""`python -m snpbook.tools.pins`: write the exact pins that `make`, the tests and Binder install.

They are the versions in the environment at hand: all that `snpbook[test]` needs for `constraints.txt`, all that
snpbook alone needs for `binder/requirements.txt`. Only names and versions are written, so any package index serves.
"""

from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def closure(name: str, extras: Iterable[str] = ()) -> dict[str, str]:
    """Every distribution that `name[extras]` needs in this environment, without itself: canonical name -> version.

    Raises `PackageNotFoundError` where one of them is not installed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    pending = [(name, extra) for extra in ("", *extras)]
    while pending:
        wanted = pending.pop()
        if wanted in seen:
            continue
        seen.add(wanted)
        distribution, extra = wanted
        found[canonicalize_name(distribution)] = metadata.version(distribution)
        for line in metadata.requires(distribution) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                pending += [(requirement.name, needed) for needed in ("", *requirement.extras)]
    del found[canonicalize_name(name)]
    return found


def write(path: Path, pins: Mapping[str, str]) -> None:
    """One `name==version` a line, sorted."""
    path.write_text("".join(f"{name}=={version}\n" for name, version in sorted(pins.items())))


if __name__ == "__main__":
    write(ROOT / "constraints.txt", closure("snpbook", ["test"]))
    write(ROOT / "binder" / "requirements.txt", closure("snpbook"))
