"""What a checkpoint was made with, and whether it still lies beside it: format.json.

{"format_version": 1, "tokenizer": {...}, "special_tokens": {...}, "template": {...}, "dtype": {...}}, each of the four
with a `sha256`, in a run directory and in an exported folder. A folder without the file was made elsewhere and promises
nothing.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from puna.errors import CheckpointError
from puna.llama.shards import write_atomic
from puna.llama.template import TEMPLATE_FILE, chat_template
from puna.llama.tokenizer import Tokenizer

FORMAT_VERSION = 1
IDENTITY_FILE = "format.json"
NAMES = {
    "tokenizer": "the tokenizer",
    "special_tokens": "the special tokens",
    "template": "the chat template",
    "dtype": "the dtype",
}


def identity(tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Tokenizer, special tokens, chat template and dtype (of the weights, such as "float32"), each with its hash."""
    table = json.dumps(sorted(tokenizer.special.items()))
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.hash},
        "special_tokens": {"num_tokens": len(tokenizer.special), "sha256": _sha256(table)},
        "template": {"name": tokenizer.chat_format, "sha256": _sha256(chat_template(tokenizer.chat_format))},
        "dtype": {"name": dtype, "sha256": _sha256(dtype)},
    }


def write_identity(folder: Path, tokenizer: Tokenizer, dtype: str) -> None:
    """Write FOLDER/format.json."""
    write_atomic(folder / IDENTITY_FILE, json.dumps(identity(tokenizer, dtype), indent=1).encode())


def verify_identity(folder: Path, tokenizer_dir: Path, tokenizer: Tokenizer, dtype: str | None) -> None:
    """Compare what lies there now with FOLDER/format.json; without that file nothing is compared.

    tokenizer: as loaded from `tokenizer_dir`, which may hold the template's own file. dtype: of the weights that were
    read; None where they were converted. Raises CheckpointError that names everything that differs.
    """
    kept = read_identity(folder)
    if kept is None:
        return
    differences = _differences(kept, identity(tokenizer, dtype or kept["dtype"]["name"]), tuple(NAMES))
    template = tokenizer_dir / TEMPLATE_FILE
    if template.is_file() and _sha256(template.read_text(encoding="utf-8")) != kept["template"]["sha256"]:
        differences.append(f"the file {template}")
    if differences:
        raise CheckpointError(
            f"{folder} was made with something else than is here now: {', '.join(differences)}",
            f"Put back what {folder / IDENTITY_FILE} records; `puna serve --allow-mismatch` takes it as it is.",
        )


def refuse_other_tokenizer(run: Path, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError where the checkpoints of `run` were made with another tokenizer."""
    kept = read_identity(run)
    if kept is None:
        return
    if differences := _differences(kept, identity(tokenizer, kept["dtype"]["name"]), ("tokenizer", "special_tokens")):
        raise CheckpointError(
            f"The checkpoints of {run} were made with another tokenizer than the data: {', '.join(differences)}",
            "Give shards that its tokenizer made, or another run directory with --run.dir.",
        )


def _differences(kept: dict[str, Any], here: dict[str, Any], keys: Iterable[str]) -> list[str]:
    return [
        f"{NAMES[key]} ({_shown(kept[key])} there, {_shown(here[key])} here)"
        for key in keys
        if kept[key]["sha256"] != here[key]["sha256"]
    ]


def read_identity(folder: Path) -> dict[str, Any] | None:
    """FOLDER/format.json; None where there is none. Raises CheckpointError where it is damaged."""
    path = folder / IDENTITY_FILE
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        version = kept["format_version"]
        complete = all(isinstance(kept[key]["sha256"], str) for key in NAMES) and isinstance(kept["dtype"]["name"], str)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r})", "Prepare the run or export the model again.") from error
    if version != FORMAT_VERSION or not complete:
        problem = f"{path} has format version {version}; this Puna reads {FORMAT_VERSION}"
        raise CheckpointError(problem, "Use the Puna that wrote it, or export the model again.")
    return kept


def _shown(entry: dict[str, Any]) -> str:
    name = f"{entry['name']} " if "name" in entry else ""
    return f"{name}{entry['sha256'][:12]}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
