"""Do all ranks run the same thing? Asked when they meet and in the first steps; later steps pay nothing for it.

A rank with another recipe, other code, other samples or other weights trains a model that nobody asked for, mostly
without an error. So before the first step the ranks compare recipe and code; before each of the first steps after a
start or a resume, the samples they were dealt and what must be equal of their state: replicas of parameters, of
optimiser states and of averages, bit for bit.
"""

import hashlib
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import puna
from puna.errors import RanksDiffer
from puna.train import mesh
from puna.train.optim import local
from puna.train.task import Cursor, Json, State, Task, Tensors

STEPS_CHECKED = 3
TOLD = 5  # differences that are told
PIECE = 1 << 22  # words of which a checksum is taken at a time


class FirstSteps:
    """Compares the ranks before each of the first steps; afterwards it costs one comparison of two integers."""

    def __init__(self, run: Path, task: Task) -> None:
        self._run, self._task, self._left = run, task, STEPS_CHECKED

    def check(self, cursor: Cursor, unit: Any) -> None:
        """Raise RanksDiffer where the ranks were dealt samples twice, or hold other weights than their replicas."""
        if not self._left or mesh.world_size() == 1:
            return
        self._left -= 1
        when = f"before step {cursor.units + 1}"
        done = {"units done": cursor.units, "tokens done": cursor.tokens, "tokens passed over": cursor.skipped}
        require_same(self._run, done, when)
        require_disjoint(self._run, self._task.samples(unit), when)
        require_replicas(self._run, self._task.state(), when)


def require_same(run: Path, facts: Mapping[str, Any], when: str) -> None:
    """Raise RanksDiffer unless every rank has the same facts, which travel only where they differ."""
    if len(set(mesh.gather(_digest(facts)))) == 1:
        return
    everyone = mesh.gather(dict(facts))
    keys = sorted({key for theirs in everyone for key in theirs})
    odd: dict[int, list[str]] = {}
    for key in keys:
        values = [repr(theirs.get(key, "nothing")) for theirs in everyone]
        usual = Counter(values).most_common(1)[0][0]
        for rank, value in enumerate(values):
            if value != usual:
                odd.setdefault(rank, []).append(f"{key} is {value}, and {usual} on {_others(values, usual)}")
    _refuse(run, odd, when)


def require_disjoint(run: Path, samples: Sequence[Any], when: str) -> None:
    """Raise RanksDiffer unless the ranks' samples of a step are as many and none is another rank's too."""
    texts = [str(sample) for sample in samples]
    shares = mesh.gather(texts)
    owner: dict[str, int] = {}
    odd: dict[int, list[str]] = {}
    usual = Counter(map(len, shares)).most_common(1)[0][0]
    for rank, share in enumerate(shares):
        if len(share) != usual:
            odd.setdefault(rank, []).append(f"it was dealt {len(share)} samples, most ranks {usual}")
        if twice := [sample for sample in share if owner.setdefault(sample, rank) != rank]:
            first = f"sample {twice[0]} is also rank {owner[twice[0]]}'s"
            odd.setdefault(rank, []).append(f"{len(twice)} of its {len(share)} samples are another rank's: {first}")
    _refuse(run, odd, when)


def require_replicas(run: Path, state: State, when: str) -> None:
    """Raise RanksDiffer unless ranks that hold the same piece of a tensor, or the same JSON, hold the same bits."""
    held = checksums(state)
    digests = mesh.gather({piece: _digest(sums) for piece, sums in held.items()})
    if all(len(set(same)) == 1 for same in _by_key(digests).values()):
        return
    odd: dict[int, list[str]] = {}
    flat = [
        {(piece, name): value for piece, sums in theirs.items() for name, value in sums.items()}
        for theirs in mesh.gather(held)
    ]
    for (piece, name), values in _by_key(flat).items():
        usual = Counter(values).most_common(1)[0][0]
        for rank, theirs in enumerate(flat):
            if theirs.get((piece, name), usual) != usual:
                odd.setdefault(rank, []).append(f"{name} has other bits than on the ranks that hold a copy of it")
    _refuse(run, odd, when)


def checksums(state: State) -> dict[str, dict[str, int]]:
    """Of every tensor and JSON state a checksum, by the piece that this rank holds: "" where it is a whole."""
    held: dict[str, dict[str, int]] = {}
    for name, item in state.items():
        if isinstance(item, Tensors):
            for key, tensor in item.get().items():
                held.setdefault(_piece(tensor), {})[f"{name}.{key}"] = checksum(local(tensor))
        elif isinstance(item, Json):
            held.setdefault("", {})[name] = int(_digest({"": item.get()}), 16)
    return held


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A 64-bit sum of the tensor's bits, each word weighed by its place, so that exchanged values are seen too."""
    flat = tensor.contiguous().view(-1)
    words = flat.view(torch.int32 if flat.numel() * flat.element_size() % 4 == 0 else torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), PIECE):
        piece = words[start : start + PIECE].to(torch.int64)
        places = torch.arange(start, start + piece.numel(), device=words.device)
        total += (piece * (places * 0x9E3779B1 % 0xFFFFFFFB + 1)).sum()
    return int(total)


def code_version() -> dict[str, str]:
    """What runs: versions, and a hash of this package's own files."""
    folder = Path(puna.__file__).parent
    source = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        source.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    versions = {"torch": torch.__version__, "puna": puna.__version__}
    return versions | {"puna's files": source.hexdigest()[:16]}


def _piece(tensor: Tensor) -> str:
    """Names the piece of a sharded tensor that this rank holds; ranks that differ in replicated axes hold the same."""
    if not isinstance(tensor, DTensor):
        return ""
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or []
    shards = zip(tensor.placements, coordinate, strict=True)
    return ",".join(f"{place}{at}" for place, at in shards if not place.is_replicate())


def _by_key(everyone: Sequence[Mapping[Any, Any]]) -> dict[Any, list[Any]]:
    values: dict[Any, list[Any]] = {}
    for theirs in everyone:
        for key, value in theirs.items():
            values.setdefault(key, []).append(value)
    return values


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:16]


def _others(values: list[str], usual: str) -> str:
    ranks = [str(rank) for rank, value in enumerate(values) if value == usual]
    more = f" and {len(ranks) - TOLD} more" if len(ranks) > TOLD else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks[:TOLD])}{more}"


def _refuse(run: Path, odd: dict[int, list[str]], when: str) -> None:
    """Raise RanksDiffer on every rank, with RUN/hang.txt written by the first; nothing where no rank is odd."""
    if not odd:
        return
    places = mesh.gather(f"{mesh.role().name}, process {os.getpid()} on {socket.gethostname()}")
    lines = [f"rank {rank} ({places[rank]}): {difference}" for rank, told in odd.items() for difference in told]
    more = f"; and {len(lines) - TOLD} more differences" if len(lines) > TOLD else ""
    path = run / "hang.txt"
    if mesh.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        heading = f"{run}, {mesh.world_size()} ranks, ended at {time.strftime('%Y-%m-%d %H:%M:%S')}"
        head = [heading, "", f"The ranks do not run the same thing, {when}:", ""]
        path.write_text(
            "\n".join([*head, *lines[:100], "", "All ranks:", *map(_numbered, enumerate(places))]) + "\n",
            encoding="utf-8",
        )
    raise RanksDiffer(f"the ranks differ {when}: {'; '.join(lines[:TOLD])}{more}. The page is {mesh.from_rank_0(path)}")


def _numbered(place: tuple[int, str]) -> str:
    return f"rank {place[0]}: {place[1]}"
