"""A machine as measured: what `puna doctor` leaves for the planner, one TOML file a machine. No torch here."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, ValidationError

from puna.errors import DataError
from puna.train.config import Section, setting

HEADER = "# Measured by `puna doctor`. The unit of each key is in [units].\n\n"


@dataclass(frozen=True)
class Probe:
    """Blocks of a Llama that are timed together: how many, their sizes, tokens of a forward and of each document."""

    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tokens: int
    document: int


PROBES = (Probe(2, 64, 192, 1, 1, 64, 64, 64), Probe(4, 256, 704, 4, 2, 64, 512, 256))
"""What the tables "blocks_RECOMPUTE" hold, whose one axis numbers them from 1: one that is nearly all overhead, and one
that keeps more than caches hold."""

Sizes = Annotated[tuple[int, ...], Field(strict=False)]
Seconds = Annotated[tuple[float, ...], Field(strict=False)]
Axes = Annotated[tuple[Sizes, ...], Field(strict=False)]


class Table(Section):
    """Seconds of one kernel for every combination of the sizes on its axes, the last axis running fastest."""

    axes: Axes
    seconds: Seconds


class Kernels(Section):
    """Times of the trainer's kernels in float32, and memory of a rank.

    With `num_processes` of `num_threads` threads each at work at the same time. code_bytes: what a rank has resident
    when it has imported what a run needs; runtime_bytes: what it takes beside what `puna.plan.memory` counts; slack:
    bytes that the allocator loses in holes for each byte of what comes and goes within a step.
    """

    num_processes: int
    num_threads: int
    tables: dict[str, Table]
    code_bytes: int
    runtime_bytes: int
    slack: float


class Hardware(Section):
    """A device of a machine, its links to the machine's other processes, and its disk; None where none was measured.

    Rates are what torch reaches here, not what a data sheet says.
    """

    format_version: int = setting(1, "of this file")
    name: str = setting("this machine", "how the planner is told to use it")
    measured: str = setting("", "when", "UTC date and time")
    software: str = setting("", "what the rates were measured with")
    device: Literal["cpu", "cuda"] = setting("cpu", "kind of the device")
    device_name: str = setting("", "as its maker calls it")
    num_devices: int = setting(1, "devices of this kind in the machine", "devices", ge=1)
    num_cores: int = setting(1, "CPU cores that a process may use", "cores", ge=1)
    memory: int | None = setting(None, "of one device", "bytes", ge=0)
    matrix_flops: dict[str, float] = setting({}, "rate of a large square matrix product, by dtype", "FLOP/s")
    memory_bandwidth: dict[str, float] = setting(
        {}, "bytes read and written by y = 2 x on arrays larger than caches, by dtype", "bytes/s"
    )
    link_latency: float | None = setting(None, "all-reduce of one number between two processes", "s", gt=0)
    link_bandwidth: float | None = setting(
        None, "bytes of an array by the seconds of its all-reduce between two processes", "bytes/s", gt=0
    )
    disk_write: float | None = setting(None, "sequential, until it is safe on the disk", "bytes/s", gt=0)
    disk_read: float | None = setting(None, "sequential, not from the page cache", "bytes/s", gt=0)
    kernels: Annotated[tuple[Kernels, ...], Field(strict=False)] = setting(
        (), "the trainer's kernels on the CPU, by processes and threads", "s"
    )


def default_path() -> Path:
    """Where this machine's entry is kept: $XDG_CONFIG_HOME/puna/hardware/this-machine.toml (~/.config if unset)."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "puna" / "hardware" / "this-machine.toml"


def units() -> dict[str, str]:
    """The unit of every key that has one."""
    extras = {key: field.json_schema_extra for key, field in Hardware.model_fields.items()}
    found = {key: str(extra["unit"]) for key, extra in extras.items() if isinstance(extra, dict)}
    return {key: unit for key, unit in found.items() if unit}


def write(hardware: Hardware, path: Path) -> None:
    """Write an entry; a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    values = hardware.model_dump(exclude_none=True) | {"units": units()}
    temporary.write_text(HEADER + tomli_w.dumps(values), encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> Hardware:
    """Read an entry. Raises DataError, which names the file and the key."""
    again = "Write it again: puna doctor."
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"There is no hardware entry {path}", "Write it: puna doctor.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not TOML: {error}", again) from error
    values.pop("units", None)
    try:
        return Hardware.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {key}: {first['msg']}", again) from error
