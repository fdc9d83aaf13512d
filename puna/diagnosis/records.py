"""What the health monitor left in a run's events, read without torch; nothing in them is trusted."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any

from puna.chart import Point

Event = dict[str, Any]
STATES = ("calm", "watch", "alarm")
REACH = 2.0  # a histogram of updates is on [-REACH, REACH]; its outermost bins hold what lies beyond
STORY = ("health_change", "health_action")  # what a roll-back does not take back


@dataclass(frozen=True)
class Statistic:
    """One statistic of a tensor. calm: a value that is nothing special. limit: default threshold of its rule.

    vectors: whether it says something of gains and biases, whose updates are coherent in healthy runs too.
    Its badness is 0 at the calm value and 1 at the limit, straight or (log) in logarithms; more is worse.
    """

    name: str
    calm: float
    limit: float
    log: bool = False
    vectors: bool = False

    @property
    def rises(self) -> bool:
        """Whether a larger value is the worse one."""
        return self.limit > self.calm

    def badness(self, value: float, limit: float) -> float:
        """Where `value` lies between calm (0) and `limit` (1)."""
        low, high, place = (self._scaled(x) for x in (self.calm, limit, value))
        return (place - low) / (high - low)

    def at(self, badness: float, limit: float) -> float:
        """The value that has this badness."""
        low, high = self._scaled(self.calm), self._scaled(limit)
        place = low + badness * (high - low)
        return math.exp(place) if self.log else place

    def _scaled(self, value: float) -> float:
        return math.log(max(value, 1e-12)) if self.log else value


STATISTICS = {
    "u_rms": Statistic("update RMS", 0.2, 0.6),
    "surprise": Statistic("surprise", 1.0, 10.0, log=True, vectors=True),
    "stall": Statistic("stall ratio √v̂ ÷ ε", 100.0, 10.0, log=True, vectors=True),
    "lag_cosine": Statistic("lag-1 cosine", 0.0, 0.6),
    "f9": Statistic("share beyond ±0.9", 0.0, 0.3),
    "bc": Statistic("bimodality", 1 / 3, 0.555),
    "below_eps": Statistic("share below ε", 0.0, 0.5, vectors=True),
    "descent_cosine": Statistic("descent cosine", 0.4, 0.1),
    "stable_rms": Statistic("StableAdamW RMS", 1.0, 2.5, log=True),
}


@dataclass(frozen=True)
class Evidence:
    """A tensor whose statistic passed the threshold of a rule."""

    tensor: str
    layer: str
    rule: str
    statistic: str
    value: float | None
    threshold: float | None
    level: str  # the state that it speaks for


@dataclass(frozen=True)
class Change:
    """The step at which the monitor's state changed, and why."""

    step: int
    state: str
    before: str
    of: str  # the optimiser, where several are watched
    evidence: tuple[Evidence, ...]

    @property
    def reasons(self) -> tuple[Evidence, ...]:
        """The evidence for the state itself, without that for a lesser one."""
        return tuple(one for one in self.evidence if one.level == self.state)


@dataclass(frozen=True)
class Watched:
    """The health records of a run that count: a resume takes back what came after the step it resumed from.

    starts: the newest health_start record of each optimiser. layers: the layer of each tensor. losses: (step, loss).
    steps: first and newest step of any record. ended: why the run stopped, None where no stop was recorded.
    loop: whether it is a run of Puna's own loop, which records its end. off: why the monitor switched itself off, None
    where it did not.
    """

    starts: list[Event]
    layers: dict[str, str]
    samples: list[Event]
    histograms: list[Event]
    changes: list[Change]
    actions: list[Event]
    losses: list[Point]
    steps: tuple[int, int] = (0, 0)
    ended: str | None = None
    loop: bool = False
    off: str | None = None

    def __bool__(self) -> bool:
        return bool(self.starts or self.samples or self.changes or self.off)

    @property
    def state(self) -> str:
        """The worst state the run was ever in."""
        return max((change.state for change in self.changes), key=STATES.index, default="calm")

    @property
    def every_loss(self) -> bool:
        """Whether there is a loss of (nearly) every step, so that a spike can be told."""
        steps = [step for step, _ in self.losses]
        return len(steps) > 1 and median(b - a for a, b in pairwise(steps)) == 1

    @property
    def now(self) -> str:
        """The state at the end of the records."""
        turns = self.turns()
        return turns[-1][1] if turns else "calm"

    def turns(self) -> list[tuple[int, str]]:
        """(step, state from there on); of several optimisers the worst."""
        states: dict[str, str] = {}
        turns: list[tuple[int, str]] = []
        for change in self.changes:
            states[change.of] = change.state
            worst = max(states.values(), key=STATES.index)
            if not turns or turns[-1][1] != worst:
                turns.append((change.step, worst))
        return turns

    def names(self) -> list[str]:
        """Layers in the model's order: the embedding, the blocks by number, the rest."""
        return sorted(dict.fromkeys(self.layers.values()), key=_depth)

    @property
    def rules(self) -> list[Event]:
        """The rules that the monitor recorded; those of several optimisers are the same."""
        rows: list[Any] = next((one["rules"] for one in self.starts if isinstance(one.get("rules"), list)), [])
        return [row for row in rows if isinstance(row, dict)]

    def limit(self, statistic: str) -> float:
        """The threshold on a tensor's statistic: of the first rule that the monitor recorded, else the default."""
        own = [rule for rule in self.rules if rule.get("statistic") == statistic]
        limits = (number(rule, level) for rule in own for level in ("alarm", "watch"))
        return next((limit for limit in limits if limit is not None), STATISTICS[statistic].limit)

    def worst(self, statistic: str) -> dict[str, list[Point]]:
        """Of each layer (step, value of its worst tensor), over the samples that have one.

        Gains and biases are left out of statistics that say nothing of them.
        """
        return self._series[statistic]

    @cached_property
    def _series(self) -> dict[str, dict[str, list[Point]]]:
        found: dict[str, dict[str, list[Point]]] = {key: {name: [] for name in self.names()} for key in STATISTICS}
        for sample in self.samples:
            for key, layers in self._worst_of(sample).items():
                for layer, value in layers.items():
                    found[key][layer].append((sample["step"], value))
        return {key: {layer: line for layer, line in lines.items() if line} for key, lines in found.items()}

    @cached_property
    def _vectors(self) -> frozenset[str]:
        """Gains and biases, by their size: below 4 √n, with n the size of the largest tensor."""
        sizes = {
            name: size for one in self.starts for name in table(one, "numel") if (size := number(one["numel"], name))
        }
        limit = 4 * math.sqrt(max(sizes.values(), default=0))
        return frozenset(name for name, size in sizes.items() if size < limit)

    def _worst_of(self, sample: Event) -> dict[str, dict[str, float]]:
        worst: dict[str, dict[str, float]] = {key: {} for key in STATISTICS}
        for tensor, numbers in table(sample, "tensors").items():
            layer = self.layers.get(tensor)
            if layer is None or not isinstance(numbers, dict):
                continue
            for key, statistic in STATISTICS.items():
                value = number(numbers, key) if statistic.vectors or tensor not in self._vectors else None
                if value is not None:
                    pick = max if statistic.rises else min
                    worst[key][layer] = pick(worst[key].get(layer, value), value)
        return worst


