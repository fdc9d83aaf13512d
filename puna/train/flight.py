"""PyTorch's flight recorder: a ring of the latest collectives of this process, switched on and read."""

import json
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

RING = 2_000  # collectives that are remembered
TOLD = 64  # of which the newest are told


@dataclass(frozen=True)
class Call:
    """One collective as this rank made it; two ranks' calls of the same group and number are one collective."""

    group: str
    number: int
    what: str  # operation, shapes and dtype of what goes in
    waits: bool  # begun and not over
    began: float = 0.0  # seconds since 1970


def switch_on(run: Path) -> None:
    """Have collectives recorded, and NCCL's written to RUN/watch when one times out; before the process group is made.

    What the environment says already is left as it is.
    """
    target = str(Path(run).absolute() / "watch" / "nccl-rank-")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RING))
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", target)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def calls() -> list[Call]:
    """The newest collectives of this process, oldest first, whatever their group."""
    texts = [c10d._dump_fr_trace_json(True, False)]  # type: ignore[attr-defined]
    if dist.is_nccl_available():
        texts.append(c10d._dump_nccl_trace_json(True, False))  # type: ignore[attr-defined]
    entries = [entry for text in texts for entry in json.loads(text).get("entries", ())]
    entries.sort(key=lambda entry: entry["time_created_ns"])
    return [_call(entry) for entry in deque(entries, TOLD)]


def _call(entry: dict[str, Any]) -> Call:
    name, description = entry["process_group"]
    shapes = " ".join(
        f"{dtype}{shape}" for dtype, shape in zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
    )
    operation = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
    return Call(
        group=f"{description or 'group'} ({name})",
        number=entry["collective_seq_id"],
        what=f"{operation} {shapes}".strip(),
        waits=not (entry["retired"] or entry["state"] == "completed"),
        began=entry["time_created_ns"] / 1e9,
    )
