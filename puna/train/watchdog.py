"""The watchdog: a thread in every rank that tells where the rank stands, sees that a run hangs, and ends it.

RUN/watch/TOKEN/rank-N is a rank's heartbeat, one line, written anew at every mark and twice a second; rank-N.json is
the full account of a rank that does not move. Nothing is sent, so a rank that is stopped cannot hold up those that tell
of it. The run ends with one page, RUN/hang.txt. What counts as a hang:

- a rank of this machine that is stopped or dead, or any rank whose heartbeat is silent beyond the limit;
- ranks that all wait in collectives which can never meet: a proof, told after seconds whatever the limit;
- a step that takes longer than `run.hang_seconds`.

A rank that fails by another error than a PunaError tells of it in the same way, so that the page shows the others too.
"""

import faulthandler
import json
import os
import shutil
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import puna.errors
from puna.errors import Hung, PunaError
from puna.train import flight, launch, mesh
from puna.train.config import RunConfig
from puna.train.flight import Call
from puna.train.hang import Condition, Verdict, Witness, deadlocked, judge, page
from puna.train.heartbeat import Heartbeat, Peer, Pulse, machine, process_state, stacks
from puna.train.metrics import append_event
from puna.train.phase import LONG_PHASES, here

BEAT_SECONDS = 0.5
GONE_SECONDS = 1.0  # silence after which the process of a rank is looked at
STILL_SECONDS = 5.0  # without a mark or a collective, after which a rank gives a full account
COLLECT_SECONDS = 2.0  # for all ranks to give their accounts
PATIENCE_SECONDS = 15.0  # for the page, once a rank has begun it
LEAST_LIMIT_SECONDS = 120.0
STEPS_ALLOWED = 20  # times the median step
FIRST_LIMIT_SECONDS = 1_800.0  # for start, evaluation and checkpoint, and for steps while fewer than three are known
JUDGES = 2  # ranks that look at all others: the second one is for when the first is stopped
ACCOUNT_SECONDS = 2.0  # between accounts of one rank
FRESH_BEATS = 6  # age up to which an account counts


@dataclass(frozen=True)
class Account:
    """What a rank that does not move says of itself."""

    number: int  # of the heartbeat
    still: float  # seconds without a mark and without another collective
    witness: Witness


@contextmanager
def watch(run: Path, config: RunConfig) -> Iterator[None]:
    """Watch over what happens inside. Every rank enters it at the same time.

    One process alone is watched only where `run.hang_seconds` is set. Ends the process with Hung or RankFailed, which
    name the rank; RUN/hang.txt is the page, and a "hang" event is recorded.
    """
    if mesh.world_size() == 1 and not config.hang_seconds:
        yield
        return
    guard = Watch(Path(run), mesh.rank(), mesh.world_size(), config.hang_seconds)
    try:
        yield
    except PunaError as error:
        guard.close(f"{type(error).__name__}: {error}")
        raise
    except Exception as error:
        traceback.print_exc()
        if verdict := guard.fail(error):
            raise verdict from error
        raise
    guard.close("")


