"""Why a run hangs: what is known of every rank becomes one sentence that names a rank, and one page."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from puna.errors import Hung, PunaError, RankFailed
from puna.train.flight import Call

Condition = Literal["running", "stopped", "dead", "silent", "ended", "failed"]

RANKS_SHOWN = 16
CALLS_SHOWN = 4
WORLD = "default_pg"  # how PyTorch calls the group that every rank is in


@dataclass(frozen=True)
class Witness:
    """What is known of one rank."""

    rank: int
    role: str
    host: str
    pid: int
    condition: Condition
    phase: str  # "collective in forward/backward"
    unit: int  # units of work done
    seconds: float  # in this phase
    samples: Sequence[Any] = ()
    calls: Sequence[Call] = ()  # newest last
    stacks: str = ""
    error: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.role}, process {self.pid} on {self.host})"

    @property
    def waits(self) -> Call | None:
        """The oldest collective that it has begun and that is not over."""
        return next((call for call in self.calls if call.waits), None)

    @property
    def place(self) -> str:
        """Phase and step in words."""
        return f"{self.phase}, step {self.unit + 1}"


@dataclass(frozen=True)
class Verdict:
    """The ranks that the others wait for, and the error that ends the run."""

    guilty: tuple[int, ...]
    error: PunaError


def judge(witnesses: Sequence[Witness]) -> Verdict:
    """Name the rank that is to blame. One that differs from the others comes before one that died of it."""
    for find in (_odd_one_out, _gone, _mistaken, _failed, _ended, _elsewhere, _behind):
        if verdict := find(witnesses):
            return verdict
    longest = max(witnesses, key=lambda w: w.seconds)
    return Verdict(
        (), Hung(f"no rank differs from the others; the one that waits longest is {longest}, in {_doing(longest)}")
    )


def deadlocked(witnesses: Sequence[Witness]) -> bool:
    """Whether the ranks wait, each in a collective, and can never meet: a proof, however little time has passed."""
    return all(w.waits for w in witnesses) and bool(_odd_one_out(witnesses) or _behind(witnesses))


def _odd_one_out(witnesses: Sequence[Witness]) -> Verdict | None:
    """A rank whose collective is not that of the others: it has left one out, or made one too many."""
    calls = _first_difference(witnesses) or {w.rank: w.waits for w in witnesses if w.condition == "running" and w.waits}
    known = {w.rank: w for w in witnesses}
    odd = _minority({rank: f"{call.group} {call.what}" for rank, call in calls.items()}, known)
    if not odd:
        return None
    told = [f"{known[rank]} made {_named(calls[rank])}, in {known[rank].place}" for rank in odd]
    others = [rank for rank in calls if rank not in odd]
    if others:
        told.append(f"{_ranks(others)} made {_named(calls[others[0]])}, in {known[others[0]].place}")
    return Verdict(odd, Hung("the ranks do not make the same collectives: " + "; ".join(told)))


def _first_difference(witnesses: Sequence[Witness]) -> dict[int, Call]:
    """Of the first collective that the ranks' records tell differently, each rank's call; empty where there is none."""
    for group in dict.fromkeys(call.group for w in witnesses for call in w.calls):
        records = {w.rank: {c.number: c for c in w.calls if c.group == group} for w in witnesses}
        records = {rank: record for rank, record in records.items() if record}
        first = max(min(record) for record in records.values())
        last = max(max(record) for record in records.values())
        for number in range(first, last + 1):
            calls = {rank: record[number] for rank, record in records.items() if number in record}
            if len({call.what for call in calls.values()}) > 1:
                return calls
    return {}


def _minority(signatures: Mapping[int, str], known: Mapping[int, Witness]) -> tuple[int, ...]:
    """The ranks that are not as most are; where there are as many of each, those ahead of the others, or all."""
    counts = Counter(signatures.values()).most_common(2)
    if len(counts) < 2:
        return ()
    if counts[0][1] > counts[1][1]:
        return tuple(rank for rank, signature in signatures.items() if signature != counts[0][0])
    units = {rank: known[rank].unit for rank in signatures}
    ahead = tuple(rank for rank, unit in units.items() if unit == max(units.values()))
    return ahead if len(ahead) < len(units) else tuple(units)


def _gone(witnesses: Sequence[Witness]) -> Verdict | None:
    words = {
        "stopped": "is stopped (SIGSTOP), last seen in",
        "dead": "died, last seen in",
        "silent": "says nothing any more (its machine or file system is gone, or a debugger holds it), last seen in",
    }
    gone = [w for w in witnesses if w.condition in words]
    dead = any(w.condition == "dead" for w in gone)
    return _blame(gone, lambda w: f"{words[w.condition]} {_doing(w)}", RankFailed if dead else Hung)


def _mistaken(witnesses: Sequence[Witness]) -> Verdict | None:
    """Ranks that ended with an error of their own; what the others raise then is that their connections are lost."""
    mistaken = [w for w in witnesses if w.condition == "ended" and w.error]
    return _blame(mistaken, lambda w: f"has ended ({w.error}) and the others wait for it", Hung)


def _failed(witnesses: Sequence[Witness]) -> Verdict | None:
    failed = [w for w in witnesses if w.condition == "failed"]
    return _blame(failed, lambda w: f"failed in {w.place}: {w.error}", RankFailed)


def _ended(witnesses: Sequence[Witness]) -> Verdict | None:
    ended = [w for w in witnesses if w.condition == "ended"]
    return _blame(ended, lambda w: "has ended in good order and the others wait for it", Hung)


def _elsewhere(witnesses: Sequence[Witness]) -> Verdict | None:
    """Ranks that are not in a collective although others wait in one."""
    busy = [w for w in witnesses if not w.waits]
    if 1 < len(busy) == len(witnesses):
        return None
    return _blame(busy, lambda w: f"has been in {_doing(w)}", Hung)


def _behind(witnesses: Sequence[Witness]) -> Verdict | None:
    """Ranks that have not come to a collective of all ranks that others wait in."""
    newest = {w.rank: max((c.number for c in w.calls if c.group.startswith(WORLD)), default=-1) for w in witnesses}
    awaited = [w.waits.number for w in witnesses if w.waits and w.waits.group.startswith(WORLD)]
    late = [w for w in witnesses if awaited and newest[w.rank] < max(awaited)]
    return _blame(late, lambda w: f"is behind the others, in {_doing(w)}", Hung)


def _blame(ranks: list[Witness], words: Callable[[Witness], str], kind: type[PunaError]) -> Verdict | None:
    if not ranks:
        return None
    alike: dict[str, list[Witness]] = {}
    for w in ranks:
        alike.setdefault(words(w), []).append(w)
    told = [f"{who[0] if len(who) == 1 else _ranks([w.rank for w in who])} {text}" for text, who in alike.items()]
    more = f" (and {len(told) - 4} more)" if len(told) > 4 else ""
    return Verdict(tuple(w.rank for w in ranks), kind("; ".join(told[:4]) + more))


def _doing(witness: Witness) -> str:
    return f"{witness.place} for {witness.seconds:.0f} s"


def _named(call: Call) -> str:
    return f"{call.what} (call {call.number} of {call.group})"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


# --- the page -------------------------------------------------------------------------------------------------------


def page(verdict: Verdict, witnesses: Sequence[Witness], title: str) -> str:
    """One page of plain text: the sentence, a line a rank, then samples, collectives and stacks, alike ones once."""
    first = sorted(witnesses, key=lambda w: (w.rank not in verdict.guilty, w.rank))[:RANKS_SHOWN]
    left_out = len(witnesses) - len(first)
    parts = [title, "", f"{verdict.error}", "", *_table(first, verdict.guilty)]
    if left_out:
        parts.append(f"... and {left_out} more ranks")
    sections = (("samples", _samples), ("errors", _error), ("newest collectives", _calls), ("stacks", _stacks))
    for name, tell in sections:
        parts += ["", f"--- {name}", *_alike(first, tell)]
    return "\n".join(parts) + "\n"


def _table(witnesses: Sequence[Witness], guilty: tuple[int, ...]) -> list[str]:
    rows = [("", "rank", "role", "host", "process", "condition", "step", "seconds", "phase", "waits in")]
    for w in witnesses:
        mark = ">" if w.rank in guilty else ""
        where = (str(w.unit + 1), f"{w.seconds:.1f}", w.phase, _named(w.waits) if w.waits else "-")
        rows.append((mark, str(w.rank), w.role, w.host, str(w.pid), w.condition, *where))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _alike(witnesses: Sequence[Witness], tell: Callable[[Witness], str]) -> list[str]:
    """What each rank tells, said once for ranks that tell the same."""
    ranks: dict[str, list[int]] = {}
    for w in witnesses:
        ranks.setdefault(tell(w), []).append(w.rank)
    return [f"{_ranks(who)}:\n{_indented(text or 'not known')}" for text, who in ranks.items()]


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _samples(witness: Witness) -> str:
    return ", ".join(map(str, witness.samples))


def _error(witness: Witness) -> str:
    return witness.error or "none"


def _calls(witness: Witness) -> str:
    return "\n".join(f"{_named(call)}{' WAITS' if call.waits else ''}" for call in witness.calls[-CALLS_SHOWN:])


def _stacks(witness: Witness) -> str:
    return witness.stacks
