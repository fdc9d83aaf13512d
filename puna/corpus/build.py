"""A source becomes a corpus: filtered, without duplicates, split.

DIR/train.jsonl, DIR/heldout.jsonl   a document a line: {"id", "text"}
DIR/removed.jsonl                    a line for each document that was removed: {"id", "reason"[, "of"][, "detail"]}
DIR/corpus.json                      the report, written last: a folder without it holds no corpus
"""

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puna.console import err, track
from puna.corpus import cache
from puna.corpus.dedup import NUM_HASHES, MinHash, clusters, exact_key
from puna.corpus.documents import Source, open_source
from puna.corpus.filters import Limits, judge
from puna.corpus.formats import Document
from puna.corpus.rows import REPORT
from puna.corpus.split import check_no_leak, choose_heldout
from puna.errors import DataError
from puna.llama.shards import sha256_file, write_atomic

FILES = ("train.jsonl", "heldout.jsonl", "removed.jsonl")
LOOSER = 0.1  # documents this much less similar than near duplicates stay, but on one side of the split
NUM_NAMED = 3  # documents named on the terminal for each reason
CODE = [
    Path(__file__).with_name(f"{name}.py")
    for name in ("build", "dedup", "documents", "filters", "formats", "split", "warc")
]


@dataclass(frozen=True)
class _Kept:
    """What is remembered of a document that no filter removed; `place` counts the documents of the source."""

    place: int
    id: str
    key: bytes
    num_bytes: int


@dataclass(frozen=True)
class _Removed:
    """Why a document was removed; `of` is the document that it repeats, `detail` what reading it came to."""

    id: str
    reason: str
    of: str = ""
    detail: str = ""


def build_corpus(
    source: str, out: Path, heldout: float = 0.05, near: float = 0.8, seed: int = 0, limits: Limits | None = None
) -> dict[str, Any]:
    """Read, filter, deduplicate and split a source into `out`; returns corpus.json's content, `up_to_date`, `seconds`.

    heldout: share of the bytes to hold out. near: Jaccard similarity of near duplicates, 0.7 to 1; 0 looks for exact
    ones only. Nothing is done where `out` already holds the result. Raises DataError.
    """
    started, out, limits = time.monotonic(), Path(out), limits or Limits()
    if not 0 <= heldout < 1:
        raise DataError(f"heldout is {heldout}", "Give the share of the bytes to hold out, from 0 to below 1.")
    if near and not 0.7 <= near <= 1:
        raise DataError(f"near is {near}", "Give a Jaccard similarity from 0.7 to 1, or 0 for exact duplicates only.")
    opened = open_source(source)
    if out.resolve().is_relative_to(opened.root.resolve()):
        raise DataError(f"The output folder {out} lies inside the source {source}", "Choose a folder outside.")
    options = {"heldout": heldout, "near": near, "seed": seed, **limits.model_dump(), **opened.libraries}
    wanted = cache.recipe(opened.sha256(), options, CODE)
    made = cache.read_recipe(out / REPORT)
    current = cache.is_current(f"corpus {out}", out, made, wanted)
    report = made if made is not None and current else _build(opened, out, wanted, limits)
    return {**report, "up_to_date": current, "seconds": round(time.monotonic() - started, 2)}


def _build(source: Source, out: Path, wanted: dict[str, Any], limits: Limits) -> dict[str, Any]:
    options = wanted["options"]
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).unlink(missing_ok=True)
    kept, signatures, removed = _survey(source, limits, bool(options["near"]))
    groups = np.arange(len(kept))
    if options["near"] and kept:
        kept, signatures, groups = _drop_near(kept, signatures, removed, options["near"])
    _tell(removed.values())
    if not kept or (options["heldout"] and len(set(groups)) < 2):
        raise _too_few(source, kept, removed)
    names, sizes = [kept[group].id for group in groups], [document.num_bytes for document in kept]
    heldout = choose_heldout(names, sizes, options["heldout"], options["seed"])
    checked = check_no_leak([d.key for d in kept], signatures, heldout, options["near"])
    _write(source, out, limits, kept, heldout, removed)
    report = {
        **wanted,
        "source": source.facts,
        "documents": len(kept) + len(removed),
        "removed": dict(sorted(Counter(r.reason for r in removed.values()).items())),
        "splits": {"train": _counts(kept, ~heldout), "heldout": _counts(kept, heldout)},
        "heldout_checked": checked,
        "files": {name: {"bytes": (out / name).stat().st_size, "sha256": sha256_file(out / name)} for name in FILES},
    }
    write_atomic(out / REPORT, json.dumps(report, indent=1).encode())
    return report


