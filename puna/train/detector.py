"""From statistics to a state: documented rules, calm -> watch -> alarm, with the evidence. NumPy only.

Thresholds are those of `HealthConfig`; r is the update over the rate, as it is about to be applied. "Usual" is a
running mean of a tensor's logarithm, whose innovations are cut at a factor 2; "rise" is a value over its usual.

| rule on a tensor | fires where | state |
|---|---|---|
| burst | surprise, gradient RMS over what the second moment expects, is above `surprise` | watch |
| jump | r has RMS above `u_rms`, a share `f9` beyond 0.9, two peaks (`bimodality`), and twice its usual RMS | watch |
| stall | the median of sqrt(v) is below `stall` epsilons for 10 steps | watch |
| floor | more than `below_eps` of sqrt(v) are below epsilon for 10 steps | watch |
| correlated | the running mean (0.9) of the cosine of successive gradients is above `lag_cosine` for 10 steps | watch |
| adrift | the cosine of r and gradient is below `descent_cosine` while r has RMS above 0.5, for 3 steps | watch |
| steep | StableAdamW's RMS is above `stable_rms` and twice its usual | watch |
| stride | update over weights has a rise above `update_ratio` | watch |
| | a rise above `stride`, and is itself above `stride_size` | alarm |
| nonfinite | a gradient or moment is not finite | alarm |

| rule on the run | fires where | state |
|---|---|---|
| surge | the median of the surprise, over tensors older than `surge_age`, is above `surge` | alarm |
| lurch | the median rise of update over weights is above `lurch`, the median itself above `lurch_size` | alarm |
| leap | the median rise of update over weights is above `leap` | alarm |
| chorus | the median RMS of r is above `chorus`, its median rise above `chorus_rise` | alarm |
| loss | the robust z of the loss is above `loss_z` for 3 steps, or it is not finite | alarm |
| norm | the robust z of the logarithm of the global gradient norm is above `norm_z` | watch |
| logits | the largest attention logit is above `max_logit` | watch |

Single tensors burst in healthy runs too (queries and keys, when attention forms), so one tensor alone is watched, and
alarms only where its update is large; what half of the tensors do at once is the coherent burst of the theory.

What is normal: coordinates that never had a gradient are not counted; a tensor without any has no statistics. In the
first 3 / (1 - b1) steps of a tensor, from its first gradient or a reset, r is +-1 by construction and gradients are
alike, so all rules wait but stall, floor and nonfinite. For `settle` steps after `announce`, rises count half.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from puna.train.config import HealthConfig

State = Literal["calm", "watch", "alarm"]
Level = Literal["watch", "alarm"]
Numbers = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

MAX_EVIDENCE = 64
WINDOW, WINDOW_LEAST = 100, 20  # steps of the robust z; steps below which there is none
BEYOND = 1e6  # severity of what has no threshold
USUAL_RATE, USUAL_CUT = 0.05, float(np.log(2))
STALLED_SLOWER = 10
LAG_DECAY = 0.9


@dataclass(frozen=True)
class Evidence:
    """One rule that fired: on which tensor ("" for the whole run), on what value, against which threshold."""

    tensor: str
    layer: str
    rule: str
    statistic: str
    value: float
    threshold: float
    level: Level = "watch"

    @property
    def strength(self) -> float:
        """How far beyond its threshold the value is, on either side."""
        return abs(np.log(max(abs(self.value), 1e-12) / max(abs(self.threshold), 1e-12)))


@dataclass(frozen=True)
class Status:
    """What the detector thinks at a step.

    evidence: of this very step, alarms first, then in the order in which it began; a state outlives it by `hold` steps.
    score: the largest value of an alarm rule as a multiple of its threshold (1: at alarm).
    """

    state: State = "calm"
    step: int = 0
    evidence: tuple[Evidence, ...] = ()
    score: float = 0.0


@dataclass(frozen=True)
class Reading:
    """What one look before an update came to. Arrays are by tensor, in the order of `names`; NaN: nothing to tell."""

    step: int
    names: tuple[str, ...]
    layers: tuple[str, ...]
    statistics: Mapping[str, Numbers]  # by statistic
    ages: Integers  # steps with gradients since a tensor's first one, or its reset
    settled: Flags  # older than 3 / (1 - b1): r is no longer +-1 by construction
    loss: float | None = None
    grad_norm: float | None = None  # as given, else estimated from the sample
    companions: Mapping[str, float] = field(default_factory=dict)  # max_logit, z: newest values, where they are given
    status: Status = Status()


@dataclass(frozen=True)
class Rule:
    """A rule as records tell it: thresholds of `statistic` that make a watch and an alarm after `steps` steps."""

    rule: str
    statistic: str
    watch: float | None
    alarm: float | None
    steps: int = 1
    when: Literal["above", "below"] = "above"


def rules(config: HealthConfig) -> tuple[Rule, ...]:
    """All rules, those of tensors first."""
    return (
        Rule("burst", "surprise", config.surprise, None),
        Rule("jump", "u_rms", config.u_rms, None),
        Rule("stall", "stall", config.stall, None, 10, "below"),
        Rule("floor", "below_eps", config.below_eps, None, 10),
        Rule("correlated", "lag_cosine", config.lag_cosine, None, 10),
        Rule("adrift", "descent_cosine", config.descent_cosine, None, 3, "below"),
        Rule("steep", "stable_rms", config.stable_rms, None),
        Rule("stride", "update_ratio", None, config.stride_size),
        Rule("nonfinite", "num_nonfinite", None, 0.0),
        Rule("surge", "surprise", None, config.surge),
        Rule("lurch", "update_ratio", None, config.lurch_size),
        Rule("leap", "update_rise", None, config.leap),
        Rule("chorus", "u_rms", None, config.chorus),
        Rule("loss", "loss_z", None, config.loss_z, 3),
        Rule("norm", "norm_z", config.norm_z, None),
        Rule("logits", "max_logit", config.max_logit, None),
    )


Found = tuple[int, Evidence]
"""Step since when, and what fired."""

TENSOR_RULES = 9  # of `rules`, those that look at one tensor


@dataclass
class _Memory:
    """Running figures by tensor; all of them in a checkpoint."""

    lag: Numbers
    usual: dict[str, Numbers]  # running mean of the logarithm, by statistic; NaN before the first
    streaks: Integers  # (TENSOR_RULES, tensors): steps in a row

    @classmethod
    def fresh(cls, count: int) -> "_Memory":
        """Of tensors that have not been seen yet."""
        usual = {key: np.full(count, np.nan) for key in ("u_rms", "update_ratio", "stable_rms")}
        return cls(np.full(count, np.nan), usual, np.zeros((TENSOR_RULES, count), np.int64))


@dataclass(frozen=True)
class _Look:
    """A rule's view of all tensors: values and thresholds for the evidence, and how far it is to a watch and an alarm,
    as multiples of what makes them (an `and` of conditions has the least of theirs)."""

    value: Numbers
    watch: Numbers | None = None
    watch_at: Numbers | None = None
    alarm: Numbers | None = None
    alarm_at: Numbers | None = None


class Detector:
    """Turns readings into a status; its memory (running means, streaks) is part of a checkpoint."""

    def __init__(self, config: HealthConfig) -> None:
        self.config, self.rules = config, rules(config)
        self.status = Status()
        self._names: tuple[str, ...] = ()
        self._memory = _Memory.fresh(0)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._loss_zs: deque[float] = deque(maxlen=3)
        self._last = {"watch": -1, "alarm": -1}  # newest steps with such evidence
        self._announced, self._settled_at = -1, -1  # step of a change, step up to which thresholds are wider for it

    @np.errstate(all="ignore")
    def judge(self, reading: Reading) -> Status:
        """The status after one more reading."""
        self._know(reading.names)
        if self._announced == reading.step:
            self._settled_at = reading.step + self.config.settle
        severity, found = self._tensors(reading)
        run_severity, run_found = self._run(reading)
        found += run_found
        self._learn(reading)
        for _, evidence in found:
            self._last[evidence.level] = reading.step
        recent = {level: 0 <= reading.step - last < self.config.hold for level, last in self._last.items() if last >= 0}
        state: State = "alarm" if recent.get("alarm") else "watch" if recent.get("watch") else "calm"
        found.sort(key=lambda entry: (entry[1].level != "alarm", entry[0], entry[1].tensor != "", -entry[1].strength))
        told = tuple(evidence for _, evidence in found[:MAX_EVIDENCE])
        self.status = Status(state, reading.step, told, max(severity, run_severity))
        return self.status

    def announce(self, step: int) -> None:
        """The rate, the batch or the data change at this step on purpose: some thresholds are wider for a while."""
        self._announced = step

    def forget(self, names: tuple[str, ...]) -> None:
        """These tensors were reset: their running figures begin anew."""
        fresh, chosen = _Memory.fresh(len(self._names)), np.isin(self._names, names)
        for key, values in self._memory.usual.items():
            values[chosen] = fresh.usual[key][chosen]
        self._memory.lag[chosen] = np.nan
        self._memory.streaks[:, chosen] = 0

    def numbers(self) -> dict[str, Any]:
        """Everything the detector remembers, as JSON."""
        memory = self._memory
        return {
            "names": list(self._names),
            "lag": _listed(memory.lag),
            "usual": {key: _listed(values) for key, values in memory.usual.items()},
            "streaks": memory.streaks.tolist(),
            "losses": list(self._losses),
            "norms": list(self._norms),
            "loss_zs": list(self._loss_zs),
            "last": dict(self._last),
            "announced": [self._announced, self._settled_at],
            "status": {
                "state": self.status.state,
                "step": self.status.step,
                "score": self.status.score,
                "evidence": [vars(evidence) for evidence in self.status.evidence],
            },
        }

    def restore(self, numbers: dict[str, Any]) -> None:
        """From `numbers`."""
        self._names = tuple(numbers["names"])
        self._memory = _Memory(
            _array(numbers["lag"]),
            {key: _array(values) for key, values in numbers["usual"].items()},
            np.array(numbers["streaks"], np.int64).reshape(TENSOR_RULES, -1),
        )
        for ring, key in ((self._losses, "losses"), (self._norms, "norms"), (self._loss_zs, "loss_zs")):
            ring.clear()
            ring.extend(numbers[key])
        self._last = dict(numbers["last"])
        self._announced, self._settled_at = numbers["announced"]
        status = numbers["status"]
        evidence = tuple(Evidence(**fields) for fields in status["evidence"])
        self.status = Status(status["state"], status["step"], evidence, status["score"])

    def _know(self, names: tuple[str, ...]) -> None:
        """Make room for the tensors of a reading, keeping what is remembered of those that are known."""
        if names is self._names or names == self._names:
            self._names = names
            return
        at = {name: i for i, name in enumerate(self._names)}
        kept = [(i, at[name]) for i, name in enumerate(names) if name in at]
        new, old = (np.array(side, np.int64) for side in zip(*kept, strict=True)) if kept else (np.zeros(0, int),) * 2
        before, memory = self._memory, _Memory.fresh(len(names))
        memory.lag[new], memory.streaks[:, new] = before.lag[old], before.streaks[:, old]
        for key, values in memory.usual.items():
            values[new] = before.usual[key][old]
        self._names, self._memory = names, memory

    def _tensors(self, reading: Reading) -> tuple[float, list[Found]]:
        """Largest severity of the alarms, and what fired."""
        found: list[Found] = []
        severity = 0.0
        looks = self._looks(reading)
        for number, rule in enumerate(self.rules[:TENSOR_RULES]):
            look, streak = looks[rule.rule], self._memory.streaks[number]
            watch, alarm = (
                np.zeros(len(reading.names)) if x is None else np.nan_to_num(x, posinf=BEYOND)
                for x in (look.watch, look.alarm)
            )
            severity = max(severity, float(alarm.max(initial=0.0)))
            streak[:] = np.where((watch > 1) | (alarm > 1), streak + 1, 0)
            for i in np.flatnonzero(streak >= rule.steps):
                level: Level = "alarm" if alarm[i] > 1 else "watch"
                limits = look.alarm_at if level == "alarm" else look.watch_at
                assert limits is not None
                place = (reading.names[i], reading.layers[i], rule.rule, rule.statistic)
                evidence = Evidence(*place, float(look.value[i]), float(limits[i]), level)
                found.append((reading.step - int(streak[i]) + 1, evidence))
        return severity, found

    def _looks(self, reading: Reading) -> dict[str, _Look]:
        """What each rule on tensors looks at."""
        config, found, one = self.config, reading.statistics, np.ones(len(reading.names))
        active = found["num_active"] > 0
        settled = reading.settled & active
        u_rms, steep, ratio = found["u_rms"], found["stable_rms"], found["update_ratio"]
        rise, ratio_rise = self._rise(reading, "u_rms"), self._rise(reading, "update_ratio")
        shape = np.minimum(found["f9"] / config.f9, found["bc"] / config.bimodality)
        jump = np.minimum(np.minimum(u_rms / config.u_rms, rise / 2), shape)
        stride = np.minimum(ratio_rise / config.stride, ratio / config.stride_size)
        usual = ratio / ratio_rise
        drift = np.where(u_rms > 0.5, config.descent_cosine - found["descent_cosine"], 0.0)
        lag = self._running_lag(found["lag_cosine"])
        steeper = np.minimum(steep / config.stable_rms, self._rise(reading, "stable_rms") / 2)
        nonfinite = found["num_nonfinite"] * BEYOND

        def watch(value: Numbers, where: Flags, severity: Numbers, limit: float) -> _Look:
            return _Look(value, np.where(where, severity, 0.0), one * limit)

        return {
            "burst": watch(found["surprise"], settled, found["surprise"] / config.surprise, config.surprise),
            "jump": watch(u_rms, settled, jump, config.u_rms),
            "stall": watch(found["stall"], active, config.stall / found["stall"], config.stall),
            "floor": watch(found["below_eps"], active, found["below_eps"] / config.below_eps, config.below_eps),
            "correlated": watch(lag, settled, lag / config.lag_cosine, config.lag_cosine),
            "adrift": watch(found["descent_cosine"], settled, 1 + drift, config.descent_cosine),
            "steep": watch(steep, settled, steeper, config.stable_rms),
            "stride": _Look(
                ratio,
                np.where(settled, ratio_rise / config.update_ratio, 0.0),
                usual * config.update_ratio,
                np.where(settled, stride, 0.0),
                np.maximum(usual * config.stride, config.stride_size),
            ),
            "nonfinite": _Look(found["num_nonfinite"], alarm=nonfinite, alarm_at=0 * one),
        }

    def _rise(self, reading: Reading, key: str) -> Numbers:
        """A statistic over its usual; of updates over weights half of it while an announced change settles."""
        settling = key == "update_ratio" and reading.step <= self._settled_at
        return reading.statistics[key] / np.exp(self._memory.usual[key]) / (2.0 if settling else 1.0)

    def _running_lag(self, cosine: Numbers) -> Numbers:
        lag = self._memory.lag
        known = np.isfinite(cosine)
        lag[known] = np.where(np.isnan(lag), cosine, LAG_DECAY * lag + (1 - LAG_DECAY) * cosine)[known]
        return np.nan_to_num(lag)

    def _learn(self, reading: Reading) -> None:
        """Move what is usual towards what is, by at most a factor 2 of innovation; where less than half is left of it,
        slowly: a stall does not become what is usual."""
        for key, mean in self._memory.usual.items():
            newest = np.log(reading.statistics[key])
            known = reading.settled & np.isfinite(newest)
            innovation = newest - mean
            rate = np.where(innovation < -USUAL_CUT, USUAL_RATE / STALLED_SLOWER, USUAL_RATE)
            step = rate * np.clip(innovation, -USUAL_CUT, USUAL_CUT)
            mean[known] = np.where(np.isnan(mean), newest, mean + step)[known]

    def _run(self, reading: Reading) -> tuple[float, list[Found]]:
        """The rules on the whole run, those on half of the tensors with the tensors that exceed."""
        found: list[Found] = []
        severity = 0.0
        by_name = {rule.rule: rule for rule in self.rules[TENSOR_RULES:]}
        for name, conditions in self._halves(reading).items():
            medians = [_median(value[reading.settled]) for value, _ in conditions]
            least = min(median / limit for median, (_, limit) in zip(medians, conditions, strict=True))
            severity = max(severity, least)
            if least > 1:
                value, limit = conditions[0]
                statistic = by_name[name].statistic
                found.append((reading.step, Evidence("", "", name, statistic, medians[0], limit, "alarm")))
                for i in np.flatnonzero(reading.settled & (value > limit)):
                    place = (reading.names[i], reading.layers[i], name, statistic)
                    found.append((reading.step, Evidence(*place, float(value[i]), limit, "alarm")))
        for name, figure, limit, level in self._figures(reading):
            severity = max(severity, figure / limit) if level == "alarm" else severity
            if figure > limit:
                rule = by_name[name]
                evidence = Evidence("", "", name, rule.statistic, figure, limit, level)
                found.append((reading.step - rule.steps + 1, evidence))
        return severity, found

    def _halves(self, reading: Reading) -> dict[str, list[tuple[Numbers, float]]]:
        """Conditions that half of the tensors must meet at once: values and thresholds."""
        config, found = self.config, reading.statistics
        rise = self._rise(reading, "update_ratio")
        surprise = np.where(reading.ages > config.surge_age, found["surprise"], np.nan)
        return {
            "surge": [(surprise, config.surge)],
            "lurch": [(found["update_ratio"], config.lurch_size), (rise, config.lurch)],
            "leap": [(rise, config.leap)],
            "chorus": [(found["u_rms"], config.chorus), (self._rise(reading, "u_rms"), config.chorus_rise)],
        }

    def _figures(self, reading: Reading) -> Iterator[tuple[str, float, float, Level]]:
        """Rules on single figures of the run: rule, value, threshold, state."""
        config = self.config
        if reading.loss is not None:
            self._loss_zs.append(robust_z(reading.loss, self._losses))
            if np.isfinite(reading.loss):
                self._losses.append(reading.loss)
            if len(self._loss_zs) == self._loss_zs.maxlen:
                yield "loss", min(self._loss_zs), config.loss_z, "alarm"
        if reading.grad_norm is not None and np.isfinite(reading.grad_norm) and reading.grad_norm > 0:
            norm = float(np.log(reading.grad_norm))
            yield "norm", robust_z(norm, self._norms), config.norm_z, "watch"
            self._norms.append(norm)
        if "max_logit" in reading.companions:
            yield "logits", reading.companions["max_logit"], config.max_logit, "watch"


def _median(values: Numbers) -> float:
    """Of what is finite; 0 of nothing."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else 0.0


def robust_z(value: float, before: deque[float]) -> float:
    """(value - median) / (1.4826 MAD) over the values before, 0 where there are too few; not finite counts as 1e6."""
    if not np.isfinite(value):
        return 1e6
    if len(before) < WINDOW_LEAST:
        return 0.0
    values = np.array(before)
    median = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - median))
    return float(min((value - median) / max(spread, 1e-3 * abs(median), 1e-12), 1e6))


def _listed(values: Numbers) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _array(values: list[float | None]) -> Numbers:
    return np.array([np.nan if value is None else value for value in values], np.float64)
