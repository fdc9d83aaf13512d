"""Levels 3 and 4 of the controller: a batch left out, a return to a good checkpoint, and what that leaves behind."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from puna.train.actions import Limits, Recovery, Verdict, action, ramp
from puna.train.trend import Trend, deviations

Records = tuple[dict[str, Any], ...]


@dataclass
class _Spike:
    """A rise of the loss that is confirmed and not over."""

    onset: int
    confirmed: int


@dataclass
class _Return:
    """A return to the checkpoint of step `to`; `number` 2: the second one in a short time."""

    onset: int
    to: int
    number: int


class SpikeJudge:
    """Decides from the loss and the global gradient norm of each step; both are the same on every rank."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._norms, self._calm_norms = Trend(), 0
        self._skips: list[int] = []
        self._losses: list[float] = []  # usual ones, the newest last
        self._high: list[float] = []  # those above them, in a row up to now
        self._recent: list[float] = []  # the newest that were not far above those before
        self._num_lost = 0  # losses far above the recent ones, in a row up to now
        self._spike: _Spike | None = None
        self._returns: list[_Return] = []
        self._serious: list[list[int]] = []  # first and last step of times with actions of level 2 or more

    def judge(self, step: int, loss: float, norm: float, blame: str = "") -> Verdict:
        """What to do with step `step` (1: the first), whose gradients are there and whose weights are not changed yet.

        loss, norm: mean loss and global gradient norm before clipping, finite or not; blame: then, why not, if known.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._not_finite(step, loss, norm, blame)
        skips = self._bad_batch(step, norm)
        self._compare(loss)
        z = self._watch_loss(step, loss)
        if skips and len(self._skips) > self.limits.max_skips:
            return self._leave(step, self._skips[0], "skips", len(self._skips), self.limits.max_skips, skips)
        if self._spike and not self._may_pass(step, self._spike):
            return self._leave(step, self._spike.onset, "loss_z", z, self.limits.loss_z, skips)
        return Verdict("skip" if skips else "go", records=skips)

    def note(self, step: int) -> None:
        """An action of level 2 or more is taken at this step: checkpoints not long before it are not good."""
        if self._serious and step - self._serious[-1][1] <= self.limits.good_after:
            self._serious[-1][1] = step
        else:
            self._serious.append([step, step])

    @property
    def lost(self) -> bool:
        """Whether the newest loss is far above recent ones; false again after a while, if it stays there."""
        return self._num_lost > 0

    # --- what roll-backs leave behind ---

    def recovery(self, step: int) -> Recovery:
        """For a step: a function of the roll-backs and the step alone."""
        rate, beta2, reset, first = 1.0, 1.0, False, False
        for back in self._returns:
            since = step - 1 - back.to
            first = first or since == 0
            if back.number > 1:
                rate *= self.limits.rate_again * ramp(since, self.limits.ramp_steps)
                beta2, reset = self.limits.beta2_again, reset or since == 0
            elif since < self.limits.rate_steps:
                rate *= self.limits.rate_after
            else:
                risen = ramp(since - self.limits.rate_steps, self.limits.ramp_steps)
                rate *= self.limits.rate_after + (1 - self.limits.rate_after) * risen
        return Recovery(rate, beta2, reset, first)

    def returned(self, state: dict[str, Any], to: int, onset: int, now: int) -> dict[str, Any]:
        """The `state` of a judge of step `to`, and that the run came back to it at step `now`."""
        before = [asdict(back) | {"to": min(back.to, to)} for back in self._returns]
        return state | {"returns": [*before, asdict(_Return(onset, to, self._number(now)))]}

    # --- which checkpoints are good ---

    def good(self, steps: Iterable[int], now: int) -> list[int]:
        """Those checkpoints that were followed by a while without level 2 or more, oldest first."""
        return sorted(step for step in steps if now - step >= self.limits.good_after and not self._disturbed(step))

    def undecided(self, steps: Iterable[int], now: int) -> list[int]:
        """Those checkpoints that may still become good, oldest first."""
        return sorted(step for step in steps if now - step < self.limits.good_after and not self._disturbed(step))

    def _disturbed(self, step: int) -> bool:
        return any(first <= step + self.limits.good_after and last > step for first, last in self._serious)

    # --- state ---

    def state(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "norms": asdict(self._norms),
            "calm_norms": self._calm_norms,
            "skips": self._skips,
            "losses": self._losses,
            "high": self._high,
            "recent": self._recent,
            "num_lost": self._num_lost,
            "spike": asdict(self._spike) if self._spike else None,
            "returns": [asdict(back) for back in self._returns],
            "serious": self._serious,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """From the manifest."""
        self._norms, self._calm_norms = Trend(**state["norms"]), state["calm_norms"]
        self._skips, self._losses, self._high = list(state["skips"]), list(state["losses"]), list(state["high"])
        self._recent, self._num_lost = list(state["recent"]), state["num_lost"]
        self._spike = _Spike(**state["spike"]) if state["spike"] else None
        self._returns = [_Return(**back) for back in state["returns"]]
        self._serious = [list(time) for time in state["serious"]]

    # --- level 3 ---

    def _bad_batch(self, step: int, norm: float) -> Records:
        """A record of a skip where the norm is far above usual ones; for the average it is then at the threshold."""
        z = self._norms.z(norm)
        unusual = z > self.limits.norm_z and norm > self.limits.norm_ratio * self._norms.mean
        calm, self._calm_norms = self._calm_norms, 0 if unusual else self._calm_norms + 1
        reason = f"the gradient norm is {norm:.4g}, and {self._norms.mean:.4g} on the average"
        self._norms.add(self._norms.mean + self.limits.norm_z * self._norms.deviation if unusual else norm)
        self._skips = [before for before in self._skips if step - before < self.limits.skip_window]
        if not unusual or calm < self.limits.calm_norms:
            return ()
        self._skips.append(step)
        return (self._skip(step, "norm_z", z, self.limits.norm_z, f"{reason}: the batch is left out"),)

    def _skip(self, step: int, statistic: str, value: float, threshold: float, reason: str) -> dict[str, Any]:
        self.note(step)
        return action(step, 3, "skip", reason, statistic=statistic, value=value, threshold=threshold)

    # --- level 4 ---

    def _not_finite(self, step: int, loss: float, norm: float, blame: str) -> Verdict:
        name, value = ("grad_norm", norm) if math.isfinite(loss) else ("loss", loss)
        skipped = self._skip(step, name, value, math.inf, blame or f"the {name} is {value}: no weight changes")
        return self._leave(step, step, name, value, math.inf, (skipped,))

    def _compare(self, loss: float) -> None:
        """With the recent losses, which takes less to be unusual than to be a spike."""
        z = deviations(loss, self._recent, self.limits.min_scale) if len(self._recent) >= self.limits.recent else 0.0
        if z > self.limits.loss_z and self._num_lost < self.limits.max_lost:
            self._num_lost += 1
        else:
            self._num_lost = 0
            self._recent = [*self._recent, loss][-self.limits.recent :]

    def _watch_loss(self, step: int, loss: float) -> float:
        """Robust z of the loss; a spike begins where it is high for some steps in a row, and ends where it is not."""
        known = len(self._losses) >= self.limits.min_losses
        z = deviations(loss, self._losses, self.limits.min_scale) if known else 0.0
        if z <= self.limits.loss_z:
            self._spike, self._high = None, []
            self._losses = [*self._losses, loss][-self.limits.window :]
            return z
        self._high.append(loss)
        if not self._spike and len(self._high) >= self.limits.spike_steps:
            self._spike = _Spike(step - len(self._high) + 1, step)
        return z

    def _may_pass(self, step: int, spike: _Spike) -> bool:
        """Whether it is too early to say that the spike stays, or it falls and has not lasted too long."""
        self.note(step)
        age, size = step - spike.confirmed, self.limits.slope_steps
        if age < 2 * size:
            return True
        falls = median(self._high[-size:]) < median(self._high[-2 * size : -size])
        return falls and age < self.limits.wait

    def _leave(
        self, step: int, onset: int, statistic: str, value: float, threshold: float, records: Records
    ) -> Verdict:
        """Roll back, or stop where that was done too often."""
        self.note(step)
        number = self._number(step)
        again = f"; it is the {number}. time within {self.limits.again_steps} steps" if number > 1 else ""
        reason = f"{statistic} is {value:.4g}, since step {onset}{again}"
        stops = number > 2
        name = "stop" if stops else "roll back"
        record = action(step, 4, name, reason, statistic=statistic, value=value, threshold=threshold)
        return Verdict("stop" if stops else "roll_back", onset, reason, (*records, record))

    def _number(self, step: int) -> int:
        """Of a roll-back at this step: one more than the last one's, if that was not long ago."""
        if not self._returns or step - self._returns[-1].to > self.limits.again_steps:
            return 1
        return self._returns[-1].number + 1
