"""The controller: acts on what the health monitor sees, within bounds, the same on every rank; all of it replayable.

Levels 1 and 2 change single tensors in the optimiser's step hooks, so they work in any training loop. Levels 3 and 4
(leave a batch out, return to a checkpoint) are verdicts that the loop carries out.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from puna.train.actions import Limits, Plan, Recovery, Symptoms, Verdict, action
from puna.train.adam_stats import Watched
from puna.train.config import HealthConfig
from puna.train.detector import Reading
from puna.train.levers import Levers
from puna.train.spike_judge import SpikeJudge
from puna.train.tensor_guard import TensorGuard

TOGETHER = {"surge", "lurch", "leap", "chorus"}
"""Rules of the detector on what half of the tensors do at once."""


@dataclass(frozen=True)
class Target:
    """The checkpoint that a run returns to, and whether it is a good one or merely the best there is."""

    step: int
    good: bool


def limits_of(config: HealthConfig) -> Limits:
    """The bounds that the settings come to."""
    return Limits(
        burst=config.surprise,
        stall=config.stall,
        aligned=config.lag_cosine,
        loss_z=config.loss_z,
        norm_z=config.norm_z,
        good_after=config.good_after,
        margin=config.margin,
        wait=config.wait,
        rate_steps=config.recover,
    )


class Controller:
    """Acts for a monitor (its `actor`), and judges steps for a loop. limits: else those of the settings."""

    def __init__(self, config: HealthConfig, limits: Limits | None = None) -> None:
        self.limits = limits or limits_of(config)
        self.skipped = False  # whether the newest update was left out in the optimiser's hook
        self._guard, self._judge, self._levers = TensorGuard(self.limits), SpikeJudge(self.limits), Levers()

    # --- in the optimiser's hooks ---

    def before_update(self, reading: Reading, tensors: Sequence[Watched]) -> list[dict[str, Any]]:
        """Set rates, epsilons and moments for the update that comes. Returns the actions' records."""
        plan = self._plan(reading, tensors)
        self.skipped = plan.skip
        if any(record["level"] > 1 for record in plan.records):
            self._judge.note(reading.step)
        for optimizer, parameters in _by_optimizer(tensors).items():
            self._levers.engage(optimizer, parameters, plan)
        return list(plan.records)

    def after_update(self, tensors: Sequence[Watched]) -> None:
        """Put the parameter groups back as they were."""
        for optimizer in _by_optimizer(tensors):
            self._levers.release(optimizer)

    def eps_of(self, name: str, eps: float) -> float:
        """The epsilon that a tensor is updated with, where its group has `eps`."""
        return self._guard.eps_of(name, eps)

    # --- for the loop ---

    def judge(self, step: int, loss: float, norm: float, blame: str = "") -> Verdict:
        """What to do with step `step` (1: the first) as a whole, once its gradients are there.

        loss, norm: mean loss and global gradient norm before clipping; not finite where they are not, and then `blame`
        may say what is to blame.
        """
        return self._judge.judge(step, loss, norm, blame)

    def recovery(self, step: int) -> Recovery:
        """What roll-backs leave behind for a step: a rate, a bound on beta 2, whether moments begin anew."""
        return self._judge.recovery(step)

    def stays(self, steps: Collection[int], now: int) -> frozenset[int]:
        """Checkpoints that are not dropped: the newest good ones, and those that may still become good."""
        return frozenset(self._judge.good(steps, now)[-self.limits.num_good :]) | {*self._judge.undecided(steps, now)}

    def target(self, steps: Collection[int], onset: int, now: int) -> Target | None:
        """Where to return to: the newest good checkpoint at least `margin` steps before the onset.

        Without one, the newest that is so early; without that, the first of the run if it is before the onset.
        """
        latest = onset - self.limits.margin
        if good := [step for step in self._judge.good(steps, now) if step <= latest]:
            return Target(good[-1], good=True)
        early = [step for step in steps if step <= latest] or [step for step in sorted(steps)[:1] if step < onset]
        return Target(max(early), good=False) if early else None

    def passes(self, onset: int, now: int) -> int:
        """So many steps' data after step `now` is passed over, beside that since the checkpoint that is returned to."""
        return max(now - onset, self.limits.margin)

    def returned(self, numbers: dict[str, Any] | None, to: int, onset: int, now: int) -> dict[str, Any]:
        """What a controller of step `to` knew (its `numbers`), and that the run came back to it at step `now`.

        None: there was no controller then.
        """
        known = numbers or {"guard": TensorGuard(self.limits).state(), "judge": SpikeJudge(self.limits).state()}
        return known | {"judge": self._judge.returned(known["judge"], to, onset, now)}

    # --- state ---

    def numbers(self) -> dict[str, Any]:
        """All of it, as JSON: for the manifest."""
        return {"guard": self._guard.state(), "judge": self._judge.state()}

    def restore(self, numbers: dict[str, Any]) -> None:
        """From `numbers`."""
        self._guard.restore(numbers["guard"])
        self._judge.restore(numbers["judge"])

    def _plan(self, reading: Reading, tensors: Sequence[Watched]) -> Plan:
        bad = [
            name for name, count in zip(reading.names, reading.statistics["num_nonfinite"], strict=True) if count > 0
        ]
        if bad:
            reason = f"the gradient of {bad[0]} ({len(bad)} such) is not finite: no weight changes"
            record = action(reading.step, 3, "skip", reason, statistic="num_nonfinite", value=len(bad), threshold=0)
            return Plan(skip=True, records=(record,))
        return self._guard.tune(reading.step, _symptoms(reading, tensors), _alarmed(reading), lost=self._judge.lost)

    def release(self) -> None:
        """Put all parameter groups back as they were; for a monitor that ends between the two hooks."""
        self._levers.release_all()