def _judged(source: Source, limits: Limits, doing: str) -> Iterator[tuple[int, Document, str, str | None]]:
    """Place, document, text, and why it is removed if it is."""
    for place, document in enumerate(track(source, doing, source.num_documents)):
        text, reason = ("", document.reason) if document.reason else judge(document.data, limits)
        yield place, document, text, reason


def _survey(
    source: Source, limits: Limits, with_signatures: bool
) -> tuple[list[_Kept], np.ndarray, dict[int, _Removed]]:
    """First reading: filters and exact duplicates. Signatures are (number kept, 300), or (0, 300) where not wanted."""
    kept: list[_Kept] = []
    removed: dict[int, _Removed] = {}
    first: dict[bytes, str] = {}
    signatures, minhash = [], MinHash()
    for place, document, text, reason in _judged(source, limits, "reading"):
        key = exact_key(text)
        if reason is not None:
            removed[place] = _Removed(document.id, reason, detail=document.detail)
        elif key in first:
            removed[place] = _Removed(document.id, "exact_duplicate", first[key])
        else:
            first[key] = document.id
            kept.append(_Kept(place, document.id, key, len(text.encode())))
            if with_signatures:
                signatures.append(minhash.signature(text))
    return kept, np.array(signatures, np.uint32).reshape(-1, NUM_HASHES), removed


def _drop_near(
    kept: list[_Kept], signatures: np.ndarray, removed: dict[int, _Removed], near: float
) -> tuple[list[_Kept], np.ndarray, np.ndarray]:
    """Keep the first document of each cluster; the documents left, their signatures and their groups for the split."""
    root = clusters(signatures, near)
    stays = root == np.arange(len(kept))
    for i in np.flatnonzero(~stays):
        removed[kept[i].place] = _Removed(kept[i].id, "near_duplicate", kept[root[i]].id)
    left = signatures[stays]
    return [kept[i] for i in np.flatnonzero(stays)], left, clusters(left, near - LOOSER)


def _tell(removed: Iterable[_Removed]) -> None:
    """A line for each reason: how many documents, and the first few by name."""
    by_reason: dict[str, list[_Removed]] = defaultdict(list)
    for document in removed:
        by_reason[document.reason].append(document)
    for reason, documents in sorted(by_reason.items()):
        named = [d.id + (f" ({d.detail})" if d.detail else "") for d in documents[:NUM_NAMED]]
        more = f", and {len(documents) - NUM_NAMED:,} more" if len(documents) > NUM_NAMED else ""
        line = f"removed  {reason}  {len(documents):,}: {', '.join(named)}{more}"
        err.print(line, markup=False, soft_wrap=True)


def _write(
    source: Source, out: Path, limits: Limits, kept: list[_Kept], heldout: np.ndarray, removed: dict[int, _Removed]
) -> None:
    """Second reading: the files of the corpus, renamed into place when all are whole."""
    where = {document.place: (document, FILES[int(out)]) for document, out in zip(kept, heldout, strict=True)}
    num_read = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(out / f"{name}.tmp", "wb")) for name in FILES}
        for place, document, text, reason in _judged(source, limits, "writing"):
            num_read += 1
            if place in removed and removed[place].id == document.id:
                row, name = {k: v for k, v in vars(removed[place]).items() if v}, "removed.jsonl"
            elif place in where and reason is None and exact_key(text) == where[place][0].key:
                row, name = {"id": document.id, "text": text}, where[place][1]
            else:
                raise _changed(document.id)
            files[name].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        if num_read < len(kept) + len(removed):
            raise _changed(source.facts["name"])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for name in FILES:
        os.replace(out / f"{name}.tmp", out / name)


def _changed(what: str) -> DataError:
    return DataError(f"{what} changed while it was read", "Build again when it is at rest.")


def _counts(kept: list[_Kept], chosen: np.ndarray) -> dict[str, int]:
    own = [document for document, here in zip(kept, chosen, strict=True) if here]
    return {"documents": len(own), "bytes": sum(document.num_bytes for document in own)}


def _too_few(source: Source, kept: list[_Kept], removed: dict[int, _Removed]) -> DataError:
    reasons = Counter(r.reason for r in removed.values())
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
    problem = f"Of {len(kept) + len(removed)} documents in {source.facts['name']} {len(kept)} are left (removed: {why})"
    if kept:
        return DataError(f"{problem}, too few or too much alike to hold some out", "Give more, or hold out 0.")
    return DataError(problem, "Give more documents, or mend them.")
