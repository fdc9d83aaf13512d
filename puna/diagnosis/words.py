"""A diagnosis of a run in words: is it calm, what was first, which layers, what it means, what to do next.

The theory is Molybog et al., A Theory on Adam Instability in Large-Scale Machine Learning, arXiv 2304.09871.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

from puna.chart import Point, short
from puna.diagnosis.records import STATISTICS, Change, Event, Evidence, Watched, number
from puna.errors import DataError

WINDOW, DEVIATIONS, IN_A_ROW = 100, 6.0, 3  # when the loss has moved; see docs/health.md

FAMILIES = {
    "stall": "stall", "below_eps": "stall",
    "surprise": "burst", "stable_rms": "burst",
    "u_rms": "coherent", "f9": "coherent", "bc": "coherent",
    "lag_cosine": "correlated", "descent_cosine": "astray", "update_ratio": "large", "update_rise": "large",
    "loss_z": "loss", "norm_z": "norm", "num_nonfinite": "broken", "max_logit": "logits", "z": "logits",
}  # fmt: skip

NAMES = {key: statistic.name for key, statistic in STATISTICS.items()} | {
    "update_ratio": "update ÷ weights",
    "update_rise": "update ÷ its usual size",
    "loss_z": "deviation of the loss",
    "norm_z": "deviation of the gradient norm",
    "num_nonfinite": "entries not finite",
    "max_logit": "largest attention logit",
    "z": "mean log Z",
}

MEANING = {
    "stall": "Adam's √v̂ of the layer has fallen to the size of ε: its updates are nearly zero, and it stops following "
    "the other layers. When a larger gradient comes back, v is far too small for it, and the update jumps.",
    "burst": "The gradient is many times what Adam's second moment remembers, so that v is stale and small. "
    "The next updates are of order one on most coordinates at once, a large step that has little to do with the "
    "direction of descent.",
    "coherent": "The updates r = m̂ ÷ (√v̂ + ε) leave their single peak at 0 for two groups near ±1. This is what the "
    "theory shows for gradients that keep their sign from step to step: Adam then steps by the full learning rate "
    "everywhere, whatever the size of the gradient.",
    "correlated": "Successive gradients point the same way, so that Adam's averages no longer average noise away and r "
    "is driven towards ±1. Large batches and high learning rates make it likelier.",
    "astray": "The update is large and nearly at right angles to the gradient. A large step unrelated to the direction "
    "of descent is the very state that the theory holds to blame for divergence.",
    "large": "The update is many times larger, relative to the weights, than it has been. "
    "The expansion behind Adam holds for small steps only.",
    "loss": "The loss itself has left the range of its last hundred steps: this is the spike, no forerunner of it. "
    "Adam recovers in about 1 ÷ (1 − β₂) steps if v catches up before the next burst.",
    "norm": "The global gradient norm has left its recent range: one bad batch, or the first sign that the weights "
    "have moved too far. Clipping bounds the gradient, but not Adam's update, which does not depend on its scale.",
    "logits": "Logits grow. Where the largest attention logit passes some thousands the softmax takes one key, and its "
    "gradient dies; this is a divergence of the model rather than of Adam (Wortsman et al., arXiv 2309.14322).",
    "broken": "A loss or gradient was not finite. No statistic of the step means anything, and its update must not "
    "reach the weights.",
}

LET_IT_ACT = (
    "Let the controller act ([health] act = true; in a drop-in HealthConfig(act=True)): it lowers ε, resets a tensor "
    "with a ramp and clips its update, each bounded and recorded."
)
REMEDIES: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset(FAMILIES.values()),
        "Look: hold step {step} against the data, the batch size and the schedule. A change there that was meant is "
        "its own explanation, and needs nothing.",
    ),
    (
        frozenset({"broken"}),
        "Find the sample or the operation that is not finite; the run's own message names the samples.",
    ),
    (
        frozenset({"stall", "burst"}),
        "Lower ε at the next restart: 1e-15 with fp32 states, so that no layer can stall. A larger ε makes it worse.",
    ),
    (
        frozenset({"stall", "burst", "coherent", "astray", "large"}),
        LET_IT_ACT,
    ),
    (
        frozenset({"burst", "coherent", "large", "norm"}),
        "Clip the update instead of the gradient (StableAdamW); it costs no hyper-parameter search.",
    ),
    (
        frozenset({"coherent", "correlated", "astray", "large", "loss"}),
        "Lengthen the warm-up, or lower the learning rate, and let the batch grow later.",
    ),
    (
        frozenset({"logits"}),
        "Normalise queries and keys (qk-norm) for attention logits; add a z-loss of 1e-4 · log² Z for output logits.",
    ),
    (
        frozenset({"loss", "astray", "broken"}),
        "Go back to a checkpoint at least 100 steps before step {step}, with m and v reset and a ramp of 50 steps. "
        "Skipping the data alone does not help where the optimiser's state is the cause.",
    ),
)


@dataclass(frozen=True)
class Diagnosis:
    """What is said of a run, mostly in sentences.

    evidence: what came first, in order: the watch that led to the first alarm, what the whole run did, a tensor.
    layers: (layer, step of its first evidence). spells: (state, first step, last step or None where it still holds).
    """

    state: str
    headline: str
    evidence: list[tuple[Change, Evidence]]
    layers: list[tuple[str, int]]
    spells: list[tuple[str, int, int | None]]
    loss: str
    actions: list[str]
    meaning: list[str]
    remedies: list[str]
    notes: list[str]

    def figures(self) -> dict[str, Any]:
        """For --json."""
        evidence = [{"step": change.step, "state": change.state, **vars(one)} for change, one in self.evidence]
        spells = [{"state": state, "from": begin, "to": end} for state, begin, end in self.spells]
        layers = [{"layer": layer, "step": step} for layer, step in self.layers]
        return {
            "state": self.state,
            "headline": self.headline,
            "first": evidence[-1] if evidence else None,
            "evidence": evidence,
            "layers": layers,
            "spells": spells,
            "loss": self.loss,
            "actions": self.actions,
            "meaning": self.meaning,
            "next": self.remedies,
            "notes": self.notes,
        }

    def parts(self) -> Iterator[tuple[str, list[str]]]:
        """(title, sentences) of every part that has something to say."""
        steps = groupby(self.layers, key=lambda pair: pair[1])
        layers = [f"Step {step:,}: {', '.join(layer for layer, _ in pairs)}." for step, pairs in steps]
        first = [told(*found) for found in self.evidence]
        named = {
            "What came first": first, "Which layers": layers, "The loss": [self.loss] if self.loss else [],
            "What was done": self.actions, "What it means": self.meaning,
            "What to do next, cheapest first": self.remedies, "Notes": self.notes,
        }  # fmt: skip
        return ((title, sentences) for title, sentences in named.items() if sentences)


def require(found: Watched, folder: str, any_event: bool) -> None:
    """Raise DataError where a folder holds no health records."""
    if found:
        return
    if not any_event:
        raise DataError(
            f"There are no records in {folder}: no events.jsonl, or an empty one",
            "Give the run's directory (--run.dir), or the folder that the drop-in was given.",
        )
    raise DataError(
        f"{folder} has no health records: it was made with the monitor off, or by a version without it",
        "Train with [health] enabled = true, which is the default, or add the drop-in; see docs/health.md.",
    )


def diagnose(found: Watched, problems: Sequence[str] = ()) -> Diagnosis:
    """The diagnosis of a run's health records. problems: sentences about records that could not be read."""
    worst = [change for change in found.changes if change.state == found.state and change.state != "calm"]
    families = _families([*_forerunner(found, worst), *worst])
    moves = loss_moves(found.losses) if found.every_loss else []
    return Diagnosis(
        state=found.state,
        headline=_headline(found, worst),
        evidence=_evidence(found, worst),
        layers=_first_steps(worst),
        spells=spells(found),
        loss=_loss(found, moves),
        actions=[acted(action) for action in found.actions],
        meaning=[MEANING[family] for family in families],
        remedies=_remedies({*families, *(["loss"] if moves else [])}, worst, bool(found.actions)),
        notes=[*_notes(found), *problems],
    )


