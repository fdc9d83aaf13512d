"""What a job of the store comes to: a run under an arm, with the monitor or without, with the controller or without."""

from typing import Any

from puna.lab import adam_arms, adam_run, adam_trial
from puna.lab.adam_store import Job
from puna.train.config import HealthConfig

ARMS = ("nothing", "clip", "zclip", "stable_adamw", "controller")
"""Of the table of rescues."""


def do(job: Job) -> dict[str, Any]:
    """Train the run of a job; its figures."""
    if job.arm in adam_arms.MITIGATIONS:
        remedy = adam_arms.MITIGATIONS[job.arm]
        spec = job.spec.model_copy(update=remedy.settings)
        health = HealthConfig(**({"act": True} if remedy.act else {}) | job.health) if job.watch or remedy.act else None
        return adam_trial.train(spec, health=health, arm=remedy.arm) | {"arm": job.arm}
    plain = {"clip": adam_arms.Clip, "zclip": adam_arms.ZClipped}.get(job.arm)
    health = HealthConfig(**job.health) if job.watch else None
    make = adam_run.make_stable if job.arm == "stable_adamw" else adam_run.make_optimizer
    return adam_trial.train(job.spec, health=health, arm=plain, optimizer=make) | {"arm": job.arm}
