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
ALIKE = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")  # every rank puts in the same shapes


@dataclass(frozen=True)
class Call:
    """One collective as this rank made it; two ranks' calls of the same group and number are one collective."""

    group: str
    number: int
    what: str  # operation; also dtype and shape of what goes in, where they are the same on every rank
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
    entries = [e for text in texts for e in json.loads(text).get("entries", ()) if not e["is_p2p"]]
    entries.sort(key=lambda entry: entry["time_created_ns"])
    return [_call(entry) for entry in deque(entries, TOLD)]


def _call(entry: dict[str, Any]) -> Call:
    name, description = entry["process_group"]
    operation = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
    tensors = (
        zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
        if any(name in operation for name in ALIKE)
        else ()
    )
    return Call(
        group=f"{description or 'group'} ({name})",
        number=entry["collective_seq_id"],
        what=" ".join([operation, *(f"{dtype}{shape}" for dtype, shape in tensors)]),
        waits=not (entry["retired"] or entry["state"] == "completed"),
        began=entry["time_created_ns"] / 1e9,
    )
