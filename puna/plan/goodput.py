"""What failures cost: the share of the time that becomes training, and how often to save."""

import math
from typing import Any

DAYS, GPUS, UNEXPECTED = 54.0, 16384, 419
"""The Llama 3 405B pre-training window: 419 unexpected interruptions (arXiv 2407.21783, section 3.3.4, table 5)."""
CAUSES = {
    "faulty GPU": 148, "GPU HBM3 memory": 72, "software bug": 54, "network switch or cable": 35,
    "host maintenance": 32, "GPU SRAM memory": 19, "GPU system processor": 17, "network card": 7,
    "NCCL watchdog": 7, "silent data corruption": 6, "GPU thermal": 6, "SSD": 3, "power supply": 3,
    "server chassis": 2, "IO expansion board": 2, "dependency": 2, "CPU": 2, "system memory": 2,
}  # fmt: skip


def failures_per_second(gpus: int) -> float:
    """Unexpected interruptions of a job, in proportion to its devices."""
    return UNEXPECTED / (DAYS * 86400) * gpus / GPUS


def goodput(gpus: int, save: float = 15.0, restart: float = 300.0) -> dict[str, Any]:
    """The best checkpoint interval (Young 1974; Daly 2006: sqrt(2 save / rate)) and the share of time that trains.

    save: seconds that a checkpoint stops the job; restart: seconds from a failure to the first new step. The defaults
    give what the same section reports, more than 90 % of the time, on 16,384 devices.
    """
    rate = failures_per_second(gpus)
    interval = math.sqrt(2 * save / rate)
    lost = save / (interval + save) + rate * (restart + interval / 2)
    return {
        "mean_hours_between_failures": 1 / rate / 3600,
        "checkpoint_every_s": interval,
        "share_that_trains": max(0.0, 1 - lost),
    }