def spells(found: Watched) -> list[tuple[str, int, int | None]]:
    """Stretches of watch and alarm: (state, first step, last step or None where it still holds)."""
    turns = found.turns()
    ends: list[int | None] = [*(step for step, _ in turns[1:]), None]
    return [(state, step, end) for (step, state), end in zip(turns, ends, strict=False) if state != "calm"]


def told(change: Change, evidence: Evidence) -> str:
    """One piece of evidence as a sentence."""
    name = NAMES.get(evidence.statistic, evidence.statistic)
    value = "not finite" if evidence.value is None else short(evidence.value)
    limit = ""
    if evidence.threshold is not None and evidence.value is not None:
        side = "above" if evidence.value > evidence.threshold else "below"
        limit = f", {side} {short(evidence.threshold)}"
    where = f"{evidence.layer} ({evidence.tensor})" if evidence.tensor else "the run"
    return f"Step {change.step:,}, {change.state}: {where}, {name} {value}{limit} (rule {evidence.rule})."


def acted(action: Event) -> str:
    """One of the controller's actions as a sentence."""
    words = [f"Step {action['step']:,}, level {action.get('level', '?')}: {action.get('action', '?')}"]
    if action.get("tensor"):
        words.append(f"of {action['tensor']}")
    before, after = (number(action, key) for key in ("before", "after"))
    if before is not None and after is not None:
        words.append(f"from {short(before)} to {short(after)}")
    reason = str(action.get("reason") or "").rstrip(".")
    return " ".join(words) + (f"; {reason}." if reason else ".")


