"""What is slow or missing on a machine, why, and the command that mends it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from puna.doctor.machine import Machine

MIN_LINK_BANDWIDTH, MAX_LINK_LATENCY = 2e8, 1e-3
MIN_DISK_RATE, MIN_FREE_DISK, MIN_FREE_MEMORY = 1e8, 10e9, 2e9
BUSY = 0.7
"""Share of the cores that others may keep busy before the figures are doubted."""


@dataclass(frozen=True)
class Finding:
    """severity: error (something cannot work), warning (slow, or soon too little), note (worth knowing)."""

    severity: Literal["error", "warning", "note"]
    what: str
    why: str
    command: str


def findings(
    machine: Machine, versions: Mapping[str, str | None], figures: Mapping[str, Any], free_disk: int
) -> list[Finding]:
    """All that can be said, worst first. figures: as `examine` measures them, by dotted key; what is absent is passed
    over."""
    found = [
        *about_packages(versions, figures, machine),
        *about_cores(machine, figures),
        *about_dtypes(machine, figures),
        *about_memory(machine),
        *about_links(figures),
        *about_disk(figures, free_disk),
    ]
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def about_packages(
    versions: Mapping[str, str | None], figures: Mapping[str, Any], machine: Machine
) -> Iterator[Finding]:
    """What is not installed, or installed for another machine."""
    if versions["torch"] is None:
        why = "without it Puna shows recipes, but neither trains nor answers; rates were not measured"
        yield Finding("error", "torch is not installed", why, "pip install 'puna[train]'")
    elif versions["transformers"] is None:
        why = "`puna parity` and `puna export --check` hold checkpoints against it"
        yield Finding("note", "transformers is not installed", why, "pip install 'puna[demo]'")
    facts = figures.get("torch")
    if facts and machine.has_nvidia and not figures.get("devices"):
        if facts["cuda"] is None:
            why = f"torch {versions['torch']} was built for the CPU alone"
            command = "pip install --force-reinstall torch"
        else:
            built = f"torch {versions['torch']} was built for CUDA {facts['cuda']}"
            why = f"{built}; the driver may be older, or devices hidden"
            command = "nvidia-smi; echo CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
        yield Finding("warning", "torch does not see the NVIDIA device of this machine", why, command)
    if not machine.has_compiler:
        why = "torch.compile writes C++; `--train.compile true` cannot work"
        yield Finding("note", "there is no C++ compiler", why, "apt-get install g++")


def about_cores(machine: Machine, figures: Mapping[str, Any]) -> Iterator[Finding]:
    """Cores that are not used, not really there, or used by others."""
    cores, quota = machine.num_cores, machine.quota_cores
    threads = figures["torch"]["num_threads"] if "torch" in figures else cores
    if quota is not None and quota < cores - 0.5:
        what = f"{cores} cores are visible, but this container may use {quota:g} of them"
        command = f"export OMP_NUM_THREADS={max(round(quota), 1)}"
        yield Finding("warning", what, "threads beyond that wait for one another", command)
    elif threads < cores:
        why = "torch was told so, mostly by OMP_NUM_THREADS; the rates above are those of that many threads"
        yield Finding("warning", f"torch uses {threads} of {cores} cores", why, "unset OMP_NUM_THREADS")
    if machine.load is not None and machine.load > BUSY * cores:
        what = f"{machine.load:.1f} processes kept {cores} cores busy over the last minute"
        command = "ps -eo pcpu,pid,comm --sort=-pcpu | head -5"
        yield Finding("warning", what, "the rates above are lower than this machine's own", command)
    if machine.cpu is None or machine.memory is None:
        what = "the system does not tell which CPU or how much memory it has"
        yield Finding("note", what, "/proc/cpuinfo or /proc/meminfo cannot be read", "mount -t proc proc /proc")


def about_dtypes(machine: Machine, figures: Mapping[str, Any]) -> Iterator[Finding]:
    """16-bit matrices that are slower than float32 ones on the CPU."""
    exact = figures.get("cpu.matrix_flops.fp32")
    causes = {
        "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
        "fp16": ("avx512_fp16", "amx_fp16", "asimdhp"),
    }
    for dtype, instructions in causes.items():
        rate = figures.get(f"cpu.matrix_flops.{dtype}")
        if exact is None or rate is None or rate >= exact:
            continue
        there = [flag for flag in instructions if flag in machine.flags]
        why = (
            f"the CPU has {there[0]}, but torch's products do not gain from it here"
            if there
            else f"the CPU has no instructions for {dtype} (such as {instructions[0]}), so each product is emulated"
        )
        what = f"{dtype} is slow on this CPU: its matrices multiply at {rate / exact:.1%} of the rate of fp32"
        yield Finding("warning", what, why, "puna train RECIPE --train.dtype fp32")


def about_memory(machine: Machine) -> Iterator[Finding]:
    """Memory that others hold."""
    free = machine.memory_available
    if free is not None and free < MIN_FREE_MEMORY:
        what = f"only {free / 1e9:.1f} GB of memory are free"
        command = "ps -eo rss,pid,comm --sort=-rss | head -5"
        yield Finding("warning", what, "a run that needs more is killed by the system", command)


def about_links(figures: Mapping[str, Any]) -> Iterator[Finding]:
    """Processes of one machine that talk slowly."""
    for kind in ("cpu", "cuda"):
        link = figures.get(f"{kind}.link")
        if link and (link["bandwidth"] < MIN_LINK_BANDWIDTH or link["latency"] > MAX_LINK_LATENCY):
            what = (
                f"two processes exchange {link['bandwidth'] / 1e6:,.0f} MB/s, {link['latency'] * 1e6:,.0f} us a message"
            )
            why = "they wait for cores that others use, or go through a network card in place of the loopback"
            yield Finding("warning", what, why, "export GLOO_SOCKET_IFNAME=lo")


def about_disk(figures: Mapping[str, Any], free_disk: int) -> Iterator[Finding]:
    """A disk that is slow or nearly full."""
    disk = figures.get("disk")
    if disk and disk["write"] < MIN_DISK_RATE:
        what = f"the disk of {disk['folder']} writes {disk['write'] / 1e6:,.0f} MB/s"
        seconds = 16e9 / disk["write"]
        why = f"a checkpoint of a model of 1 billion parameters under AdamW (16 GB) takes {seconds:,.0f} s"
        yield Finding("warning", what, why, "puna train RECIPE --run.dir /another/disk/run")
    if free_disk < MIN_FREE_DISK:
        what = f"only {free_disk / 1e9:.1f} GB of disk are free"
        why = "a checkpoint takes 12 to 16 bytes a parameter, and two are kept"
        yield Finding("warning", what, why, "puna train RECIPE --checkpoint.keep 1")
