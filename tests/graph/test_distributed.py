"""Trainers in several processes: they reach what one reaches, and one that is killed costs its bucket."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from trainers import NUM_HELD_OUT, VALUES, Assembled, alone, communities, job, meet, num_edges, together

from puna.errors import DeviceError, NonFinite, RankFailed, RanksDiffer
from puna.graph.door import Door, Event, Guest
from puna.graph.graph import Graph
from puna.graph.links import JOIN_SECONDS, Link, Lost, Meeting
from puna.graph.locks import Locks
from puna.graph.parameters import ParameterServer, SharedParameters
from puna.graph.serving import GraphServer
from puna.graph.task import GraphTask
from puna.graph.trainer import train
from puna.train import checkpoint
from puna.train.metrics import last_steps, read_events
from puna.train.task import Cursor

EPOCHS = 20
EDGES = num_edges(5)
MARGIN = 0.01  # of the MRR


@pytest.fixture(autouse=True)
def _loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Graph:
    return communities(tmp_path_factory.mktemp("communities"), 5)


@pytest.fixture(scope="module")
def single(graph, tmp_path_factory):
    """One process and one worker."""
    return alone(graph, tmp_path_factory.mktemp("single"), epochs=EPOCHS)


def mrr(task):
    return task.evaluate("heldout")["mrr"]


def learnt(task):
    """All squares of gradients that nodes and relations have met: what is lost to another's write is missing here."""
    task.table.flush()
    nodes = sum(task.table.fetch(part).sums.sum(dtype=float) for part in range(task.config.num_partitions))
    return nodes, sum(side.sums.sum(dtype=float) for side in task.relations)


def require_as_good(task, single):
    assert abs(mrr(task) - mrr(single)) <= MARGIN
    require_learnt(task, single)


def require_learnt(task, single):
    nodes, relations = (ours / theirs for ours, theirs in zip(learnt(task), learnt(single), strict=True))
    assert nodes > 0.85
    assert relations > 0.6


def events_of(run, *kinds):
    return [event for event in read_events(run) if event["event"] in kinds]


def test_two_trainers_reach_what_one_process_does(graph, single, tmp_path):
    task, codes = together(graph, tmp_path, epochs=EPOCHS, every=16)
    assert codes == [0, 0]
    steps = last_steps(read_events(tmp_path))
    assert len(steps) == 16 * EPOCHS
    assert steps[max(steps)]["tokens"] == EDGES * EPOCHS
    assert {step["trainers"] for step in steps.values()} <= {1, 2}
    assert sum(step["swaps"] for step in steps.values()) < 0.9 * len(steps)
    assert len(events_of(tmp_path, "trainer_joined")) == 2
    assert not events_of(tmp_path, "trainer_gone")
    require_as_good(task, single)
    checkpoint.verify(tmp_path)


def test_a_trainer_that_is_killed_costs_its_bucket(graph, single, tmp_path):
    """Its bucket, trained but not given back, is trained by the other one, from the vectors before it."""
    task, codes = together(graph, tmp_path, deaths=(0, 3), epochs=EPOCHS)
    assert codes == [0, -signal.SIGKILL]
    (gone,) = events_of(tmp_path, "trainer_gone")
    assert len(gone["bucket"]) == 2
    assert "onnection" in gone["why"]  # closed, or reset
    assert last_steps(read_events(tmp_path))[16 * EPOCHS]["tokens"] == EDGES * EPOCHS
    require_as_good(task, single)


class Killed(BaseException):
    """What nobody handles."""


class Stopping(Assembled):
    """Ends without a word in the middle of the second round."""

    def step(self, unit):
        if unit == 22:
            raise Killed
        return super().step(unit)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_round_goes_on_from_its_checkpoint(graph, single, tmp_path):
    """With another number of trainers; buckets that were done before the checkpoint are not trained again."""
    with pytest.raises(Killed):
        together(graph, tmp_path, server=Stopping, every=5, epochs=EPOCHS)
    kept = checkpoint.latest(tmp_path)
    assert kept.cursor.units == 20
    done = kept.json["done"]
    assert len(done) == 4
    task, codes = together(graph, tmp_path, deaths=(0,), epochs=EPOCHS)
    assert codes == [0]
    (resumed,) = events_of(tmp_path, "resume")
    assert resumed["step"] == 20
    steps = last_steps(read_events(tmp_path))
    assert sorted(steps) == list(range(1, 16 * EPOCHS + 1))
    assert steps[max(steps)]["tokens"] == EDGES * EPOCHS
    assert steps[32]["tokens"] == 2 * EDGES
    require_as_good(task, single)


