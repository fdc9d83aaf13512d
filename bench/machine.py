"""What a figure was measured on: goes into every result."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "numba", "transformers")


def facts() -> dict[str, str]:
    """The processor, its vector unit and the cores this process may use; Python and packages with their versions."""
    cores = len(os.sched_getaffinity(0))
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    return {
        "machine": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores",
        "python": platform.python_version(),
    } | versions


def _installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