def loss_moves(losses: list[Point]) -> list[int]:
    """Steps at which the loss left its range: more than 6 deviations (1.4826 x MAD) above the median of the 100 steps
    before, three times in a row. A spike that lasts is told once."""
    moves: list[int] = []
    quiet = [loss for _, loss in losses[: WINDOW // 5]]  # what the next loss is held against
    run: list[Point] = []
    for step, loss in losses[WINDOW // 5 :]:
        middle = median(quiet)
        deviation = 1.4826 * median(abs(one - middle) for one in quiet)
        run = [*run, (step, loss)] if loss - middle > DEVIATIONS * deviation else []
        if len(run) == IN_A_ROW and not (moves and step - moves[-1] < WINDOW):
            moves.append(int(run[0][0]))
        quiet = [*quiet, loss][-WINDOW:]
    return moves


def _headline(found: Watched, worst: list[Change]) -> str:
    first, last = found.steps
    span = f"{last:,} steps" if first <= 1 else f"steps {first:,} to {last:,}"
    if not worst:
        return f"Calm over {span}: no rule was met."
    now = "still so" if found.now == found.state else f"{found.now} now"
    layers = _first_steps(worst)
    where = f", first in {layers[0][0]}" if layers else ""
    times = "once" if len(worst) == 1 else f"{len(worst)} times"
    if found.state == "alarm":
        return f"Alarm at step {worst[0].step:,} of {last:,}{where}; {times} in all, {now}."
    return f"On watch at step {worst[0].step:,} of {last:,}{where}; {times} in all, {now}, and never an alarm."


def _evidence(found: Watched, worst: list[Change]) -> list[tuple[Change, Evidence]]:
    """What came first: the watch that the first alarm grew out of, what the whole run did, the first tensor."""
    before = [(change, one) for change in _forerunner(found, worst) for one in change.reasons]
    first = [(change, one) for change in worst[:1] for one in change.reasons]
    whole, tensors = [pair for pair in first if not pair[1].tensor], [pair for pair in first if pair[1].tensor]
    return [*before[:1], *whole[:1], *tensors[:1]]


def _forerunner(found: Watched, worst: list[Change]) -> list[Change]:
    """The change to watch from which the first alarm came, or none."""
    place = found.changes.index(worst[0]) if worst and found.state == "alarm" else 0
    return [change for change in found.changes[max(0, place - 1) : place] if change.state == "watch"]


def _families(changes: list[Change]) -> list[str]:
    """In the order in which they showed; of what nobody foresaw, none."""
    found = (FAMILIES.get(one.statistic) for change in changes for one in change.reasons)
    return [family for family in dict.fromkeys(found) if family]


def _first_steps(changes: list[Change]) -> list[tuple[str, int]]:
    steps: dict[str, int] = {}
    for change in changes:
        for one in change.reasons:
            if one.layer:
                steps.setdefault(one.layer, change.step)
    return list(steps.items())


def _remedies(families: set[str], worst: list[Change], acted: bool) -> list[str]:
    """What helps against the families, cheapest first; the controller is not proposed where it has acted."""
    rows = [words for causes, words in REMEDIES if worst and causes & families and not (acted and words == LET_IT_ACT)]
    return [words.format(step=f"{worst[0].step:,}") for words in rows]


def _loss(found: Watched, moves: list[int]) -> str:
    alarms = [change.step for change in found.changes if change.state == "alarm"]
    if not moves:
        return "It never left its range." if alarms and found.every_loss else ""
    step = moves[0]
    before = [loss for at, loss in found.losses if step - WINDOW <= at < step]
    after = [loss for at, loss in found.losses if step <= at < step + WINDOW]
    height = f"from {short(median(before))} to {short(max(after))} at most"
    earlier = [at for at in alarms if at <= step]
    if earlier:
        gap = step - max(earlier)
        lead = "in the step of the alarm" if gap == 0 else f"{gap} step{'s' * (gap > 1)} after the alarm"
    else:
        lead = "before any alarm"
    more = f" It moved {len(moves)} times in all." if len(moves) > 1 else ""
    return f"It moved at step {step:,}, {lead}: {height}.{more}"


def _notes(found: Watched) -> Iterator[str]:
    if found.off is not None:
        yield f"The monitor switched itself off: {found.off}. What came after was not watched."
    if found.loop and found.ended is None:
        yield f"No end is recorded: it is going on, or was killed. Its newest record is of step {found.steps[1]:,}."
    elif found.ended not in (None, "done"):
        yield f"The run stopped: {found.ended}."
