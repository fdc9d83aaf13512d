"""What a result was made of: equal inputs, options and code make an equal key, and nothing is made twice."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from puna.console import err


def recipe(inputs: str, options: Mapping[str, Any], code: Iterable[Path]) -> dict[str, Any]:
    """Everything that decides a result: the hash of its inputs, the options, and the files of code that make it."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code))).hexdigest()
    parts = {"inputs": inputs, "options": dict(options), "code": digest}
    return {"key": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), **parts}


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The report beside a result; None where there is none, or none that can be understood."""
    try:
        made = json.loads(path.read_bytes())
        return made if {"inputs", "options", "code", "files"} <= made.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def is_current(what: str, folder: Path, made: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """Whether the result in `folder`, with the report `made` (None: there is none), can stay; says so, or why not.

    made: a recipe with `files`, name -> {"bytes": ...}.
    """
    if made is None:
        return False
    reasons = _differences(made, wanted) or [
        f"{name} is missing or was cut" for name, facts in made["files"].items() if not has_size(folder / name, facts)
    ]
    if reasons:
        err.print(f"{what}: making it again, because {'; '.join(reasons)}", markup=False, soft_wrap=True)
    else:
        err.print(f"{what}: up to date", markup=False, soft_wrap=True)
    return not reasons


def has_size(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a file is there and has the bytes that `facts` says."""
    return path.is_file() and path.stat().st_size == facts["bytes"]


def _differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    found = ["the input changed"] if made["inputs"] != wanted["inputs"] else []
    for name, value in wanted["options"].items():
        if made["options"].get(name) != value:
            found.append(f"{name} was {made['options'].get(name)} and is {value}")
    if made["code"] != wanted["code"]:
        found.append("the code that makes it changed")
    return found
