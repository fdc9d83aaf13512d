"""`puna recsys import`: click files stream into a folder of clicks; one that was cut short goes on where it stands.

Rows are written with provisional ids (the order of first sight) beside a journal of what is on disk for good. At the
end the values are counted over the training samples alone, those that are frequent enough get rows of their own, and
the ids are written anew. Memory: 20 bytes a value, and a block of rows.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from puna.console import track
from puna.errors import DataError
from puna.recsys import fields
from puna.recsys.clicks import COLUMNS, FORMAT_VERSION, MANIFEST
from puna.recsys.layouts import HOUR, TABLE, Layout
from puna.recsys.read import Block, read
from puna.recsys.vocabulary import NONE, Vocabulary
from puna.train.hashed import Hashed, sha256_of

JOURNAL = "journal.json"
JOURNAL_BLOCKS = 8  # between two records of what is on disk for good
REWRITE_ROWS = 1 << 18


@dataclass(frozen=True)
class Options:
    """How features become numbers.

    values: map: values get ids as they are met; hash: hashed into `buckets` rows; ids: they are ids already, below
    `buckets` where that is not 0. min_count: training samples that a value needs for a row of its own. max_rows: most
    rows of a table, the most frequent values first; 0: no limit. maps: folder of clicks whose ids are taken over.
    unseen: what happens to a value that `maps` lacks: it shares row 0, or is refused.
    """

    values: Literal["map", "hash", "ids"] = "map"
    buckets: int = 0
    min_count: int = 1
    max_rows: int = 0
    log: bool = True
    maps: str | None = None
    unseen: Literal["share", "refuse"] = "share"
    valid_share: float = 0.0
    test_share: float = 0.0


def import_clicks(
    files: Mapping[str, Sequence[Path | str]], out: Path | str, layout: Layout, options: Options | None = None
) -> dict[str, Any]:
    """Write the click files of each split (train, valid, test; in the order of time) as a folder of clicks.

    Returns out, samples, splits, tables (rows of each), click_rate. Raises DataError: a bad row, label, number, id or
    value (file, line, column), times that fall, `out` holds clicks already or an import of something else.
    """
    options, out = options or Options(), Path(out)
    if (out / MANIFEST).exists():
        raise DataError(f"{out} holds clicks already", "Name another folder with --out, or remove that one.")
    if options.values == "hash" and options.buckets < 2:
        raise DataError("hashed values need buckets", "Give --buckets with 2 or more.")
    if options.valid_share + options.test_share >= 1:
        raise DataError("the valid and test shares leave nothing to train on", "Lower --valid-share or --test-share.")
    sources = [(split, Path(path)) for split in ("train", "valid", "test") for path in files.get(split, ())]
    with ExitStack() as stack:
        stage = _Stage(out / "importing", sources, layout, options, stack)
        stage.read_all()
    facts = _finish(stage, out, layout, options)
    shutil.rmtree(stage.folder)
    return {"out": str(out)} | facts


class _Stage:
    """What has been read so far: columns with provisional ids, values, and the journal."""

    def __init__(
        self, folder: Path, sources: Sequence[tuple[str, Path]], layout: Layout, options: Options, stack: ExitStack
    ) -> None:
        self.folder, self.sources, self.layout, self.options = folder, sources, layout, options
        self.tables = layout.of(TABLE)
        self.columns = np.concatenate([[0], np.cumsum(layout.hots)])
        self.vocabularies = [Vocabulary() for _ in self.tables]
        self.done: dict[str, Any] = {"source": 0, "rows": 0, "samples": 0, "time": 0, "ends": {}}
        self._given = {
            "layout": asdict(layout),
            "options": asdict(options),
            "sources": [[split, str(path), path.stat().st_size if path.is_file() else 0] for split, path in sources],
        }
        names = [f"{n}.txt" for n in range(len(self.tables))]
        if (folder / JOURNAL).is_file():
            self._resume(names)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._files = {name: stack.enter_context((folder / name).open("ab")) for name in (*COLUMNS, *names)}
        if options.maps:
            maps = Path(options.maps) / "maps"
            self.vocabularies = [Vocabulary.load(_map_file(maps, layout.names[place])) for place in self.tables]

    def _resume(self, names: Sequence[str]) -> None:
        journal = json.loads((self.folder / JOURNAL).read_bytes())
        if journal["given"] != json.loads(json.dumps(self._given)):
            raise DataError(
                f"{self.folder} holds an import that was begun with other files or options",
                "Give the same ones to go on with it, or remove that folder.",
            )
        self.done = journal["done"]
        for name, size in journal["sizes"].items():
            os.truncate(self.folder / name, size)
        if self.options.values == "map" and not self.options.maps:
            self.vocabularies = [Vocabulary.load(self.folder / name) for name in names]

    def read_all(self) -> None:
        """Read what is not read yet of every file."""
        for number in range(self.done["source"], len(self.sources)):
            split, path = self.sources[number]
            if number > self.done["source"] or not self.done["rows"]:
                self.done |= {"source": number, "rows": 0}
            for count, block in enumerate(track(self._unread(path), f"reading {path.name}"), start=1):
                self._append(block)
                if count % JOURNAL_BLOCKS == 0:
                    self._record()
            self.done["ends"][split] = self.done["samples"]
            self.done |= {"source": number + 1, "rows": 0}
            self._record()

    def _unread(self, path: Path) -> Iterator[Block]:
        left = self.done["rows"]
        for block in read(path, self.layout):
            passed = min(left, len(block))
            left -= passed
            if passed < len(block):
                yield block.rest(passed)

    def _append(self, block: Block) -> None:
        columns: dict[str, npt.NDArray[Any]] = {
            "labels": fields.labels(block, self.layout),
            "dense": fields.dense(block, self.layout, self.options.log),
        }
        if self.layout.of(HOUR):
            self._require_order(block)
        ids = np.empty((len(block), self.columns[-1]), np.int32)
        for table, (place, first, end) in enumerate(zip(self.tables, self.columns, self.columns[1:], strict=False)):
            ids[:, first:end] = self._bags(block, table, place, end - first)
        for name, values in (columns | {"ids": ids}).items():
            self._files[name].write(np.ascontiguousarray(values, COLUMNS[name]).data)
        self.done["rows"] += len(block)
        self.done["samples"] += len(block)

    def _bags(self, block: Block, table: int, place: int, size: int) -> npt.NDArray[np.int32]:
        """(rows, size); -1 where a bag has no more."""
        if size == 1:
            return self._ids(block, table, place)[:, None]
        items = block.items(place, self.layout.tables[table], size)
        found = np.stack([self._ids(items, table, n) for n in range(size)], axis=1)
        return np.where(items.bounds[:, :, 0] == items.bounds[:, :, 1], np.int32(-1), found)

    def _ids(self, block: Block, table: int, place: int) -> npt.NDArray[np.int32]:
        name, options = self.layout.tables[table], self.options
        if options.maps:
            found = self.vocabularies[table].find(block, place)
            unseen = found < 0
            if options.unseen == "refuse" and unseen.any():
                row = int(unseen.argmax())
                raise DataError(
                    f"{block.place(row, name)}: the value {block.text(row, place)!r} is not in the map of "
                    f"{options.maps}",
                    "Import with --unseen share to let such values share row 0, or make the maps anew.",
                )
            return np.where(unseen, NONE, found)
        if options.values == "hash":
            empty = block.bounds[:, place, 0] == block.bounds[:, place, 1]
            hashed = (fields.hashes(block, place)[:, 0] % np.uint64(options.buckets - 1)).astype(np.int32) + 1
            return np.where(empty, NONE, hashed).astype(np.int32)
        if options.values == "ids":
            return fields.whole(block, place, name, options.buckets)
        found, lines = self.vocabularies[table].admit(block, place)
        if lines.count(b"\n") != len(lines.splitlines()) or b"\r" in lines:
            raise DataError(f"{block.path}: a value of the column {name} has a line break", "Values are one line.")
        self._files[f"{table}.txt"].write(lines)
        return found

    def _require_order(self, block: Block) -> None:
        found = fields.times(block, self.layout)
        before = np.concatenate([[self.done["time"]], found[:-1]])
        if (found < before).any():
            row, (place,) = int((found < before).argmax()), self.layout.of(HOUR)
            raise DataError(
                f"{block.place(row, self.layout.names[place])}: {found[row]} comes after {before[row]}",
                "Sort the rows by time: the last ones are what the model is tested on.",
            )
        self.done["time"] = int(found[-1])

    def _record(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        record = {"given": self._given, "done": self.done, "sizes": sizes}
        write_last(self.folder / JOURNAL, json.dumps(record).encode())


def _finish(stage: _Stage, out: Path, layout: Layout, options: Options) -> dict[str, Any]:
    """Splits, final ids, maps and the manifest, from what the stage has read."""
    count = stage.done["samples"]
    splits = _splits(stage, options)
    if splits["train"][1] == 0:
        raise DataError(f"{stage.sources[0][1]} has no sample to train on", "Give a file with rows.")
    whole = np.memmap(stage.folder / "ids", COLUMNS["ids"], "r", shape=(count, stage.columns[-1]))
    provisional = np.split(whole, stage.columns[1:-1], axis=1)
    remaps = [_remap(stage, table, ids, splits["train"], options) for table, ids in enumerate(provisional)]
    rows = [int(remap.max()) + 1 if len(remap) else 1 for remap in remaps]
    if options.values == "hash" or (options.values == "ids" and options.buckets):
        rows = [options.buckets] * len(rows)
    files = {"ids": _rewrite(out / "ids", provisional, remaps)}
    for name in ("labels", "dense"):
        (out / name).unlink(missing_ok=True)
        os.link(stage.folder / name, out / name)
        files[name] = {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)}
    if options.values == "map":
        files |= _write_maps(stage, out, layout, remaps, options)
    clicked = np.memmap(out / "labels", np.uint8, "r")
    manifest = {
        "format_version": FORMAT_VERSION,
        "samples": count,
        "dense": list(layout.dense),
        "tables": list(layout.tables),
        "rows": rows,
        "hots": layout.hots,
        "splits": splits,
        "options": asdict(options),
        "files": files,
    }
    write_last(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    figures = {"samples": count, "splits": {name: end - first for name, (first, end) in splits.items()}}
    return figures | {"tables": dict(zip(layout.tables, rows, strict=True)), "click_rate": float(clicked.mean())}


def _splits(stage: _Stage, options: Options) -> dict[str, tuple[int, int]]:
    """Ranges of samples: those of the files, and shares cut off the end of what the training files hold."""
    ends = stage.done["ends"]
    count = ends.get("train", 0)
    num_valid, num_test = round(options.valid_share * count), round(options.test_share * count)
    bounds = {"train": (0, count - num_valid - num_test)}
    if num_valid:
        bounds["valid"] = (bounds["train"][1], count - num_test)
    if num_test:
        bounds["test"] = (count - num_test, count)
    first = count
    for split in ("valid", "test"):
        if split in ends:
            bounds[split], first = (first, ends[split]), ends[split]
    return bounds


def _remap(
    stage: _Stage, table: int, provisional: Any, train: tuple[int, int], options: Options
) -> npt.NDArray[np.int32]:
    """The final id of every provisional one of a table: frequent values first, those below the cut-off 0."""
    size = int(provisional.max(initial=0)) + 1
    if options.maps:
        return np.arange(max(size, stage.vocabularies[table].count + 1), dtype=np.int32)
    if options.values != "map":
        return np.arange(size, dtype=np.int32)
    size = stage.vocabularies[table].count + 1
    counts = np.zeros(size, np.int64)
    for first in range(*train, REWRITE_ROWS):
        ids = provisional[first : min(first + REWRITE_ROWS, train[1])]
        counts += np.bincount(ids[ids >= 0], minlength=size)
    counts[NONE] = 0
    order = np.argsort(-counts, kind="stable")
    kept = order[counts[order] >= max(options.min_count, 1)][: options.max_rows - 1 if options.max_rows else None]
    remap = np.full(size, NONE, np.int32)
    remap[kept] = np.arange(1, len(kept) + 1)
    return remap


def _rewrite(path: Path, provisional: Sequence[Any], remaps: Sequence[npt.NDArray[np.int32]]) -> dict[str, Any]:
    with path.open("wb") as raw:
        file = Hashed(raw)
        for first in range(0, len(provisional[0]), REWRITE_ROWS):
            pieces = [ids[first : first + REWRITE_ROWS] for ids in provisional]
            final = np.hstack([np.where(ids < 0, ids, remap[ids]) for ids, remap in zip(pieces, remaps, strict=True)])
            file.write(np.ascontiguousarray(final, COLUMNS["ids"]))
        file.flush()
        os.fsync(raw.fileno())
        return file.fingerprint


def _write_maps(
    stage: _Stage, out: Path, layout: Layout, remaps: Sequence[npt.NDArray[np.int32]], options: Options
) -> dict[str, dict[str, Any]]:
    """The values of every table in the order of their ids; taken over where the import was by another's maps."""
    (out / "maps").mkdir(exist_ok=True)
    files = {}
    for column, name in enumerate(layout.tables):
        path = _map_file(out / "maps", name)
        if options.maps:
            shutil.copyfile(_map_file(Path(options.maps) / "maps", name), path)
        else:
            values = (stage.folder / f"{column}.txt").read_bytes().split(b"\n")[:-1]
            inverse = np.zeros(int(remaps[column].max()) + 1, np.int64)
            inverse[remaps[column]] = np.arange(len(remaps[column]))
            path.write_bytes(b"".join(values[place - 1] + b"\n" for place in inverse[1:]))
        files[f"maps/{path.name}"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return files


def _map_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '_')}.txt"


def write_last(path: Path, data: bytes) -> None:
    """Write a whole small file; a reader sees the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
