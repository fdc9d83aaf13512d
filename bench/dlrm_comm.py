"""Training over a slow link with the exchange compressed or not: speed-ups, shares of a step, bytes against counters.

    python bench/dlrm_comm.py --json          (root: network namespaces, veth, tc tbf)

Each rank is a process with one thread in a network namespace of its own; the namespaces are joined by a cable whose
rate is set by a token bucket at both ends. Networks of the terabyte setting (13-512-256-64 and 512-512-256-1), D = 64,
batch 2,048 a rank, tables of up to 200,000 rows placed whole, ids by Zipf's law. The all-reduce of the networks'
gradients goes over the same link and is never compressed. The rate is set so that in the raw arm (float32, a row for
every sample) the forward and the backward exchange take 31 % of a step each, as in Feng et al. 2024.

Arms, alternated: raw; fp16 and int8 (row-wise) both ways; forward: the error-bounded codec on rows alone, gradients
raw, a row for every sample; forward_distinct: the same with gradients of repeated rows summed before they are sent;
both: gradients bounded too. shares: of the raw arm's step, by exposed time; in all arms the backward exchange is waited
for before the all-reduce begins, so that each has its own. amdahl_forward: the speed-up if the forward exchange took no
time. raw_link_utilisation: rate of the raw exchanges over the rate of two sockets that send both ways
at once in the same namespaces. bytes: what the exchange says it sent, over what the interface counted.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
from torch import Tensor

from puna.recipe import load
from puna.recsys.alltoall import Exchange, Pending
from puna.recsys.clicks import Clicks
from puna.recsys.config import DlrmConfig, ExchangeConfig
from puna.recsys.generator import TERABYTE_ROWS, generate
from puna.recsys.task import DlrmTask
from puna.recsys.wires import make_wire
from puna.train.config import ScheduleConfig
from puna.train.task import Cursor

BATCH, MAX_ROWS, SHARE, PORT = 2048, 200_000, 0.31, 29_555
STABLE: dict[str, Any] = {
    "classes": load("dlrm-terabyte").recipe.exchange.classes,
    "decay_steps": 0,
    "record_every": 1_000_000,
}
ARMS: dict[str, dict[str, Any]] = {
    "raw": {"distinct": False},
    "fp16": {"forward": "fp16", "backward": "fp16", "distinct": False},
    "int8": {"forward": "int8", "backward": "int8", "distinct": False},
    "forward": {"forward": "bounded", "distinct": False},
    "forward_distinct": {"forward": "bounded", "distinct": True},
    "both": {"forward": "bounded", "backward": "bounded", "distinct": True},
}


class Timed(Exchange):
    """An exchange that adds up the time it is waited for, by direction."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seconds = {"forward": 0.0, "backward": 0.0}

    def _start(self, x: Tensor, *arguments: Any, unbiased: bool) -> Pending:
        side = "backward" if unbiased else "forward"
        pending = self._timed(side, lambda: Exchange._start(self, x, *arguments, unbiased=unbiased))
        return Pending(lambda: self._timed(side, pending.wait))

    def _timed(self, side: str, act: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = act()
        self.seconds[side] += time.perf_counter() - began
        return found


class Arm:
    """One way to train, on this rank."""

    def __init__(self, clicks: Clicks, values: dict[str, Any]) -> None:
        base = load("dlrm-terabyte").recipe.dlrm
        config = DlrmConfig(
            dim=base.dim,
            bottom=base.bottom,
            top=base.top,
            max_rows=MAX_ROWS,
            batch=BATCH * dist.get_world_size(),
            lr=0.1,
            epochs=1000,
            placement="table",
        )
        exchange = ExchangeConfig(**STABLE, **values)
        self.task = DlrmTask(config, exchange, ScheduleConfig(decay="constant"), clicks)
        wires = [make_wire(name, exchange.codec) for name in (exchange.forward, exchange.backward)]
        self.exchange = self.task.tables.exchange = Timed(None, *wires)
        self.reduce_s = 0.0
        average = self.task._average_plain_gradients

        def timed() -> None:
            for _, pending in self.task.tables._coming:
                pending.wait()
            began = time.perf_counter()
            average()
            self.reduce_s += time.perf_counter() - began

        self.task._average_plain_gradients = timed  # type: ignore[method-assign]
        self.units = self.task.units(Cursor())

    def run(self, steps: int) -> dict[str, float]:
        """Seconds of a step, and of its parts."""
        self.exchange.seconds, self.reduce_s = {"forward": 0.0, "backward": 0.0}, 0.0
        units = [next(self.units) for _ in range(steps)]
        dist.barrier()
        began = time.perf_counter()
        for unit in units:
            self.task.step(unit)
        dist.barrier()
        total = time.perf_counter() - began
        parts = self.exchange.seconds | {"reduce": self.reduce_s, "step": total}
        return {name: seconds / steps for name, seconds in parts.items()}

    def exchange_alone(self, rounds: int) -> dict[str, float]:
        """Forward exchanges with nothing else: seconds of one, bytes that it says it sent, bytes the interface saw."""
        batch = next(self.units).batches[0]
        tables, bounds = self.task.tables, self.task.bounds
        blocks = tables.blocks(batch.lookup, bounds.forward(0), bounds.backward(), 1)
        sent = tables.gather(batch.lookup)
        dist.barrier()
        said, seen, began = self.exchange.sent.sent, interface_bytes(), time.perf_counter()
        for _ in range(rounds):
            self.exchange.start(sent, *blocks, {}).wait()
        seconds = time.perf_counter() - began
        time.sleep(0.3)
        said = self.exchange.sent.sent - said
        return {"seconds": seconds / rounds, "said": said / rounds, "seen": (interface_bytes() - seen) / rounds}


def interface_bytes() -> int:
    """Bytes that have left this namespace."""
    return int(Path("/sys/class/net/puna0/statistics/tx_bytes").read_text())


def sockets(peer: str, rank: int, num_bytes: int = 1 << 25) -> float:
    """Bytes per second of one way, while both ways are busy."""
    if rank == 0:
        with socket.create_server(("", PORT + 1)) as server:
            link, _ = server.accept()
    else:
        time.sleep(0.5)
        link = socket.create_connection((peer, PORT + 1))
    data = bytes(1 << 16)

    def send() -> None:
        for _ in range(num_bytes // len(data)):
            link.sendall(data)

    with link:
        link.sendall(b"x")
        link.recv(1, socket.MSG_WAITALL)
        began, sender = time.perf_counter(), threading.Thread(target=send)
        sender.start()
        left = num_bytes
        while left:
            left -= len(link.recv(min(left, 1 << 20)))
        sender.join()
        return num_bytes / (time.perf_counter() - began)


def work(args: argparse.Namespace) -> None:
    """A rank: answers commands on stdin with JSON on stdout."""
    torch.set_num_threads(1)
    address = f"tcp://10.78.0.1:{PORT}"
    dist.init_process_group("gloo", init_method=address, rank=args.rank, world_size=args.ranks)
    clicks = Clicks.open(args.clicks)
    arms = {name: Arm(clicks, values) for name, values in ARMS.items() if name in args.arms.split(",")}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "steps":
            answer: Any = arms[command["arm"]].run(command["steps"])
        elif command["do"] == "exchange":
            answer = arms[command["arm"]].exchange_alone(command["rounds"])
        else:
            answer = sockets("10.78.0.1", args.rank) if args.rank < 2 else 0.0
        print(json.dumps(answer), flush=True)
    os._exit(0)


class Ranks:
    """The processes, and the cable between them."""

    def __init__(self, args: argparse.Namespace, clicks: str) -> None:
        self.names = [f"punac{os.getpid()}r{rank}" for rank in range(args.ranks)]
        self.bridge = f"punac{os.getpid()}b"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "puna0"}
        self.processes: list[subprocess.Popen[str]] = []
        try:
            self._cable()
            for rank, name in enumerate(self.names):
                words = [sys.executable, __file__, "--rank", str(rank), "--ranks", str(args.ranks)]
                words += ["--clicks", clicks, "--arms", args.arms]
                line = ["ip", "netns", "exec", name, *words]
                pipe = subprocess.PIPE
                self.processes.append(subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=environment))
            self._answers()
        except BaseException:
            self.close()
            raise

    def _cable(self) -> None:
        """Namespaces on a bridge in one of its own."""
        run("ip", "netns", "add", self.bridge)
        run("ip", "-n", self.bridge, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self.bridge, "link", "set", "br0", "up")
        for rank, name in enumerate(self.names):
            run("ip", "netns", "add", name)
            ends = ["name", "puna0", "netns", name, "type", "veth", "peer", "name", f"p{rank}", "netns", self.bridge]
            run("ip", "link", "add", *ends)
            run("ip", "-n", self.bridge, "link", "set", f"p{rank}", "master", "br0", "up")
            run("ip", "-n", name, "addr", "add", f"10.78.0.{rank + 1}/24", "dev", "puna0")
            for device in ("lo", "puna0"):
                run("ip", "-n", name, "link", "set", device, "up")

    def limit(self, bits_per_s: float) -> None:
        """The rate of every end of the cable."""
        for name in self.names:
            rate = ["rate", f"{int(bits_per_s)}bit", "burst", "256kb", "latency", "50ms"]
            run("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "puna0", "root", "tbf", *rate)

    def __call__(self, **command: Any) -> list[Any]:
        for process in self.processes:
            assert process.stdin
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        return self._answers()

    def _answers(self) -> list[Any]:
        found = []
        for process in self.processes:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                sys.exit("a rank has ended; see above")
            found.append(json.loads(line))
        return found

    def close(self) -> None:
        """End the processes, take the cable away."""
        for process in self.processes:
            process.kill()
            process.wait()
        for name in [*self.names, self.bridge]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def run(*words: str) -> None:
    """A command that must work."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"`{' '.join(words)}` failed: {done.stderr.strip()}; network namespaces need root")


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Ranks]:
    """Ranks with clicks to train on."""
    folder = tempfile.mkdtemp(prefix="puna-comm-")
    try:
        samples = BATCH * args.ranks * 40
        generate(f"{folder}/clicks", samples=samples, test=0, rows=TERABYTE_ROWS, max_rows=MAX_ROWS)
        ranks = Ranks(args, f"{folder}/clicks")
        try:
            yield ranks
        finally:
            ranks.close()
    finally:
        shutil.rmtree(folder)


def shares(parts: dict[str, float]) -> dict[str, float]:
    """Of a step: forward, backward, reduce, and the rest."""
    found = {name: parts[name] / parts["step"] for name in ("forward", "backward", "reduce")}
    return found | {"kernels": 1 - sum(found.values())}


def slowest(answers: list[dict[str, float]]) -> dict[str, float]:
    """Means over the ranks, which step together."""
    return {name: statistics.fmean(answer[name] for answer in answers) for name in answers[0]}


def calibrate(ranks: Ranks, args: argparse.Namespace) -> float:
    """The rate at which the raw arm's two exchanges take 31 % of a step each."""
    rate = args.rate * 1e6
    for _ in range(args.trials):
        ranks.limit(rate)
        ranks(do="steps", arm="raw", steps=1)
        parts = slowest(ranks(do="steps", arm="raw", steps=args.steps))
        found = shares(parts)
        share = (found["forward"] + found["backward"]) / 2
        print(f"{rate / 1e6:.0f} Mbit/s: { ({k: round(v, 3) for k, v in found.items()}) }", file=sys.stderr)
        if abs(share - SHARE) < 0.01:
            break
        wire, rest = parts["forward"] + parts["backward"] + parts["reduce"], parts["step"] * found["kernels"]
        exchanged = parts["forward"] + parts["backward"]
        # wire time x is to be such that x exchanged / (rest + x wire) = 2 SHARE
        scale = 2 * SHARE * rest / (exchanged - 2 * SHARE * wire) if exchanged > 2 * SHARE * wire else 1.5
        rate /= min(max(scale, 0.5), 2.0)
    return rate


def main() -> None:
    """Set the link, alternate the arms; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of every arm in a round")
    parser.add_argument("--trials", type=int, default=6, help="rates tried for the link")
    parser.add_argument("--rate", type=float, default=300.0, help="Mbit/s to begin with")
    parser.add_argument("--arms", default=",".join(ARMS), help="with raw among them")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--clicks", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        work(args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that namespaces are taken away
    with opened(args) as ranks:
        rate = calibrate(ranks, args)
        names = args.arms.split(",")
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for name in names:
            ranks(do="steps", arm=name, steps=1)
        for number in range(args.rounds):
            for name in names:
                seconds[name].append(slowest(ranks(do="steps", arm=name, steps=args.steps)))
            shown = "  ".join(f"{name} {found[-1]['step'] * 1e3:.0f} ms" for name, found in seconds.items())
            print(f"round {number + 1}: {shown}", file=sys.stderr)
        alone = {name: slowest(ranks(do="exchange", arm=name, rounds=3)) for name in names}
        link = statistics.fmean(ranks(do="socket")[:2])
    raw = {name: statistics.median(found[name] for found in seconds["raw"]) for name in seconds["raw"][0]}
    found = shares(raw)
    ratios = {
        name: statistics.median(a["step"] / b["step"] for a, b in zip(seconds["raw"], seconds[name], strict=True))
        for name in names
    }
    result = {
        "shares": found,
        "amdahl_forward": 1 / (1 - found["forward"]),
        **{
            key: ratios.get(name)
            for key, name in (
                ("speedup_forward_only", "forward"),
                ("speedup_both_ways", "both"),
                ("speedup_forward_distinct", "forward_distinct"),
                ("speedup_fp16", "fp16"),
                ("speedup_int8", "int8"),
            )
        },
        "raw_link_utilisation": alone["raw"]["said"] / alone["raw"]["seconds"] / link,
        "socket_bytes_per_s": link,
        "rate_mbit": rate / 1e6,
        "step_ms": {name: 1e3 * statistics.median(f["step"] for f in runs) for name, runs in seconds.items()},
        "parts_ms": {
            name: {part: 1e3 * statistics.median(f[part] for f in runs) for part in runs[0]}
            for name, runs in seconds.items()
        },
        "bytes": {name: facts["said"] / facts["seen"] for name, facts in alone.items()},
        "ratio_forward": alone["raw"]["said"] / alone["forward"]["said"] if "forward" in names else None,
        "ranks": args.ranks,
    }
    print(json.dumps(result | machine.facts()))


if __name__ == "__main__":
    main()
