"""What the operating system says of this machine. No torch here, and nothing fails where something is not told."""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from puna import __version__

PACKAGES = (
    "torch", "numpy", "safetensors", "tokenizers", "tiktoken", "sentencepiece", "transformers", "fastapi",
    "tensorboard",
)  # fmt: skip
MATRIX_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "asimdhp",
    "bf16",
)  # fmt: skip
"""Instructions on which the speed of matrices hangs, as /proc/cpuinfo names them."""


@dataclass(frozen=True)
class Machine:
    """cpu, memory and load are None where the system does not tell. num_cores: those this process may use. quota_cores:
    what a container may use of them. load: processes that wanted to run, over the last minute. flags: MATRIX_FLAGS."""

    system: str
    cpu: str | None
    flags: tuple[str, ...]
    num_cores: int
    quota_cores: float | None
    memory: int | None
    memory_available: int | None
    load: float | None
    has_nvidia: bool
    has_compiler: bool


def read_machine(root: Path = Path("/")) -> Machine:
    """This machine; `root` holds proc and sys."""
    cpu = _fields(root / "proc" / "cpuinfo")
    memory = _fields(root / "proc" / "meminfo")
    flags = (cpu.get("flags") or cpu.get("Features", "")).split()
    return Machine(
        system=platform.platform(),
        cpu=cpu.get("model name") or platform.processor() or None,
        flags=tuple(flag for flag in MATRIX_FLAGS if flag in flags),
        num_cores=len(os.sched_getaffinity(0)),
        quota_cores=_quota(_text(root / "sys" / "fs" / "cgroup" / "cpu.max")),
        memory=_bytes(memory.get("MemTotal", "")),
        memory_available=_bytes(memory.get("MemAvailable", "")),
        load=_load(),
        has_nvidia=(root / "proc" / "driver" / "nvidia" / "version").exists() or bool(shutil.which("nvidia-smi")),
        has_compiler=bool(shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    )


def versions() -> dict[str, str | None]:
    """Versions of Puna, Python and the packages it stands on; None for one that is not installed."""
    return {"puna": __version__, "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _fields(file: Path) -> dict[str, str]:
    """The first `key: value` of every key."""
    pairs = [line.split(":", 1) for line in _text(file).splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in reversed(pairs)}


def _bytes(words: str) -> int | None:
    number = words.partition(" ")[0]
    return int(number) * 1024 if number.isdigit() else None


def _quota(words: str) -> float | None:
    """Cores of a cgroup's cpu.max: `quota period` in microseconds, or `max period`."""
    quota, _, period = words.partition(" ")
    return int(quota) / int(period) if quota.isdigit() else None


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
