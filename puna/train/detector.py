"""From statistics to a state: documented rules, calm -> watch -> alarm, with the evidence. NumPy only.

Rules on each tensor (thresholds: `HealthConfig`); r is the update over the rate, as it is about to be applied:

| rule | fires where | state |
|---|---|---|
| burst | surprise, gradient RMS over what the second moment expects, is above `surprise` | alarm |
| | and above `surprise_watch` | watch |
| jump | r has RMS above `u_rms`, a share `f9` beyond 0.9, two peaks (`bimodality`), and twice its usual RMS | alarm |
| stall | the median of sqrt(v) is below `stall` epsilons for 10 steps | watch |
| floor | more than `below_eps` of sqrt(v) are below epsilon for 10 steps | watch |
| correlated | the running mean (0.9) of the cosine of successive gradients is above `lag_cosine` for 10 steps | watch |
| adrift | the cosine of r and gradient is below `descent_cosine` while r has RMS above 0.5, for 3 steps | watch |
| stride | update over weights is above `update_ratio` times its usual | watch |
| steep | StableAdamW's RMS is above `stable_rms` and twice its usual | watch |
| nonfinite | a gradient or moment is not finite | alarm |

and on the run: surge (half of the tensors have a surprise above `surge`: alarm), leap (half of them an update over
weights above `leap` times its usual: alarm), loss (robust z above `loss_z` for 3 steps: alarm), norm (robust z of the
logarithm of the gradient norm above `norm_z`: watch), logits (largest attention logit above `max_logit`: watch).
"Usual" is a running mean of the logarithm whose innovations are cut at a factor 2.

What is normal: coordinates that never had a gradient are not counted; a tensor without any has no statistics. In the
first 3 / (1 - b1) steps of a tensor, from its first gradient or a reset, r is +-1 by construction, so burst, jump,
adrift, stride, steep, surge and leap wait. For `settle` steps after `announce`, jump, stride and leap need twice their
thresholds; after its rate jumps by half or more, jump does.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from puna.train.config import HealthConfig

State = Literal["calm", "watch", "alarm"]
Numbers = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

MAX_EVIDENCE = 64
WINDOW, WINDOW_LEAST = 100, 20  # steps of the robust z; steps below which there is none
RATE_JUMP, SETTLE_FACTOR = 1.5, 2.0
USUAL_RATE, USUAL_CUT = 0.05, float(np.log(2))
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
    level: Literal["watch", "alarm"] = "watch"


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
    rates: Numbers  # learning rate of each
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
        Rule("burst", "surprise", config.surprise_watch, config.surprise),
        Rule("jump", "u_rms", None, config.u_rms),
        Rule("stall", "stall", config.stall, None, 10, "below"),
        Rule("floor", "below_eps", config.below_eps, None, 10),
        Rule("correlated", "lag_cosine", config.lag_cosine, None, 10),
        Rule("adrift", "descent_cosine", config.descent_cosine, None, 3, "below"),
        Rule("stride", "update_ratio", config.update_ratio, None),
        Rule("steep", "stable_rms", config.stable_rms, None),
        Rule("nonfinite", "num_nonfinite", None, 0.0),
        Rule("surge", "surprise", None, config.surge),
        Rule("leap", "update_ratio", None, config.leap),
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
    rates: Numbers
    settling: Integers  # step up to which thresholds are wider

    @classmethod
    def fresh(cls, count: int) -> "_Memory":
        """Of tensors that have not been seen yet."""
        usual = {key: np.full(count, np.nan) for key in ("u_rms", "update_ratio", "stable_rms")}
        streaks, settling = np.zeros((TENSOR_RULES, count), np.int64), np.zeros(count, np.int64)
        return cls(np.full(count, np.nan), usual, streaks, np.full(count, np.nan), settling)


@dataclass(frozen=True)
class _Look:
    """A rule's view of all tensors: values, where it may fire, factors of its threshold; severity where it is not
    value over threshold."""

    value: Numbers
    gate: Flags
    factor: Numbers
    share: Numbers | None = None


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
        self._leap = 0.0  # median over tensors of update over weights as a multiple of its usual, in this step
        self._last = {"watch": -1, "alarm": -1}  # newest steps with such evidence
        self._announced, self._settled_at = -1, -1  # step of a change, step up to which thresholds are wider for it

    @np.errstate(all="ignore")
    def judge(self, reading: Reading) -> Status:
        """The status after one more reading."""
        self._know(reading.names)
        self._settle(reading)
        severity, found = self._tensors(reading)
        run_severity, run_found = self._run(reading)
        found += run_found
        for _, evidence in found:
            self._last[evidence.level] = reading.step
        recent = {level: 0 <= reading.step - last < self.config.hold for level, last in self._last.items() if last >= 0}
        state: State = "alarm" if recent.get("alarm") else "watch" if recent.get("watch") else "calm"
        found.sort(key=lambda entry: (entry[1].level != "alarm", entry[0]))
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
            "rates": _listed(memory.rates),
            "settling": memory.settling.tolist(),
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
            _array(numbers["rates"]),
            np.array(numbers["settling"], np.int64),
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
        memory.lag[new], memory.rates[new] = before.lag[old], before.rates[old]
        memory.settling[new], memory.streaks[:, new] = before.settling[old], before.streaks[:, old]
        for key, values in memory.usual.items():
            values[new] = before.usual[key][old]
        self._names, self._memory = names, memory

    def _settle(self, reading: Reading) -> None:
        """Note which tensors are to settle, because their rate has jumped or a change was announced."""
        memory = self._memory
        change = np.abs(np.log(reading.rates / memory.rates))
        jumped = (change > np.log(RATE_JUMP)) & (reading.ages > 0)
        memory.settling[jumped] = reading.step + self.config.settle
        if self._announced == reading.step:
            self._settled_at = reading.step + self.config.settle
        memory.rates = reading.rates.copy()

    def _tensors(self, reading: Reading) -> tuple[float, list[Found]]:
        """Largest severity of the alarm rules, and what fired."""
        found: list[Found] = []
        severity = 0.0
        looks = self._looks(reading)
        for number, rule in enumerate(self.rules[:TENSOR_RULES]):
            look = looks[rule.rule]
            limit = rule.watch if rule.watch is not None else rule.alarm
            assert limit is not None
            low, factor = rule.when == "below", look.factor
            beyond = look.gate & (look.value < limit if low else look.value > limit * factor)
            streak = self._memory.streaks[number]
            streak[:] = np.where(beyond, streak + 1, 0)
            if rule.alarm is not None:
                share = look.value / np.maximum(rule.alarm * factor, 1e-6) if look.share is None else look.share
                told = look.gate if look.share is None else reading.settled
                severity = max(severity, float(np.max(np.nan_to_num(share[told]), initial=0.0)))
            for i in np.flatnonzero(streak >= rule.steps):
                alarm = rule.alarm is not None and look.value[i] > rule.alarm * factor[i]
                threshold = float(((rule.alarm if alarm else limit) or 0.0) * factor[i])
                place = (reading.names[i], reading.layers[i], rule.rule, rule.statistic)
                evidence = Evidence(*place, float(look.value[i]), threshold, "alarm" if alarm else "watch")
                found.append((reading.step - int(streak[i]) + 1, evidence))
        return severity, found

    def _looks(self, reading: Reading) -> dict[str, "_Look"]:
        """What each rule on tensors looks at; learns what is usual, and the leap of this step."""
        config, memory, found = self.config, self._memory, reading.statistics
        active, one = found["num_active"] > 0, np.ones(len(reading.names))
        settled = reading.settled & active
        usual = {key: np.exp(mean) for key, mean in memory.usual.items()}
        announced = SETTLE_FACTOR if reading.step <= self._settled_at else 1.0
        factor = np.where(reading.step <= memory.settling, SETTLE_FACTOR, announced)
        u_rms, ratio, steep = found["u_rms"], found["update_ratio"], found["stable_rms"]
        tests = (
            u_rms / config.u_rms,
            found["f9"] / config.f9,
            found["bc"] / config.bimodality,
            u_rms / usual["u_rms"] / 2,
        )
        jump = np.min(tests, axis=0) / factor
        leaps = (ratio / usual["update_ratio"] / announced)[settled]
        self._leap = float(np.median(leaps[np.isfinite(leaps)])) if np.isfinite(leaps).any() else 0.0
        looks = {
            "burst": _Look(found["surprise"], settled, one),
            "jump": _Look(u_rms, settled & (jump > 1), one, jump),
            "stall": _Look(found["stall"], active, one),
            "floor": _Look(found["below_eps"], active, one),
            "correlated": _Look(self._running_lag(found["lag_cosine"]), active, one),
            "adrift": _Look(found["descent_cosine"], settled & (u_rms > 0.5), one),
            "stride": _Look(ratio, settled, announced * usual["update_ratio"]),
            "steep": _Look(steep, settled & (steep > 2 * usual["stable_rms"]), one),
            "nonfinite": _Look(found["num_nonfinite"], one > 0, one),
        }
        self._learn(reading, settled)
        return looks

    def _running_lag(self, cosine: Numbers) -> Numbers:
        lag = self._memory.lag
        known = np.isfinite(cosine)
        lag[known] = np.where(np.isnan(lag), cosine, LAG_DECAY * lag + (1 - LAG_DECAY) * cosine)[known]
        return np.nan_to_num(lag)

    def _learn(self, reading: Reading, settled: Flags) -> None:
        """Move what is usual towards what is, by at most a factor 2 of innovation."""
        for key, mean in self._memory.usual.items():
            newest = np.log(reading.statistics[key])
            known = settled & np.isfinite(newest)
            step = USUAL_RATE * np.clip(newest - mean, -USUAL_CUT, USUAL_CUT)
            mean[known] = np.where(np.isnan(mean), newest, mean + step)[known]

    def _run(self, reading: Reading) -> tuple[float, list[Found]]:
        """The rules on the whole run."""
        found = []
        severity = 0.0
        for rule, value in self._run_values(reading):
            limit = rule.alarm if rule.alarm is not None else rule.watch
            assert limit is not None
            if rule.alarm is not None:
                severity = max(severity, value / limit)
            if value > limit:
                level: Literal["watch", "alarm"] = "alarm" if rule.alarm is not None else "watch"
                evidence = Evidence("", "", rule.rule, rule.statistic, value, limit, level)
                found.append((reading.step - rule.steps + 1, evidence))
        return severity, found

    def _run_values(self, reading: Reading) -> Iterator[tuple[Rule, float]]:
        by_name = {rule.rule: rule for rule in self.rules[TENSOR_RULES:]}
        surprise = reading.statistics["surprise"][reading.settled]
        if (known := surprise[np.isfinite(surprise)]).size:
            yield by_name["surge"], float(np.median(known))
        yield by_name["leap"], self._leap
        if reading.loss is not None:
            self._loss_zs.append(robust_z(reading.loss, self._losses))
            if np.isfinite(reading.loss):
                self._losses.append(reading.loss)
            if len(self._loss_zs) == self._loss_zs.maxlen:
                yield by_name["loss"], min(self._loss_zs)
        if reading.grad_norm is not None and np.isfinite(reading.grad_norm) and reading.grad_norm > 0:
            norm = float(np.log(reading.grad_norm))
            yield by_name["norm"], robust_z(norm, self._norms)
            self._norms.append(norm)
        if "max_logit" in reading.companions:
            yield by_name["logits"], reading.companions["max_logit"]


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