class Watch:
    """The heartbeat of this rank and its eye on the others. `limit_s`: longest step; 0: from the median step."""

    def __init__(self, run: Path, rank: int, size: int, limit_s: float) -> None:
        self.run, self.rank, self.size, self.limit_s = run, rank, size, limit_s
        self.folder = _folder(run)
        self._units: deque[float] = deque(maxlen=32)
        self._unit = here.unit
        self._unit_began = self._looked = self._round = time.monotonic()
        self._claimed = self._accounted = 0.0
        self._verdict: PunaError | None = None
        self._over, self._decided = threading.Event(), threading.Event()
        if size > 1:
            faulthandler.enable(self._fault(rank).open("w", encoding="utf-8"))
        launch.watched()
        self.machine = machine()
        here.since = time.monotonic()
        here.thread, here.changed = threading.get_ident(), self._marked
        self.pulse = Pulse(self._beat(rank), rank)
        self.pulse.beat()
        mesh.barrier()
        self.peers = {peer: Peer.at(self._beat(peer)) for peer in range(size) if peer != rank}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self, error: str) -> None:
        """This rank is done, in good order or with a PunaError."""
        here.changed = lambda: None
        self._over.set()
        self._thread.join()
        self.pulse.end("ended", error)

    def fail(self, error: Exception) -> PunaError | None:
        """Tell the others of an error that nobody foresaw; returns what to raise instead of it."""
        self.pulse.end("failed", f"{type(error).__name__}: {error}")
        self._decided.wait(PATIENCE_SECONDS)
        return self._verdict

    def _marked(self) -> None:
        if here.unit != self._unit:
            now = time.monotonic()
            self._units.append(now - self._unit_began)
            self._unit, self._unit_began = here.unit, now
        self.pulse.beat()

    # --- the thread ---

    def _watch(self) -> None:
        while not self._over.wait(BEAT_SECONDS) and not self._decided.is_set():
            with suppress(OSError):
                self._once(time.monotonic())

    def _once(self, now: float) -> None:
        self._forgive(now)
        self.pulse.number += 1
        self.pulse.beat()
        if (self.folder / "claim").exists():
            self._follow(now)
        elif self._hangs(now):
            self._convene(now)

    def _forgive(self, now: float) -> None:
        """Time in which this process did not run (stopped, suspended, starved) says nothing about any rank."""
        gap, self._round = now - self._round, now
        if gap > 4 * BEAT_SECONDS:
            here.since += gap
            for peer in self.peers.values():
                peer.seen += gap

    def _hangs(self, now: float) -> bool:
        if self.pulse.state == "failed" or now - here.since > self._limit(here.phases):
            return True
        still = self._still(now)
        if still:
            self._give(still)
        if self.rank >= JUDGES or now - self._looked < self.size / 100:
            return False
        self._look()
        conditions = self._conditions(now, GONE_SECONDS)
        if {"stopped", "dead", "silent"} & {*conditions.values()}:
            return True
        return still is not None and self._proof(still, conditions, now)

    def _proof(self, mine: Account, conditions: dict[int, Condition], now: float) -> bool:
        """Whether this rank waits for one that has ended, or all wait for each other."""
        ended = [rank for rank, condition in conditions.items() if condition == "ended"]
        if mine.witness.waits and any(now - self.peers[rank].seen > STILL_SECONDS for rank in ended):
            return True
        accounts = [self._account(rank) for rank in self.peers if rank not in ended]
        fresh = [a for a in accounts if a and self.peers[a.witness.rank].told.number - a.number <= FRESH_BEATS]
        if len(fresh) < len(accounts) or any(a.still < STILL_SECONDS for a in (*fresh, mine)):
            return False
        return deadlocked([mine.witness, *(a.witness for a in fresh)])

    def _limit(self, phases: list[str]) -> float:
        if not LONG_PHASES.isdisjoint(phases):
            return max(FIRST_LIMIT_SECONDS, self.limit_s)
        if self.limit_s:
            return self.limit_s
        if len(self._units) < 3:
            return FIRST_LIMIT_SECONDS
        return max(LEAST_LIMIT_SECONDS, STEPS_ALLOWED * statistics.median(self._units))

    def _still(self, now: float) -> Account | None:
        """A full account, where this rank has not moved for as long as would be strange."""
        least = max(STILL_SECONDS, 2 * statistics.median(self._units) if self._units else 0.0)
        if now - here.since < least or now - self._accounted < ACCOUNT_SECONDS:
            return None
        self._accounted = now
        calls = flight.calls()
        newest = max((call.began for call in calls), default=0.0)
        return Account(self.pulse.number, min(now - here.since, time.time() - newest), self._witness(calls))

    def _witness(self, calls: list[Call]) -> Witness:
        told = self.pulse.now()
        return replace(_of(told, told.state), calls=calls, stacks=stacks())

    def _give(self, account: Account) -> None:
        _put(self._given(self.rank), json.dumps(asdict(account), default=str))

    # --- the others ---

    def _look(self) -> None:
        self._looked = time.monotonic()
        for peer in self.peers.values():
            peer.look()

    def _conditions(self, now: float, patience: float) -> dict[int, Condition]:
        return {rank: self._condition(peer, now, patience) for rank, peer in self.peers.items()}

    def _condition(self, peer: Peer, now: float, patience: float) -> Condition:
        """What the rank says; where it has been silent for longer than `patience`, what its machine says."""
        told, silent = peer.told, now - peer.seen
        if told.state == "ended" or silent < patience:
            return told.state
        state = process_state(told.pid) if told.machine == self.machine else "?"
        if state in {"", "Z", "X"}:
            return "dead"
        if state == "T" and silent >= STILL_SECONDS:
            return "stopped"
        return "silent" if silent > self._limit([]) else told.state

    def _account(self, rank: int) -> Account | None:
        try:
            given = json.loads(self._given(rank).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        witness = given["witness"]
        calls = [Call(**call) for call in witness["calls"]]
        return Account(given["number"], given["still"], Witness(**(witness | {"calls": calls})))

    # --- the end ---

    def _convene(self, now: float) -> None:
        """Be the rank that tells; where another one was faster, it is followed in the next round."""
        try:
            os.close(os.open(self.folder / "claim", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        self._claimed = now
        self._look()
        witnesses = self._collect()
        verdict = judge(witnesses)
        path = write_page(self.run, verdict, witnesses)
        append_event(self.run, {"event": "hang", "ranks": list(verdict.guilty), "reason": str(verdict.error)})
        kind, words = type(verdict.error), f"{verdict.error}. The page is {path}"
        _put(self.folder / "verdict.json", json.dumps([kind.__name__, words]))
        self._leave(kind(words), speaks=True)

    def _collect(self) -> list[Witness]:
        """The accounts of all ranks that can give one, and for the others what is known."""
        end = time.monotonic() + COLLECT_SECONDS
        while self._to_come() and time.monotonic() < end:
            time.sleep(0.02)
        now = time.monotonic()
        conditions = self._conditions(now, 0)
        witnesses = {self.rank: self._witness(flight.calls())}
        for rank, peer in self.peers.items():
            account = self._account(rank) if self._final(rank).exists() else None
            witnesses[rank] = account.witness if account else self._absent(rank, conditions[rank], now - peer.seen)
        return [witnesses[rank] for rank in range(self.size)]

    def _to_come(self) -> bool:
        """Whether a rank that could give its account has not."""
        able = [r for r, c in self._conditions(time.monotonic(), 0).items() if c in {"running", "failed"}]
        return any(not self._final(rank).exists() for rank in able)

    def _absent(self, rank: int, condition: Condition, silent: float) -> Witness:
        """A rank that says nothing: its last heartbeat, and the stacks that a fatal signal may have left."""
        last = _of(self.peers[rank].told, condition)
        return replace(last, seconds=last.seconds + silent, stacks=self._fault(rank).read_text(encoding="utf-8"))

    def _follow(self, now: float) -> None:
        """Give a full account once, then end as the rank that tells has decided."""
        self._claimed = self._claimed or now
        if not self._final(self.rank).exists():
            self._give(Account(self.pulse.number, 0.0, self._witness(flight.calls())))
            self._final(self.rank).touch()
        verdict = self.folder / "verdict.json"
        if verdict.exists():
            kind, words = json.loads(verdict.read_text(encoding="utf-8"))
            self._leave(getattr(puna.errors, kind)(words), speaks=False)
        elif now - self._claimed > PATIENCE_SECONDS:
            self._leave(Hung(f"a rank saw that the run hangs but did not come to tell; see {self.folder}"), speaks=True)

    def _leave(self, error: PunaError, *, speaks: bool) -> None:
        """End this process, whose main thread may never come back; one that has failed and waits ends by itself."""
        self._verdict = error
        self._decided.set()
        if self.pulse.state == "failed":
            return
        if not launch.tell(error) and speaks:
            print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)

    # --- files ---

    def _beat(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}"

    def _given(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _final(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.final"

    def _fault(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.fault"


def write_page(run: Path, verdict: Verdict, witnesses: list[Witness]) -> Path:
    """Write RUN/hang.txt, in place of an older one."""
    path = Path(run) / "hang.txt"
    title = f"{run}, {len(witnesses)} ranks, ended at {time.strftime('%Y-%m-%d %H:%M:%S')}"
    _put(path, page(verdict, witnesses, title))
    return path


def _of(told: Heartbeat, condition: Condition) -> Witness:
    same = ("rank", "role", "host", "pid", "phase", "unit", "seconds", "samples", "error")
    return Witness(condition=condition, **{name: getattr(told, name) for name in same})


def _folder(run: Path) -> Path:
    """A new folder for this start of the run, the same on every rank; those of earlier starts are dropped."""
    folder = run / "watch" / mesh.from_rank_0(os.urandom(4).hex())
    if mesh.rank() == 0:
        for old in (run / "watch").glob("*/"):
            shutil.rmtree(old)
        folder.mkdir(parents=True)
    mesh.barrier()
    return folder


def _put(path: Path, text: str) -> None:
    """In one piece or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
