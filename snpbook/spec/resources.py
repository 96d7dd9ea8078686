"""The one place that finds `data/` and `notebooks/`: in a clone, an editable install or a wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_INSTALLED = _PACKAGE / "share"
_CLONE = _PACKAGE.parent


def resource(*parts: str) -> Path:
    """The path of a shipped file or folder, such as `resource("data", "products")`.

    A wheel carries both folders in `snpbook/share`; a clone has them beside the package.
    Raises `FileNotFoundError` naming both places when the file is in neither.
    """
    for root in (_INSTALLED, _CLONE):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise FileNotFoundError(f"{'/'.join(parts)} is neither in {_INSTALLED} nor in {_CLONE}: reinstall snpbook")