def most_held(config: HealthConfig, every: int) -> int:
    """Most checkpoints, saved every so many steps, that stay for the controller."""
    return 1 + limits_of(config).num_good + -(-config.good_after // every) if config.act else 0


def _symptoms(reading: Reading, tensors: Sequence[Watched]) -> dict[str, Symptoms]:
    """Of each tensor that has something to tell."""
    columns = [reading.statistics[name].tolist() for name in ("surprise", "stall", "lag_cosine", "update_ratio")]
    watched = {tensor.name: tensor for tensor in tensors}
    found: dict[str, Symptoms] = {}
    for name, surprise, stall, lag, ratio, age in zip(reading.names, *columns, reading.ages.tolist(), strict=True):
        if not math.isnan(surprise) and name in watched:
            eps, floor = watched[name].group["eps"], _eps_floor(watched[name])
            found[name] = Symptoms(surprise, stall, lag, ratio, age, eps, floor)
    return found


def _eps_floor(tensor: Watched) -> float:
    """Smallest epsilon that still bounds an update: below it g^2 is lost in the second moment's dtype, g is not."""
    return math.sqrt(torch.finfo(tensor.optimizer.state[tensor.parameter]["exp_avg_sq"].dtype).tiny)


def _alarmed(reading: Reading) -> list[str]:
    """Tensors that raise the alarm in this very step; all of them where it is what half of them do at once."""
    alarms = [evidence for evidence in reading.status.evidence if evidence.level == "alarm"]
    together = any(not alarm.tensor and alarm.rule in TOGETHER for alarm in alarms)
    return list(reading.names) if together else sorted({alarm.tensor for alarm in alarms if alarm.tensor})


def _by_optimizer(tensors: Sequence[Watched]) -> dict[Optimizer, dict[str, torch.nn.Parameter]]:
    found: dict[Optimizer, dict[str, torch.nn.Parameter]] = {}
    for tensor in tensors:
        found.setdefault(tensor.optimizer, {})[tensor.name] = tensor.parameter
    return found