@pytest.mark.slow
def test_a_loss_that_blows_up_ends_the_run(graph, tmp_path):
    with pytest.raises(NonFinite, match=r"bucket \(\d, \d\)\): the loss is not finite; lower graph.lr"):
        together(graph, tmp_path, deaths=(0,), epochs=2, lr=1e30)


def test_a_server_without_trainers_gives_up(graph, tmp_path):
    class Impatient(Assembled):
        lonely_s = 0.3

    with pytest.raises(RankFailed, match=r"no trainer has come to .*meeting-"):
        together(graph, tmp_path, deaths=(), server=Impatient, epochs=1)


def test_a_trainer_that_would_train_something_else_is_refused(tmp_path):
    meeting = meet(tmp_path)
    door = Door(meeting, {"graph.dim": 16, "puna": "1"}, lambda part: None, ParameterServer([], 1.0))
    with pytest.raises(RanksDiffer, match=r"graph.dim is 8 here, 16 there"):
        train(meeting, {"graph.dim": 8, "puna": "1"}, tmp_path, lambda: None)
    door.close()
    assert door.events.empty()


def test_meeting_places(monkeypatch):
    for name in ("PUNA_STORE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DeviceError, match="MASTER_ADDR and MASTER_PORT name no meeting place"):
        Meeting.from_environment()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(DeviceError, match="cannot be listened on"):
            Meeting.from_environment().keep()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert Meeting.from_environment().keep() is None


# --- the server, asked by hand --------------------------------------------------------------------------------------


class Hands:
    """A server whose trainers are this test."""

    def __init__(self, graph, run, **values):
        self.server = GraphServer(meet(run), {}, *job(graph, run, **values))
        next(self.server.units(Cursor()))
        self.guests = {name: Guest(n, name) for n, name in enumerate("ab")}
        for guest in self.guests.values():
            self.server._take(Event("joined", guest))

    def begin(self, *order):
        self.server._locks = Locks(order, (), range(4))
        self.server._give()

    def wants(self, name, bucket=(), **words):
        """Come for a bucket, with a trained one where it is named; each row of it has the sum 7."""
        parts = {part: self.server.table.fetch(part) for part in bucket}
        for part in parts.values():
            part.sums[:] = 7
        words |= {"bucket": list(bucket), "tokens": 0, "loss": 1.0, "swap_s": 0.0, "swaps": 0} if bucket else {}
        report = self.server._take(Event("wants", self.guests[name], words, parts))
        self.server._give()
        return report

    def gets(self, name):
        """The bucket that a trainer was given, and what was sent with it; None where it waits."""
        answers = self.guests[name].answers
        if answers.empty():
            return None
        answer = answers.get()
        if answer.words["unit"] is None:
            return answer.words
        assert len(answer.parts) == len(answer.words["fetched"])
        return answer.words["unit"]["bucket"], answer.words["fetched"]


def test_what_another_has_trained_is_sent_again(graph, tmp_path):
    """And what a trainer has as it is now is not."""
    hands = Hands(graph, tmp_path)
    hands.begin((0, 1), (1, 2), (0, 3))
    hands.wants("a")
    assert hands.gets("a") == ((0, 1), [0, 1])
    hands.wants("b")
    assert hands.gets("b") is None
    assert hands.wants("a", (0, 1)).tokens > 300
    assert (hands.gets("a"), hands.gets("b")) == (((1, 2), [2]), ((0, 3), [0, 3]))
    hands.wants("b", (0, 3))
    hands.wants("a", (1, 2))
    hands.begin((0, 1))
    assert (hands.gets("a"), hands.gets("b")) == (((0, 1), [0]), None)
    hands.wants("a", (0, 1), leaves=True)
    assert hands.gets("a") == {"unit": None}
    hands.begin((3, 0))
    assert hands.gets("b") == ((3, 0), [0])


def test_a_bucket_that_was_given_to_another_is_not_taken_back(graph, tmp_path):
    hands = Hands(graph, tmp_path)
    hands.begin((0, 1))
    hands.wants("a")
    hands.wants("b")
    hands.server._take(Event("gone", hands.guests["a"], {"why": "Timed out"}))
    hands.server._give()
    assert hands.gets("a") == hands.gets("b") == ((0, 1), [0, 1])
    assert hands.wants("a", (0, 1)) is None
    assert hands.gets("a") == {"unit": None, "lost": True}
    assert not hands.server.table.fetch(0).sums.any()
    assert hands.wants("b", (0, 1)).tokens > 300
    assert (hands.server.table.fetch(1).sums == 7).all()


def test_rates_and_draws_are_those_of_one_process(graph, tmp_path):
    """A bucket's place in the round decides what is drawn; what was given out before it, the rate."""
    hands, single = Hands(graph, tmp_path), GraphTask(*job(graph, tmp_path / "single"), num_threads=1)
    found, bucket = {}, ()
    for _ in range(16):
        hands.wants("a", bucket)
        unit = hands.guests["a"].answers.get().words["unit"]
        bucket = unit["bucket"]
        found[bucket] = unit["index"], unit["place"]
        assert unit["tokens"] == hands.server._tokens
    units = itertools.islice(single.units(Cursor()), 16)
    assert found == {unit.bucket: (unit.index, unit.place) for unit in units}


# --- links and parameters -------------------------------------------------------------------------------------------


def linked(tmp_path, name, serve, seconds=JOIN_SECONDS):
    """This process's end of a link, whose other end a thread serves. seconds: longest wait of this end's sends."""
    meeting = meet(tmp_path)
    thread = threading.Thread(target=lambda: serve(Link(meeting.open(), name, 0)))
    thread.start()
    return Link(meeting.open(), name, 1, seconds), thread


def test_changes_of_two_copies_add_up(tmp_path):
    """Whatever each of them does between two exchanges; what is infinite stays as it is."""
    value = np.zeros(4, np.float32)
    value[3] = np.inf
    server = ParameterServer([value, np.empty(0, np.float32)], 60)
    ends = [linked(tmp_path, str(n), server.serve) for n in range(2)]
    copies = [np.zeros(4, np.float32) for _ in ends]
    for copy in copies:
        copy[3] = np.inf
    shared = [
        SharedParameters(link, [copy, np.empty(0, np.float32)]) for (link, _), copy in zip(ends, copies, strict=True)
    ]
    with shared[0], shared[1]:
        for step in range(5):
            for n, copy in enumerate(copies):
                copy[n] += 1
                copy[2] += 10**n
                if step % (n + 1) == 0:
                    shared[n].exchange()
    for _, thread in ends:
        thread.join()
    assert value[:3].tolist() != [0, 0, 0]
    with_last = np.array([5, 5, 55])
    assert (np.abs(value[:3] - with_last) <= [0, 1, 10]).all()
    assert value[3] == np.inf


def test_silence_ends_a_lease(tmp_path):
    """Whoever does not exchange for so long is gone for the server, and learns of it: at once, or, where gloo misses
    that the other end has closed, after the longest wait of a send."""
    found = []

    def serve(link):
        with pytest.raises(Lost, match="Timed out waiting") as lost:
            ParameterServer([np.zeros(2, np.float32)], 0.3).serve(link)
        found.append(lost)

    link, thread = linked(tmp_path, "silent", serve, seconds=10)
    shared = SharedParameters(link, [np.zeros(2, np.float32)])
    shared.exchange()
    thread.join(20)
    assert len(found) == 1
    with pytest.raises(Lost):
        shared.exchange()


def test_a_link_breaks_when_its_other_end_does(tmp_path):
    link, thread = linked(tmp_path, "x", lambda link: link.tell({"a": [1, None, "é"]}))
    assert link.hear() == {"a": [1, None, "é"]}
    thread.join()
    with pytest.raises(Lost, match="onnection"):
        link.hear()


# --- longer ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_trainers_reach_what_one_process_does(tmp_path):
    """The mean of three seeds. On larger communities: a bucket of eight partitions has more than four batches."""
    graph, found = communities(tmp_path, 10), []
    for seed in range(3):
        wanted = alone(graph, tmp_path / f"alone-{seed}", seed, epochs=EPOCHS, num_partitions=8)
        task, codes = together(graph, tmp_path / f"four-{seed}", (0,) * 4, seed, epochs=EPOCHS, num_partitions=8)
        assert codes == [0] * 4
        require_learnt(task, wanted)
        found.append(mrr(task) - mrr(wanted))
    assert abs(np.mean(found)) <= MARGIN


@pytest.mark.slow
def test_all_trainers_but_one_die(graph, single, tmp_path):
    task, codes = together(graph, tmp_path, deaths=(3, 5, 0), epochs=EPOCHS)
    assert codes == [-9, -9, 0]
    assert len(events_of(tmp_path, "trainer_gone")) == 2
    require_as_good(task, single)


def command(graph, run, *more, epochs=EPOCHS):
    flags = {f"graph.{key}": value for key, value in VALUES.items()} | {"graph.epochs": epochs, "graph.n3": 0.0}
    flags |= {"data.path": graph.folder, "run.dir": run, "run.num_threads": 1, "run.tensorboard": "false"}
    flags |= {"checkpoint.every": 5, "eval.every": 0, "eval.tokens": NUM_HELD_OUT, "schedule.final_ratio": 0.1}
    flags |= dict(zip(more[::2], more[1::2], strict=True))
    words = [f"--{key}={value}" for key, value in flags.items()]
    return [sys.executable, "-m", "puna.cli", "train", "graph-small", *words, "--json"]


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(run):
    return [int(event["name"].split()[1]) for event in events_of(run, "trainer_joined")]


def started(run, num_steps):
    return (run / "events.jsonl").is_file() and len(events_of(run, "step")) >= num_steps


@pytest.mark.slow
def test_as_typed_with_a_trainer_killed(graph, single, tmp_path):
    """One of two trainers is killed, and the run goes on; `puna graph eval` reads what it leaves."""
    run = tmp_path / "run"
    typed = command(graph, run, "run.num_processes", 2, epochs=60)
    process = subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: started(run, 20) and len(pids(run)) == 2)
    os.kill(pids(run)[1], signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "was killed by SIGKILL; the others go on" in err
    told = json.loads(out)
    assert (told["steps"], told["tokens"]) == (16 * 60, EDGES * 60)
    evaluated = [sys.executable, "-m", "puna.cli", "graph", "eval", str(run), "--split", "valid", "--json"]
    figures = json.loads(subprocess.run(evaluated, check=True, capture_output=True, text=True).stdout)
    assert figures["filtered"]["mrr"] == pytest.approx(told["heldout_mrr"])
    assert told["heldout_mrr"] > mrr(single) - MARGIN


@pytest.mark.slow
def test_as_typed_with_everything_killed(graph, single, tmp_path):
    """The launcher, the server and both trainers, in the middle of a round; the same command goes on."""
    run = tmp_path / "run"
    typed = command(graph, run, "run.num_processes", 2)
    process = subprocess.Popen(typed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: started(run, 37))
    process.kill()
    process.wait()
    told = json.loads(subprocess.run(typed, check=True, capture_output=True, text=True).stdout)
    assert told["resumed_from"] >= 35
    assert (told["steps"], told["tokens"]) == (16 * EPOCHS, EDGES * EPOCHS)
    assert abs(told["heldout_mrr"] - mrr(single)) <= MARGIN


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def machines():
    """Two network namespaces that a cable joins: 10.77.0.1 and 10.77.0.2."""
    names = [f"puna-{os.getpid()}-{n}" for n in (1, 2)]
    try:
        made = [ip("netns", "add", name) for name in names]
    except FileNotFoundError:
        pytest.skip("there is no `ip` (iproute2) here")
    try:
        if any(one.returncode for one in made):
            pytest.skip(f"network namespaces are not permitted here: {made[0].stderr.strip()}")
        ends = [f"puna{os.getpid()}{n}" for n in "ab"]
        one = ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        if one.returncode:
            pytest.skip(f"network namespaces cannot be joined here: {one.stderr.strip()}")
        for n, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{n + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_trainers_on_another_machine(graph, single, machines, tmp_path):
    """Server and a trainer in one network namespace, a trainer in another, which writes its own run directory."""
    where = [(0, machines[0], "run"), (1, machines[0], "run"), (2, machines[1], "elsewhere")]
    processes = []
    for rank, name, folder in where:
        environment = {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29512}
        text = {key: str(value) for key, value in environment.items()}
        clean = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
        typed = ["ip", "netns", "exec", name, *command(graph, tmp_path / folder)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(typed, env=clean | text, stdout=pipe, stderr=pipe, text=True))
    ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    told = json.loads(ends[0][0])
    assert told["tokens"] == EDGES * EPOCHS
    assert len(events_of(tmp_path / "run", "trainer_joined")) == 2
    assert max(step["trainers"] for step in events_of(tmp_path / "run", "step")) == 2
    assert not (tmp_path / "elsewhere" / "events.jsonl").exists()
    assert abs(told["heldout_mrr"] - mrr(single)) <= MARGIN
