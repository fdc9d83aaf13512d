"""What a job of the store comes to: a run under an arm, with the monitor or without, with the controller or without."""

from typing import Any

from puna.lab import adam_arms, adam_run, adam_trial
from puna.lab.adam_spec import Job
from puna.train.config import HealthConfig

ARMS = ("nothing", "clip", "zclip", "stable_adamw", "controller")
"""Of the table of rescues."""


PLAIN = {"clip": adam_arms.Remedy({}, adam_arms.Clip), "zclip": adam_arms.Remedy({}, adam_arms.ZClipped)}


def do(job: Job) -> dict[str, Any]:
    """Train the run of a job; its figures."""
    remedy = (adam_arms.MITIGATIONS | PLAIN).get(job.arm, adam_arms.Remedy({}))
    acts = {"act": True} if remedy.act else {}
    health = HealthConfig(**acts | job.health) if job.watch or remedy.act else None
    make = adam_run.make_stable if job.arm == "stable_adamw" else adam_run.make_optimizer
    spec = job.spec.model_copy(update=remedy.settings)
    return adam_trial.train(spec, health=health, arm=remedy.arm, optimizer=make) | {"arm": job.arm}
