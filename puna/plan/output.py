"""Files that the planner writes: whole or not at all."""

import os
from pathlib import Path

from puna.errors import DataError


def write(path: Path, content: str | bytes) -> None:
    """A reader sees the old file or the new one. Raises DataError, which names the path."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}", "Name a file in a folder that is there."
        ) from error
    finally:
        if temporary.is_file():
            temporary.unlink()