def _depth(layer: str) -> float:
    number = re.fullmatch(r"layer (\d+)", layer)
    return float(number[1]) if number else -1.0 if layer == "embedding" else math.inf


@dataclass
class _Reader:
    """Goes through the events once."""

    starts: dict[str, Event] = field(default_factory=dict)
    kept: dict[str, list[Event]] = field(default_factory=dict)
    ended: str | None = None
    loop: bool = False
    off: str | None = None

    def take(self, event: Event) -> None:
        kind, step = event.get("event"), event.get("step")
        if kind == "stop":
            self.ended = str(event.get("reason", "no reason recorded"))
        elif kind in ("start", "health_start", "step", "health"):
            self.ended = None
        self.loop = self.loop or kind == "start"
        if kind == "health_start":
            self.starts[str(event.get("of", ""))], self.off = event, None
        elif kind == "health_off":
            self.off = str(event.get("reason", "no reason recorded"))
        if not isinstance(step, int) or not isinstance(kind, str):
            return
        if kind in ("resume", "rollback"):
            told = STORY if kind == "rollback" else ()
            self.kept = {
                name: [old for old in rows if old["step"] <= step or name in told] for name, rows in self.kept.items()
            }
        self.kept.setdefault(kind, []).append(event)


def watched(events: Iterable[Event]) -> Watched:
    """The health records among a run's events; damaged ones are left out."""
    reader = _Reader()
    for event in events:
        reader.take(event)
    kept = reader.kept
    samples = {(one["step"], str(one.get("of", ""))): one for one in kept.get("health", [])}
    steps = [event["step"] for kind in ("step", "health", "health_change") for event in kept.get(kind, [])]
    return Watched(
        starts=list(reader.starts.values()),
        layers={
            str(name): str(layer) for one in reader.starts.values() for name, layer in table(one, "tensors").items()
        },
        samples=[one for _, one in sorted(samples.items())],
        histograms=kept.get("health_histogram", []),
        changes=[_change(event) for event in kept.get("health_change", []) if event.get("state") in STATES],
        actions=kept.get("health_action", []),
        losses=_losses(kept.get("step", [])) or _losses(kept.get("health", [])),
        steps=(min(steps, default=0), max(steps, default=0)),
        ended=reader.ended,
        loop=reader.loop,
        off=reader.off,
    )


def _change(event: Event) -> Change:
    entries = event.get("evidence")
    state = event["state"]
    kept = [_evidence(one, state) for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    of = str(event.get("of", ""))
    return Change(event["step"], state, str(event.get("before", "calm")), of, tuple(kept))


def _evidence(entry: Mapping[str, Any], state: str) -> Evidence:
    tensor, layer, rule, statistic = (str(entry.get(key, "?")) for key in ("tensor", "layer", "rule", "statistic"))
    level = str(entry.get("level", state))
    return Evidence(tensor, layer, rule, statistic, number(entry, "value"), number(entry, "threshold"), level)


def _losses(events: list[Event]) -> list[Point]:
    pairs = {event["step"]: number(event, "loss") for event in events}
    return [(step, loss) for step, loss in sorted(pairs.items()) if loss is not None]


def number(values: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`, or None."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def table(event: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The dictionary under `key`; an empty one where there is none."""
    value = event.get(key)
    return value if isinstance(value, dict) else {}
