"""Out of memory: how it looks from inside, how much a process may hold, and what the kernel did about it."""

import errno
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

_REFUSED = re.compile(r"can't allocate memory|cannot allocate memory|out of memory|bad_alloc", re.I)
_GROUPS = (
    ("", Path("/sys/fs/cgroup"), "memory.max"),
    ("memory", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the system refused memory: CUDA's allocator, torch's for the CPU, Python or the system."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _REFUSED.search(str(error)) is not None


def limit_bytes(num_processes: int = 1) -> int:
    """Bytes that each of so many processes of this job may hold (Linux).

    An equal share of the machine's memory, or of what a control group allows, and no more than RLIMIT_AS.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = min([machine, *_group_limits()]) // num_processes
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return share if space == resource.RLIM_INFINITY else min(share, space)


def _group_limits() -> Iterator[int]:
    """Of this process's control groups and all groups around them, of either version."""
    table = Path("/proc/self/cgroup")
    for line in table.read_text(encoding="utf-8").splitlines() if table.is_file() else ():
        _, controllers, name = line.split(":", 2)
        for controller, root, file in _GROUPS:
            if controller in controllers.split(","):
                inner = root / name.lstrip("/")
                yield from map(
                    _bytes, (folder / file for folder in (inner, *inner.parents) if folder.is_relative_to(root))
                )


def _bytes(path: Path) -> int:
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else "max"
    return int(text) if text.isdecimal() else 1 << 62


def kernel_kills() -> int:
    """Processes that the kernel has ended for lack of memory since the machine started; 0 where it does not tell."""
    path = Path("/proc/vmstat")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
