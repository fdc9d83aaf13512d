"""The command line that starts the ranks of one machine, by torchrun. No torch here."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from puna.train.network import addresses_to

PORT = 29_400


@dataclass(frozen=True)
class Meeting:
    """Where the machines of a run meet: `host` is one of them, which all reach at `port`; `name` tells runs apart."""

    host: str
    port: int = PORT
    name: str = "puna"


def flags_of_this_node(meeting: Meeting) -> list[str]:
    """This machine's address towards the meeting place, and whether it is that place.

    torchrun would go by the host's name, which need not resolve to an address that the others reach.
    """
    ends = addresses_to(meeting.host)
    return [f"--local-addr={ends[0]}", f"--rdzv-conf=is_host={int(ends[0] == ends[1])}"] if ends else []


def torchrun(
    words: Sequence[str],
    *,
    num_processes: int,
    num_nodes: int = 1,
    meeting: Meeting | None = None,
    max_restarts: int = 0,
    of_node: Sequence[str] = (),
    python: str = sys.executable,
) -> list[str]:
    """torchrun that runs `python -m puna.cli WORDS` in every rank; but for `of_node` the same line on every machine.

    Machines may join in any order and take the node ranks that torchrun deals; a rank that dies, or that the watchdog
    ends, starts all ranks on all machines again, up to `max_restarts` times. meeting: needed for several machines.
    """
    line = [python, "-m", "torch.distributed.run", f"--nnodes={num_nodes}", f"--nproc-per-node={num_processes}"]
    line += [f"--max-restarts={max_restarts}", "--role=trainer"]
    if meeting:
        endpoint = f"--rdzv-endpoint={meeting.host}:{meeting.port}"
        line += ["--rdzv-backend=c10d", f"--rdzv-id={meeting.name}", endpoint, *of_node]
    else:
        line.append("--standalone")
    return [*line, "-m", "puna.cli", *words]
