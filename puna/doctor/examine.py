"""`puna doctor`: looks this machine over and says what it is, how fast, and what ails it."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from puna.console import bar
from puna.doctor.disk import disk_rates
from puna.doctor.findings import Finding, findings
from puna.doctor.machine import Machine, read_machine, versions
from puna.train import hardware
from puna.train.hardware import Hardware, Kernels

DTYPES = ("fp32", "bf16", "fp16")
ARRAY_BYTES = 256 << 20
KERNELS = "cpu.kernels"


class Step(NamedTuple):
    """One measurement: what it is called, the dotted key of its figure, the work, what to try where it fails."""

    label: str
    key: str
    measure: Callable[[], Any]
    command: str


def examine(write: Path | None = None, folder: Path = Path()) -> dict[str, Any]:
    """Everything `puna doctor` knows, in some 45 s. write: where to leave the hardware entry for the planner, or None.

    folder: the one whose disk is measured. Returns healthy (no finding is an error), versions, machine, figures,
    findings (severity, what, why, command), hardware, written (path or None), seconds. A measurement that fails is a
    finding; nothing but a path that cannot be written raises.
    """
    began = time.monotonic()
    machine, installed = read_machine(), versions()
    figures, broken = measure(machine, installed, folder)
    told = [*broken, *findings(machine, installed, figures, shutil.disk_usage(folder).free)]
    entry = hardware_entry(machine, installed, figures)
    if write is not None:
        hardware.write(entry, write)
    return {
        "healthy": all(finding.severity != "error" for finding in told),
        "versions": installed,
        "machine": asdict(machine),
        "figures": nested(figures),
        "findings": [asdict(finding) for finding in told],
        "hardware": entry.model_dump(),
        "written": None if write is None else str(write),
        "seconds": time.monotonic() - began,
    }


# --- measurements ---------------------------------------------------------------------------------------------------


def measure(
    machine: Machine, installed: Mapping[str, str | None], folder: Path
) -> tuple[dict[str, Any], list[Finding]]:
    """All figures by dotted key, and a finding for every measurement that failed."""
    figures: dict[str, Any] = {}
    broken: list[Finding] = []
    with bar() as progress:
        task = progress.add_task("looking", total=None)
        for step in steps(machine, installed, figures, folder):
            progress.update(task, description=step.label)
            try:
                figures[step.key] = step.measure()
            except Exception as error:  # on an odd machine anything may fail; the rest is still worth measuring
                why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                broken.append(Finding("error", f"{step.label}: could not be measured", why, step.command))
            progress.advance(task)
    return figures, broken


def steps(
    machine: Machine, installed: Mapping[str, str | None], figures: Mapping[str, Any], folder: Path
) -> Iterator[Step]:
    """The measurements, one after another; later ones depend on what earlier ones found."""
    yield Step("disk", "disk", lambda: disk_rates(folder) | {"folder": str(folder.resolve())}, f"df -h {folder}")
    if installed["torch"] is None:
        return
    yield Step("torch", "torch", torch_facts, "pip install --force-reinstall torch")
    if "torch" not in figures:
        return
    from puna.doctor import probes

    yield Step("devices", "devices", probes.devices, "nvidia-smi")
    yield from rates("cpu", min(ARRAY_BYTES, (machine.memory_available or ARRAY_BYTES * 8) // 8))
    if figures.get("devices"):
        yield from rates("cuda", ARRAY_BYTES * 4)
    else:
        yield from kernel_steps(machine.num_cores)
    yield link_step("cpu")
    if len(figures.get("devices", ())) >= probes.NUM_PROCESSES:
        yield link_step("cuda")


def torch_facts() -> dict[str, Any]:
    """The facts, and with them the proof that torch can be imported."""
    from puna.doctor import probes

    return probes.torch_facts()


def rates(kind: str, array_bytes: int) -> Iterator[Step]:
    """Matrices and memory of one kind of device, in each dtype."""
    from puna.doctor import probes

    for dtype in DTYPES:
        command = f"python -c 'import torch; a = torch.ones(64, 64, device=\"{kind}\"); print(a @ a)'"
        work = partial(probes.flops, kind, dtype)
        yield Step(f"{kind} matrices in {dtype}", f"{kind}.matrix_flops.{dtype}", work, command)
        work = partial(probes.bandwidth, kind, dtype, array_bytes)
        yield Step(f"{kind} memory in {dtype}", f"{kind}.memory_bandwidth.{dtype}", work, command)


def link_step(kind: str) -> Step:
    """Two processes talk through gloo or NCCL."""
    from puna.doctor import probes

    command = "GLOO_SOCKET_IFNAME=lo puna doctor"
    return Step(f"two {kind} processes", f"{kind}.link", partial(probes.link, kind), command)


def kernel_steps(num_cores: int) -> Iterator[Step]:
    """The trainer's kernels: one process on all cores, then two on half of them each."""
    for count in (1, 2):
        work = partial(timed_kernels, count, max(1, num_cores // count))
        yield Step(f"the trainer's kernels, {count} at a time", f"{KERNELS}.{count}", work, "puna train tiny")


def timed_kernels(num_processes: int, num_threads: int) -> dict[str, Any]:
    """What `puna.doctor.kernels.measure` finds; it takes more packages than torch."""
    from puna.doctor import kernels

    return kernels.measure(num_processes, num_threads)


def nested(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as tables in tables."""
    table: dict[str, Any] = {}
    for key, value in figures.items():
        *path, last = key.split(".")
        inner = table
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return table


def hardware_entry(machine: Machine, installed: Mapping[str, str | None], figures: Mapping[str, Any]) -> Hardware:
    """The planner's entry: of the CUDA devices where there are any, else of the CPU."""
    cards = figures.get("devices", [])
    kind: Literal["cpu", "cuda"] = "cuda" if cards else "cpu"
    link, disk = figures.get(f"{kind}.link", {}), figures.get("disk", {})
    threads = figures["torch"]["num_threads"] if "torch" in figures else 0
    return Hardware(
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        software=f"puna {installed['puna']}, torch {installed['torch']}, {threads} threads",
        device=kind,
        device_name=cards[0]["name"] if cards else machine.cpu or "",
        num_devices=max(len(cards), 1),
        num_cores=machine.num_cores,
        memory=cards[0]["memory"] if cards else machine.memory,
        matrix_flops=by_dtype(figures, f"{kind}.matrix_flops"),
        memory_bandwidth=by_dtype(figures, f"{kind}.memory_bandwidth"),
        link_latency=link.get("latency"),
        link_bandwidth=link.get("bandwidth"),
        disk_write=disk.get("write"),
        disk_read=disk.get("read"),
        kernels=tuple(Kernels(**figures[key]) for key in figures if key.startswith(KERNELS)),
    )


def by_dtype(figures: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The figures under a dotted prefix, by dtype."""
    return {dtype: figures[f"{prefix}.{dtype}"] for dtype in DTYPES if f"{prefix}.{dtype}" in figures}


# --- the page -------------------------------------------------------------------------------------------------------


def text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [*about(report), "", *table(report["figures"]), ""]
    for finding in report["findings"]:
        lines.append(f"{finding['severity']}: {finding['what']}")
        lines += [f"  why   {finding['why']}", f"  mend  {finding['command']}"]
    if not report["findings"]:
        lines.append("nothing is slow or missing")
    kept = f"written to {report['written']}" if report["written"] else "left as it is"
    return "\n".join([*lines, "", f"{report['seconds']:.0f} s; hardware entry {kept}"])


def about(report: Mapping[str, Any]) -> Iterator[str]:
    """Two lines: software, machine."""
    yield ", ".join(f"{name} {version or '-'}" for name, version in report["versions"].items())
    machine = report["machine"]
    memory = f"{machine['memory'] / 1e9:.1f} GB" if machine["memory"] else "unknown memory"
    flags = " ".join(machine["flags"]) or "no matrix instructions known"
    yield f"{machine['cpu'] or 'unknown CPU'}, {machine['num_cores']} cores ({flags}), {memory}, {machine['system']}"
    for card in report["figures"].get("devices", ()):
        yield f"{card['name']}, {card['memory'] / 1e9:.1f} GB"


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """The rates, a line each."""
    for kind in ("cpu", "cuda"):
        own = figures.get(kind, {})
        for key, label, unit in (("matrix_flops", "matrices", "GFLOP/s"), ("memory_bandwidth", "memory", "GB/s")):
            if key in own:
                cells = "  ".join(f"{dtype} {rate / 1e9:,.1f}" for dtype, rate in own[key].items())
                yield f"{kind:<5}{label:<10}{cells}  {unit}"
        if "link" in own:
            latency, bandwidth = own["link"]["latency"] * 1e6, own["link"]["bandwidth"] / 1e9
            yield f"{kind:<5}{'processes':<10}all-reduce between two: {latency:,.0f} us, {bandwidth:,.2f} GB/s"
    if disk := figures.get("disk"):
        write, read = disk["write"] / 1e6, disk["read"] / 1e6
        yield f"{'disk':<15}write {write:,.0f}  read {read:,.0f}  MB/s  ({disk['folder']})"
