"""An imported folder: a manifest in JSON, written last, and data files of known sizes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from puna.errors import DataError

T = TypeVar("T")


def read_manifest(path: Path, what: str, how: str, version: int, of: Callable[[dict[str, Any]], T]) -> T:
    """What `of` makes of a manifest. what: the folder holds. how: it is made, for the user who has none.

    Raises DataError where it is not there, is no JSON, lacks a key, or has a newer format than `version`.
    """
    if not path.is_file():
        raise DataError(f"{path.parent} holds no {what}: there is no {path}", how)
    try:
        raw = json.loads(path.read_bytes())
        found = raw["format_version"]
        if found > version:
            raise DataError(f"{path} has format {found}; this Puna reads {version}", "Use a newer Puna.")
        return of(raw)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error})", f"Import the {what} again.") from None


def check_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """files: by name, `bytes`. Raises DataError for one that is missing or of another size."""
    for name, facts in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size}"
            raise DataError(f"{folder / name} should have {facts['bytes']} bytes and {found}", "Import again.")
