"""Kill torture: training runs that are killed over and over must each end where the undisturbed run ends, bit for bit.

    python bench/torture.py --kills 200 --json

Two processes train a tiny Llama on the standard library's own text, with a checkpoint every 4 steps; half of the runs
save aside. A run is killed (SIGKILL) up to eight times, then left to finish. Each kill is one of

    instant  at a random time after the start
    write    inside a save: in the middle of a data file, at an fsync, before or after a rename, while an old checkpoint
             is being removed. A hook stops the rank there, so that it is so when the kill comes
    full     as write, on a disk that has been full since the start: no file may grow beyond a limit (RLIMIT_FSIZE, so
             that the save fails with EFBIG half-way through a data file), and the kill comes as the save is undone

and takes all ranks or one; a rank that is left over has to end by itself. After a kill every complete checkpoint is
hashed. `identical` counts the kills of runs all of whose steps, those done twice included, have the reference's losses,
and whose last checkpoint has its tensors. Choices come from the seed; instants depend on the machine. A bench that was
stopped goes on where it was, run by run.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import puna.run
from puna import recipe
from puna.console import bar
from puna.corpus.bpe import train_tokenizer
from puna.corpus.build import build_corpus
from puna.corpus.tokenize import tokenize_corpus
from puna.errors import CheckpointError
from puna.train import checkpoint
from puna.train.hashed import Hashed
from puna.train.launch import die_with
from puna.train.manifest import complete_steps, folder_of, read_manifest
from puna.train.metrics import last_steps, read_events

NUM_RANKS, NUM_STEPS, EVERY = 2, 40, 4
RECIPE = ["--train.tokens", str(NUM_STEPS * 1024), "--checkpoint.every", str(EVERY), "--eval.tokens", "0"]
KILLS_PER_RUN = 8
FULL_BYTES = 400_000  # no file grows beyond this on a full disk; a rank's data file is larger, the records are smaller
END_SECONDS = 30.0
SITES = {"data": 2500, "fsync": 14, "rename": 4, "renamed": 4, "remove": 6}  # where a save is stopped: at most how late

context = get_context("forkserver")
context.set_forkserver_preload(["puna.run", "torch.distributed.fsdp", "torch._dynamo"])


@dataclass
class Kill:
    """One kill and what came of it."""

    kind: str
    victims: list[int]
    site: str = ""
    inside: bool = False  # a save
    lost_seconds: float = 0.0  # of work: from the state that is left to the kill
    lost_steps: int = 0
    stuck: bool = False  # a rank that was left over did not end by itself
    unreadable: list[str] = field(default_factory=list)


# --- what a rank does


def work(run: str, rank: int, store: str, hook: str, end: Connection) -> None:
    """One rank of a run; `hook` is SITE:NUMBER, where it tells the parent and waits."""
    die_with(os.getppid())
    log = os.open(Path(run).parent / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS), "PUNA_STORE": store}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if hook:
        site, _, number = hook.partition(":")
        stop_at(site, int(number), end)
    puna.run.work(run)


def stop_at(site: str, number: int, end: Connection) -> None:
    """At the `number`-th call of what `site` means, say so and wait until the parent answers."""
    owner, name, before = {
        "data": (Hashed, "write", True),
        "fsync": (os, "fsync", True),
        "rename": (os, "replace", True),
        "renamed": (os, "replace", False),
        "remove": (os, "unlink", True),
        "undo": (checkpoint, "_remove", True),
    }[site]
    act: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*words: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == number
        if now and before:
            _hold(end)
        result = act(*words, **named)
        if now and not before:
            _hold(end)
        return result

    setattr(owner, name, counted)


def _hold(end: Connection) -> None:
    end.send("here")
    end.recv()


# --- one attempt


def start(run: Path, hooked: int, hook: str) -> tuple[list[BaseProcess], Connection]:
    """The ranks of an attempt, and the line to the one that has a hook."""
    here, there = context.Pipe()
    store = str(run.parent / f"store-{os.urandom(4).hex()}")
    processes = [
        context.Process(target=work, args=(str(run), rank, store, hook if rank == hooked else "", there))
        for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    return list(processes), here


def finish(processes: list[BaseProcess]) -> list[int | None]:
    """Exit codes by rank; those that do not end are killed, and are None."""
    deadline = time.monotonic() + END_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
        process.close()
    return codes


def attempt(run: Path, kill: Kill, hooked: int, hook: str, seconds: float) -> list[int | None] | None:
    """Start the run and kill it as planned; the exit codes where it ended before that, else None."""
    num_events = len(read_events(run))
    processes, line = start(run, hooked, hook)
    if kill.kind == "full":
        for process in processes:
            resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))
    ends = [process.sentinel for process in processes]
    if kill.kind == "instant" and len(kill.victims) == 1:
        await_first_event(run, num_events)  # before that a rank would wait for the others to appear
    came = wait([*ends, line], seconds if kill.kind == "instant" else END_SECONDS)
    if any(end in came for end in ends):
        return finish(processes)
    kill.inside = line in came
    for rank in kill.victims:
        processes[rank].kill()
    at = time.time()
    with suppress(OSError):  # the rank may be gone
        line.send("go on")
    kill.stuck = None in finish(processes)
    kill.lost_steps, kill.lost_seconds = lost(run, at, read_events(run)[num_events:])
    kill.unreadable = [problem for step in complete_steps(run) if (problem := unreadable(run, step))]
    return None


def await_first_event(run: Path, num_events: int) -> None:
    """Until this attempt has told something."""
    deadline = time.monotonic() + END_SECONDS
    while len(read_events(run)) == num_events and time.monotonic() < deadline:
        time.sleep(0.005)


def lost(run: Path, at: float, mine: list[dict[str, Any]]) -> tuple[int, float]:
    """Steps and seconds of work that a kill at the time `at` took: what the attempt did after the state left."""
    left = complete_steps(run)[-1] if complete_steps(run) else 0
    reached = [e["time"] for e in mine if e["event"] in ("step", "resume") and e["step"] == left]
    began = [e["time"] for e in mine if e["event"] == "step"]
    since = reached[0] if reached else began[0] if began else at
    return sum(e["event"] == "step" and e["step"] > left for e in mine), max(0.0, at - since)


def unreadable(run: Path, step: int) -> str:
    """What is wrong with a checkpoint; empty where nothing is."""
    try:
        checkpoint.verify(run, step)
    except CheckpointError as error:
        return str(error)
    return ""


# --- one run


def prepare(run: Path, shards: Path, *, asynchronous: bool) -> None:
    """A run directory that ranks can work in."""
    aside = ["--checkpoint.asynchronous", str(asynchronous).lower()]
    puna.run.prepare(recipe.load("tiny", ["--run.dir", str(run), "--data.path", str(shards), *RECIPE, *aside]), run)


def plan(rng: random.Random) -> tuple[Kill, int, str]:
    """A kill, the rank that has a hook, the hook."""
    kind = rng.choices(["instant", "write", "full"], [0.4, 0.45, 0.15])[0]
    alone = rng.random() < 0.5
    site = {"instant": "", "write": rng.choice(list(SITES)), "full": "undo"}[kind]
    hooked = rng.randrange(NUM_RANKS) if site == "data" else 0
    hook = f"{site}:{rng.randint(1, SITES.get(site, 1))}" if site else ""
    victim = hooked if site and rng.random() < 0.7 else rng.randrange(NUM_RANKS)
    return Kill(kind, [victim] if alone else list(range(NUM_RANKS)), hook), hooked, hook


def torture(
    folder: Path, shards: Path, number: int, seed: int, num_kills: int, reference: "Reference"
) -> tuple[list[Kill], list[int | None]]:
    """A run that is killed up to `num_kills` times and then left to finish: the kills, and its last exit codes."""
    rng = random.Random(f"{seed}/{number}")
    run = folder / f"run-{number:03d}" / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    prepare(run, shards, asynchronous=number % 2 == 1)
    kills: list[Kill] = []
    for _ in range(num_kills):
        kill, hooked, hook = plan(rng)
        if codes := attempt(run, kill, hooked, hook, rng.uniform(0, 0.6 * reference.seconds)):
            return kills, codes
        kills.append(kill)
    return kills, finish(start(run, 0, "")[0])


@dataclass(frozen=True)
class Reference:
    """The run that nobody disturbs."""

    losses: dict[int, float]
    tensors: dict[str, torch.Tensor]
    seconds: float
    bytes: int  # of a rank's data file


def is_identical(run: Path, reference: Reference) -> bool:
    """Whether every step that was ever done has the reference's loss, all were done, and the end is the same state."""
    steps = [event for event in read_events(run) if event["event"] == "step"]
    same_losses = all(event["loss"] == reference.losses[event["step"]] for event in steps)
    found = final_tensors(run)
    same_end = found.keys() == reference.tensors.keys() and all(
        torch.equal(tensor, reference.tensors[key]) for key, tensor in found.items()
    )
    return same_losses and same_end and last_steps(read_events(run)).keys() == reference.losses.keys()


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    manifest = read_manifest(run)
    tensors = {key: torch.full(shape, math.nan) for key, shape in manifest.tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = dcp.FileSystemReader(folder_of(run, manifest.cursor.units) / "tensors")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def refer(folder: Path, shards: Path) -> Reference:
    """Run it once, undisturbed."""
    run = folder / "reference" / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    prepare(run, shards, asynchronous=False)
    first = context.Process(target=time.sleep, args=(0,))  # the server imports torch before it
    first.start()
    first.join()
    began = time.monotonic()
    codes = finish(start(run, 0, "")[0])
    seconds = time.monotonic() - began
    assert codes == [0] * NUM_RANKS, f"the reference ended with {codes}; see {run.parent}/rank-0.log"
    losses = {step: event["loss"] for step, event in last_steps(read_events(run)).items()}
    files = read_manifest(run).files
    smallest = min(entry["bytes"] for name, entry in files.items() if name.endswith(".distcp"))
    assert smallest > FULL_BYTES, f"a data file of {smallest} bytes does not meet a limit of {FULL_BYTES}"
    return Reference(losses, final_tensors(run), seconds, smallest)


def make_shards(folder: Path) -> Path:
    """Token shards of two packages of the standard library."""
    if not (folder / "shards" / "shards.json").exists():
        shutil.rmtree(folder / "source", ignore_errors=True)
        (folder / "source").mkdir(parents=True)
        for package in ("json", "email"):
            for path in sorted((Path(sysconfig.get_path("stdlib")) / package).glob("*.py")):
                shutil.copy(path, folder / "source" / f"{package}_{path.name}")
        build_corpus(str(folder / "source"), folder / "corpus", heldout=0.1)
        train_tokenizer(folder / "corpus", 512, folder / "tokenizer.json")
        tokenize_corpus(folder / "corpus", folder / "tokenizer.json", folder / "shards")
    return folder / "shards"


# --- the whole


def main(num_kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill so many times; figures over all runs."""
    folder = folder.resolve() / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    shards = make_shards(folder)
    results = folder / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    reference = refer(folder, shards)
    with bar() as progress:
        task = progress.add_task("kills", total=num_kills, completed=sum(len(result["kills"]) for result in done))
        while (so_far := sum(len(result["kills"]) for result in done)) < num_kills:
            number = len(done)
            kills, codes = torture(folder, shards, number, seed, min(KILLS_PER_RUN, num_kills - so_far), reference)
            run = folder / f"run-{number:03d}" / "run"
            done.append(
                {
                    "run": number,
                    "codes": codes,
                    "identical": codes == [0] * NUM_RANKS and is_identical(run, reference),
                    "interval_seconds": intervals(run),
                    "kills": [asdict(kill) for kill in kills],
                }
            )
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
            progress.update(task, completed=so_far + len(kills))
    return figures(done, reference)


def intervals(run: Path) -> list[float]:
    """Seconds from the state of a checkpoint until the next checkpoint exists, as far as the run got there."""
    found, reached = [], {}
    for event in read_events(run):
        if event["event"] in ("start", "resume"):
            reached = {event.get("step", 0): event["time"]}
        elif event["event"] == "step":
            reached[event["step"]] = event["time"]
        elif event["event"] == "checkpoint" and event["step"] - EVERY in reached:
            found.append(event["time"] - reached[event["step"] - EVERY])
    return found


def figures(done: list[dict[str, Any]], reference: Reference) -> dict[str, Any]:
    """Kills counted by kind, victims and outcome."""
    kills = [kill | {"run": result["run"]} for result in done for kill in result["kills"]]
    bad = {result["run"] for result in done if not result["identical"]}
    return {
        "kills": len(kills),
        "identical": sum(kill["run"] not in bad for kill in kills),
        "unreadable": sum(bool(kill["unreadable"]) for kill in kills),
        "max_lost_seconds": round(max((kill["lost_seconds"] for kill in kills), default=0.0), 3),
        "detail": {
            "interval_steps": EVERY,
            "at_once": lost_and_interval(done, 0),
            "aside": lost_and_interval(done, 1),
            "by_kind": {kind: sum(k["kind"] == kind for k in kills) for kind in ("instant", "write", "full")},
            "by_site": {site: sum(k["site"].startswith(f"{site}:") for k in kills) for site in (*SITES, "undo")},
            "inside_a_save": sum(kill["inside"] for kill in kills),
            "one_rank": sum(len(kill["victims"]) == 1 for kill in kills),
            "ranks_stuck": sum(kill["stuck"] for kill in kills),
            "runs": len(done),
            "steps": NUM_STEPS,
            "reference_seconds": round(reference.seconds, 2),
            "full_disk": f"RLIMIT_FSIZE of {FULL_BYTES} bytes; a rank's data file has {reference.bytes}",
        },
    }


def lost_and_interval(done: list[dict[str, Any]], parity: int) -> dict[str, float]:
    """Most that a kill cost, and the longest time from a saved state to the next checkpoint, of runs of this parity."""
    mine = [result for result in done if result["run"] % 2 == parity]
    kills = [kill for result in mine for kill in result["kills"]]
    return {
        "kills": len(kills),
        "max_lost_steps": max((kill["lost_steps"] for kill in kills), default=0),
        "max_lost_seconds": round(max((kill["lost_seconds"] for kill in kills), default=0.0), 3),
        "max_interval_seconds": round(max((s for result in mine for s in result["interval_seconds"]), default=0.0), 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=Path("runs/torture"), help="results are kept here, run by run")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on stdout")
    options = parser.parse_args()
    result = main(options.kills, options.seed, options.dir)
    print(json.dumps(result, indent=None if options.json else 1))
    sys.exit(0 if result["identical"] == result["kills"] and not result["unreadable"] else 1)
