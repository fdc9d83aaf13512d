"""The ranks of a run as Ray actors, on this machine or on a Ray cluster; needs the extra `ray`."""

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

import puna.errors
from puna.errors import DeviceError, PunaError, RankFailed
from puna.train.launch import LAST_WORDS_SECONDS, POLL_SECONDS, error_in, resolve, words_of

START_SECONDS = 120.0
"""For all actors to be placed."""


def launch_actors(
    target: str, arguments: Sequence[str], num_processes: int, run: Path, gpus_per_process: int, address: str
) -> None:
    """Call `target` ("module:function") with the string arguments in `num_processes` actors; returns when all have.

    Ranks on one node follow each other; rank 0's node is the meeting place. Every node sees the folder that this
    process works in. address: of a running cluster; "local": Ray is started on this machine and stopped in the end.
    Raises what a rank raises; RankFailed where an actor dies; DeviceError where the cluster has no room for them.
    """
    local = address == "local"
    resources = {"num_cpus": num_processes} if local else {}
    ray.init(address, include_dashboard=False, logging_level="warning", **resources)
    try:
        _run(target, list(arguments), num_processes, run / "launch", gpus_per_process)
    finally:
        ray.shutdown()


def _run(target: str, arguments: list[str], num_processes: int, folder: Path, gpus_per_process: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank-*.error"):
        old.unlink()
    _require_room({"CPU": num_processes, "GPU": num_processes * gpus_per_process})
    actor_class = ray.remote(num_cpus=1, num_gpus=gpus_per_process)(_Rank)
    actors = [actor_class.remote() for _ in range(num_processes)]
    try:
        actors, places = _in_order(actors)
        environments = _environments(places, folder.absolute(), gpus_per_process)
        calls = [
            actor.work.remote(environment, os.getcwd(), target, arguments)
            for actor, environment in zip(actors, environments, strict=True)
        ]
        _wait(calls, places, folder)
    finally:
        for actor in actors:
            ray.kill(actor)


def _require_room(wanted: dict[str, float]) -> None:
    there = ray.cluster_resources()
    for kind, amount in wanted.items():
        if there.get(kind, 0) < amount:
            raise DeviceError(
                f"the run needs {amount:g} {kind}s and the Ray cluster has {there.get(kind, 0):g}",
                "Lower --nodes or run.num_processes, or add machines to the cluster.",
            )


def _in_order(actors: list[ActorHandle]) -> tuple[list[ActorHandle], list[tuple[str, int]]]:
    """Actors by node, and each one's node address and a free port there."""
    calls = [actor.place.remote() for actor in actors]
    try:
        places = ray.get(calls, timeout=START_SECONDS)
    except GetTimeoutError:
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        raise DeviceError(
            f"{len(ready)} of {len(calls)} ranks found a place on the Ray cluster in {START_SECONDS:.0f} s",
            "Other work holds the rest; try again when it is done.",
        ) from None
    order = sorted(range(len(actors)), key=lambda i: (places[i][0], i))
    return [actors[i] for i in order], [places[i] for i in order]


def _environments(places: list[tuple[str, int]], folder: Path, gpus_per_process: int) -> list[dict[str, str]]:
    """What each rank sees, as torchrun would have set it. Ray shows an actor its own GPU alone, as number 0."""
    host, port = places[0]
    on_node = Counter(node for node, _ in places)
    before: Counter[str] = Counter()
    environments = []
    for rank, (node, _) in enumerate(places):
        chosen: dict[str, Any] = {
            "RANK": rank,
            "WORLD_SIZE": len(places),
            "LOCAL_RANK": 0 if gpus_per_process else before[node],
            "LOCAL_WORLD_SIZE": on_node[node],
            "ROLE_NAME": "trainer",
            "ROLE_RANK": rank,
            "ROLE_WORLD_SIZE": len(places),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "PUNA_ERROR_FILE": folder / f"rank-{rank}.error",
        }
        environments.append({key: str(value) for key, value in chosen.items()})
        before[node] += 1
    return environments


def _wait(calls: list[Any], places: list[tuple[str, int]], folder: Path) -> None:
    """Until all ranks are done, or the first one is not."""
    rank_of = {call: rank for rank, call in enumerate(calls)}
    while calls:
        done, calls = ray.wait(calls)
        for call in done:
            rank = rank_of[call]
            where = f"rank {rank} (trainer, on {places[rank][0]})"
            try:
                told = ray.get(call)
            except RayActorError as error:
                raise _told(folder) or RankFailed(f"{where} died; the other ranks were stopped. {error}") from None
            except RayTaskError as error:
                raise RankFailed(f"{where} failed: {error.cause!r}; the other ranks were stopped") from error
            if told:
                raise getattr(puna.errors, told[0])(*told[1])


def _told(folder: Path) -> PunaError | None:
    """What a watchdog has left to say before it ended its rank; the others take a moment to end too."""
    deadline = time.monotonic() + LAST_WORDS_SECONDS
    while time.monotonic() < deadline:
        if file := next(folder.glob("rank-*.error"), None):
            return error_in(file)
        time.sleep(POLL_SECONDS)
    return None


class _Rank:
    """One rank's process."""

    def place(self) -> tuple[str, int]:
        """Address of this node and a port that is free on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def work(self, environment: dict[str, str], folder: str, target: str, arguments: list[str]) -> list[Any] | None:
        """Call the target as this rank; a PunaError comes back in words."""
        os.environ |= environment
        os.chdir(folder)
        try:
            resolve(target)(*arguments)
        except PunaError as error:
            return words_of(error)
        return None
