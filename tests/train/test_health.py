"""The monitor on optimisers as people have them: it changes nothing, says what it sees, and never ends a run."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from puna.errors import DataError
from puna.train import health_track
from puna.train.adam_stats import SUMS, Watched
from puna.train.config import HealthConfig
from puna.train.detector import Reading
from puna.train.health import HealthMonitor
from puna.train.health_track import hold_bursts, layer_of
from puna.train.metrics import read_events

VOCABULARY = 50


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.norm = nn.RMSNorm(16)
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.lm_head(self.norm(hidden))


def backward(model: nn.Module, step: int) -> Tensor:
    """A batch of noisy successors, of which half of the vocabulary is never used."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY // 2, (64,), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens).float(), (tokens * 3 + 1) % (VOCABULARY // 2))
    loss.backward()
    return loss


def train(
    model: nn.Module,
    optimizer: Optimizer,
    num_steps: int,
    monitor: HealthMonitor | None = None,
    change: Callable[[int], None] = lambda step: None,
    start: int = 0,
) -> list[Tensor]:
    """The weights after some steps; `change` may touch gradients."""
    for step in range(start, start + num_steps):
        optimizer.zero_grad()
        loss = backward(model, step)
        if monitor:
            monitor.loss(loss)
        change(step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 3e-3, "betas": (0.9, 0.95), **options})


def events(monitor: HealthMonitor, event: str) -> list[dict[str, Any]]:
    return [record for record in monitor.records if record["event"] == event]


KINDS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_same_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    results, noise = [], []
    for watched in (False, True):
        model = Model().to(dtype)
        optimizer = adamw(model, **KINDS[kind])
        monitor = HealthMonitor(optimizer, model, HealthConfig(record_every=3, histogram_every=4)) if watched else None
        torch.manual_seed(5)
        results.append(train(model, optimizer, 14, monitor))
        noise.append(torch.rand(3))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert torch.equal(*noise), "and so are the random numbers that follow"


def test_for_loop_foreach_and_fused_are_read_alike() -> None:
    readings = []
    for options in KINDS.values():
        model = Model().double()
        optimizer = adamw(model, **options)
        monitor = HealthMonitor(optimizer, model)
        train(model, optimizer, 20, monitor)
        assert monitor.reading is not None
        readings.append(monitor.reading)
    for other in readings[1:]:
        for key, values in readings[0].statistics.items():
            np.testing.assert_allclose(other.statistics[key], values, rtol=1e-6, atol=1e-9, err_msg=key)


def test_records_tell_what_is_watched_and_what_was_seen(tmp_path: Path) -> None:
    model = Model()
    optimizer = adamw(model, eps=1e-10)
    told: list[dict[str, Any]] = []
    config = HealthConfig(record_every=5, histogram_every=10)
    monitor = HealthMonitor(optimizer, model, config, folder=tmp_path / "run", emit=told.append)
    train(model, optimizer, 20, monitor)
    monitor.close()
    assert told == list(monitor.records)
    (start,) = events(monitor, "health_start")
    names = [name for name, _ in model.named_parameters()]
    assert list(start["tensors"]) == names, "in the model's order"
    assert start["tensors"]["layers.1.2.bias"] == "layer 1"
    assert start["tensors"]["embed_tokens.weight"] == "embedding"
    assert (start["optimizer"], start["eps"], start["betas"], start["left_out"]) == ("AdamW", 1e-10, [0.9, 0.95], {})
    assert {rule["rule"] for rule in start["rules"]} >= {"burst", "stall", "surge", "loss"}
    health = events(monitor, "health")
    assert [record["step"] for record in health] == [5, 10, 15, 20]
    assert list(health[0]["tensors"]) == names
    assert health[0]["tensors"]["embed_tokens.weight"]["unseen"] == pytest.approx(0.5)
    assert 2 < health[0]["loss"] < 6
    assert health[0]["tensors"]["norm.weight"]["g_rms"] > 0
    assert [record["step"] for record in events(monitor, "health_histogram")] == [10, 20]
    layers = events(monitor, "health_histogram")[0]["layers"]
    assert list(layers) == ["embedding", "layer 0", "layer 1", "norm", "head"]
    assert sum(layers["layer 0"]) == 16 * 32 * 2 + 48
    assert len(layers["layer 0"]) == 41
    written = read_events(tmp_path / "run")
    assert [record["event"] for record in written] == [record["event"] for record in told] + ["stop"]
    assert "NaN" not in (tmp_path / "run" / "events.jsonl").read_text()
    with pytest.raises(StopIteration):
        next(iter(optimizer._optimizer_step_pre_hooks))


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    model = Model()
    with pytest.raises(DataError, match=r"the health monitor cannot write to .*taken: File exists. Name a folder"):
        HealthMonitor(adamw(model), model, folder=tmp_path / "taken")


def test_the_estimated_norm_is_that_of_all_gradients() -> None:
    model = Model()
    optimizer = adamw(model)
    monitor = HealthMonitor(optimizer, model)
    norms: list[float] = []
    train(
        model,
        optimizer,
        3,
        monitor,
        lambda step: norms.append(nn.utils.get_total_norm(p.grad for p in model.parameters()).item()),
    )
    assert monitor.reading is not None
    assert monitor.reading.grad_norm == pytest.approx(norms[-1], rel=1e-5)
    monitor.grad_norm(torch.tensor(7.0))
    train(model, optimizer, 1, monitor)
    assert monitor.reading.grad_norm == 7.0


def test_with_a_closure_it_looks_after_the_closure() -> None:
    """As Lightning calls an optimiser: the gradients are made inside step()."""
    readings = []
    for closed in (False, True):
        model = Model()
        optimizer = adamw(model)
        monitor = HealthMonitor(optimizer, model)
        for step in range(5):

            def closure(step: int = step, model: nn.Module = model, optimizer: Optimizer = optimizer) -> Tensor:
                optimizer.zero_grad()
                return backward(model, step)

            if closed:
                assert optimizer.step(closure) is not None
            else:
                monitor.loss(closure())
                optimizer.step()
        readings.append(monitor.reading)
    one, other = readings
    assert one.loss == other.loss
    assert one.loss is not None
    for key, values in one.statistics.items():
        np.testing.assert_array_equal(other.statistics[key], values, err_msg=key)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adafactor, torch.optim.Muon])
def test_an_optimiser_that_is_no_adam_is_named(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(8, 8, bias=False)
    optimizer = make(model.parameters(), lr=0.01)
    monitor = HealthMonitor(optimizer, model)
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert monitor.tensors == []
    assert monitor.off_reason is None
    assert f"weight not watched: {make.__name__} keeps no second moment as Adam does" in capsys.readouterr().err
    assert events(monitor, "health_start")[0]["left_out"] == {
        "weight": f"{make.__name__} keeps no second moment as Adam does"
    }


def test_sparse_gradients_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Embedding(20, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    monitor = HealthMonitor(optimizer, model)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    assert monitor.off_reason is None
    assert "weight not watched: its gradients are sparse" in capsys.readouterr().err
    assert monitor.tensors == []


class Packed(torch.optim.Optimizer):
    """Keeps its moments in a way of its own, as 8-bit optimisers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 1, "state1": torch.zeros(4, dtype=torch.uint8)}


def test_moments_in_another_form_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = Packed(model.parameters())
    monitor = HealthMonitor(optimizer, model)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert "Packed keeps step, state1 of it and not the two moments of Adam" in capsys.readouterr().err
    assert monitor.tensors == []


def test_nan_gradients_alarm_and_the_run_goes_on() -> None:
    model = Model()
    optimizer = adamw(model)
    monitor = HealthMonitor(optimizer, model)

    def poison(step: int) -> None:
        if step == 10:
            model.lm_head.weight.grad.fill_(math.nan)

    train(model, optimizer, 14, monitor, poison)
    assert monitor.off_reason is None
    change = next(record for record in events(monitor, "health_change") if record["state"] == "alarm")
    assert change["step"] == 11
    assert (change["evidence"][0]["rule"], change["evidence"][0]["tensor"]) == ("nonfinite", "lm_head.weight")
    json.dumps(list(monitor.records), allow_nan=False)


def test_parameters_added_later_are_watched_from_then_on() -> None:
    model = Model()
    late = list(model.layers[1].parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if all(p is not one for one in late)], lr=1e-3)
    monitor = HealthMonitor(optimizer, model)
    train(model, optimizer, 40, monitor)
    assert "layers.1.0.weight" not in {tensor.name for tensor in monitor.tensors}
    optimizer.add_param_group({"params": late, "lr": 1e-4})
    train(model, optimizer, 1, monitor, start=40)
    reading = monitor.reading
    assert reading is not None
    ages = dict(zip(reading.names, reading.ages.tolist(), strict=True))
    assert (ages["layers.1.0.weight"], ages["layers.0.0.weight"]) == (1, 41)
    lag = dict(zip(reading.names, reading.statistics["lag_cosine"], strict=True))
    assert np.isfinite(lag["layers.0.0.weight"]), "what was known is kept"
    assert len(events(monitor, "health_start")) == 2


def test_frozen_layers_unseen_rows_and_dormant_adapters_are_calm() -> None:
    """A frozen layer in the optimiser, half of the rows unseen, an adapter without gradients that wakes at step 60."""
    model = Model()
    adapter = nn.Linear(16, 16, bias=False)
    nn.init.zeros_(adapter.weight)
    plain = model.norm.forward
    awake = [False]
    model.norm.forward = lambda hidden: plain(hidden + adapter(hidden) * float(awake[0]))  # type: ignore[method-assign]
    model.layers[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([*model.parameters(), *adapter.parameters()], lr=1e-3, betas=(0.9, 0.999))
    monitor = HealthMonitor(optimizer, nn.ModuleDict({"model": model, "adapter": adapter}))

    def wake(step: int) -> None:
        awake[0] = step >= 59

    train(model, optimizer, 110, monitor, wake)
    assert all(record["state"] != "alarm" for record in events(monitor, "health_change"))
    tensors = events(monitor, "health")[1]["tensors"]
    assert "model.layers.0.0.weight" not in tensors
    assert "adapter.weight" not in events(monitor, "health_start")[0]["left_out"]
    reading = monitor.reading
    assert reading is not None
    assert dict(zip(reading.names, reading.ages.tolist(), strict=True))["adapter.weight"] == 50


def test_a_stall_and_its_release_are_seen_before_the_weights_move() -> None:
    """Gradients of every block times 1e-9 from the start, released at step 80: the alarm is of that very step."""
    model = Model()
    optimizer = adamw(model, lr=1e-2, betas=(0.9, 0.999))
    monitor = HealthMonitor(optimizer, model, HealthConfig(record_every=10))

    def stall(step: int) -> None:
        if step < 79:
            for p in [*model.layers.parameters(), *model.embed_tokens.parameters()]:
                p.grad.mul_(1e-9)

    before: list[Tensor] = []
    train(model, optimizer, 79, monitor, stall)
    assert monitor.status.state == "watch"
    assert {evidence.rule for evidence in monitor.status.evidence} >= {"stall", "floor"}
    before = train(model, optimizer, 1, monitor, stall, start=79)
    change = events(monitor, "health_change")[-1]
    assert (change["step"], change["state"]) == (80, "alarm")
    assert {evidence["layer"] for evidence in change["evidence"] if evidence["level"] == "alarm"} >= {
        "layer 0",
        "layer 1",
    }
    assert "lm_head.weight" not in {e["tensor"] for e in change["evidence"] if e["rule"] == "burst"}
    assert [record["step"] for record in events(monitor, "health_histogram")] == [50, 80]
    assert before


class Breaks:
    """An actor that fails at a step."""

    def __init__(self, step: int, where: str) -> None:
        self.step, self.where, self.calls = step, where, 0

    def before_update(self, reading: Reading, tensors: Sequence[Watched]) -> list[dict[str, Any]]:
        self.calls += 1
        if reading.step == self.step and self.where == "before":
            raise ZeroDivisionError("a fault of mine")
        return []

    def after_update(self, tensors: Sequence[Watched]) -> None:
        if self.calls == self.step and self.where == "after":
            raise KeyError("tensor")

    def numbers(self) -> dict[str, Any]:
        return {}

    def restore(self, numbers: dict[str, Any]) -> None:
        pass

    def eps_of(self, name: str, eps: float) -> float:
        return eps


@pytest.mark.parametrize("where", ["before", "after", "emit", "state"])
def test_a_fault_of_its_own_switches_it_off_aloud_and_the_run_goes_on(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, reference = Model(), Model()
    optimizer = adamw(model)

    def emit(record: dict[str, Any]) -> None:
        if where == "emit" and record["step"] == 6:
            raise OSError(28, "No space left on device")

    monitor = HealthMonitor(optimizer, model, HealthConfig(record_every=3), emit=emit, actor=Breaks(6, where))

    def ruin(step: int) -> None:
        if where == "state" and step == 5:
            monitor._tracks[optimizer]._samplers[0].rule = None  # type: ignore[assignment]

    weights = train(model, optimizer, 12, monitor, ruin)
    assert all(torch.equal(a, b) for a, b in zip(weights, train(reference, adamw(reference), 12), strict=True))
    reason = {"before": "ZeroDivisionError: a fault of mine", "after": "KeyError: 'tensor'", "emit": "No space left"}
    assert reason.get(where, "TypeError") in (monitor.off_reason or "")
    (off,) = events(monitor, "health_off")
    assert off["step"] == 6
    assert off["reason"] == monitor.off_reason
    assert "health monitor: switched off at step 6, training goes on: " in capsys.readouterr().err
    monitor.close()


def test_a_resumed_monitor_goes_on_as_if_nothing_had_happened() -> None:
    def run(cut: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        model = Model()
        optimizer = adamw(model)
        monitor = HealthMonitor(optimizer, model, HealthConfig(record_every=1))
        train(model, optimizer, cut, monitor)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "monitor": monitor.state_dict()}
        numbers = json.loads(json.dumps(state["monitor"]["numbers"], allow_nan=False))
        other = Model(seed=1)
        other.load_state_dict(state["model"])
        again = adamw(other)
        again.load_state_dict(state["optimizer"])
        resumed = HealthMonitor(again, other, HealthConfig(record_every=1))
        resumed.load_state_dict({"numbers": numbers, "tensors": state["monitor"]["tensors"]})
        train(other, again, 45 - cut, resumed, start=cut)
        return [record for record in resumed.records if record["event"] == "health"][-10:], resumed.numbers()

    assert run(15) == run(34)


def test_a_resume_without_its_state_takes_adams_count_for_the_age() -> None:
    model = Model()
    optimizer = adamw(model)
    train(model, optimizer, 40)
    monitor = HealthMonitor(optimizer, model)
    train(model, optimizer, 1, monitor, start=40)
    assert monitor.reading is not None
    assert monitor.reading.settled.all()
    assert set(monitor.reading.ages.tolist()) == {41}


def test_a_gradient_scaler_is_seen_through() -> None:
    """A fused optimiser is handed scaled gradients and unscales them itself; at an overflow it does not step."""
    readings = []
    for scaled in (False, True):
        model = Model()
        optimizer = adamw(model, fused=True)
        monitor = HealthMonitor(optimizer, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(6):
            optimizer.zero_grad()
            tokens = torch.arange(20)
            loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 20)
            scaler.scale(loss).backward()
            if scaled and step == 5:
                model.lm_head.weight.grad.fill_(math.inf)
            scaler.step(optimizer)
            scaler.update()
        readings.append(monitor.reading)
        assert monitor.status.state == "calm"
    plain, seen_through = readings
    assert (plain.step, seen_through.step) == (6, 5)
    assert seen_through.statistics["g_rms"].max() < 1


def test_a_rate_that_is_a_tensor_and_complex_weights() -> None:
    weight = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(1e-2), foreach=False, weight_decay=0.0)
    monitor = HealthMonitor(optimizer, nn.Module())
    for _ in range(3):
        optimizer.zero_grad()
        (weight.abs() ** 2).sum().backward()
        before = torch.view_as_real(weight.detach()).clone()
        optimizer.step()
    change = (torch.view_as_real(weight.detach()) - before) / 1e-2
    assert monitor.reading is not None
    assert monitor.reading.statistics["u_rms"][0] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-3)
    assert monitor.reading.statistics["num_active"][0] == 72
    assert monitor.reading.names == ("parameter 0",)


def test_several_optimisers_are_told_apart() -> None:
    model = Model()
    optimizers = {
        "body": adamw(model.layers),
        "rest": torch.optim.Adam([model.embed_tokens.weight, model.lm_head.weight]),
    }
    monitor = HealthMonitor(optimizers, {"one": model, "two": nn.Linear(2, 2)}, HealthConfig(record_every=2))
    for step in range(4):
        backward(model, step)
        for optimizer in optimizers.values():
            optimizer.step()
    assert {(record["of"], record["step"]) for record in events(monitor, "health")} == {
        (name, step) for name in optimizers for step in (2, 4)
    }
    assert {tensor.layer for tensor in monitor.tensors} == {"one layer 0", "one layer 1", "one embedding", "one head"}
    assert monitor.step == 4


def test_steps_may_be_numbered_by_the_loop() -> None:
    model = Model()
    optimizer = adamw(model)
    monitor = HealthMonitor(optimizer, model, HealthConfig(record_every=10))
    monitor.at(100)
    train(model, optimizer, 1, monitor)
    assert monitor.step == 100
    assert [record["step"] for record in events(monitor, "health")] == [100]


def test_announcements_resets_and_what_others_tell() -> None:
    model = Model()
    optimizer = adamw(model)
    monitor = HealthMonitor(optimizer, model)
    train(model, optimizer, 40, monitor)
    monitor.announce("batch of 64 from here on")
    monitor.emit([{"event": "health_action", "step": 41, "action": "skip"}])
    monitor.reset(["norm.weight"])
    train(model, optimizer, 1, monitor, start=40)
    assert events(monitor, "health_announced")[0] == {
        "event": "health_announced",
        "step": 41,
        "reason": "batch of 64 from here on",
    }
    assert events(monitor, "health_action")
    assert monitor.reading is not None
    ages = dict(zip(monitor.reading.names, monitor.reading.ages.tolist(), strict=True))
    assert (ages["norm.weight"], ages["lm_head.weight"]) == (1, 41)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.11.self_attn.q_proj.weight", "layer 11"),
        ("transformer.h.3.ln_1.weight", "layer 3"),
        ("transformer.wte.weight", "embedding"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "head"),
        ("encoder.block.2.layer.0.weight", "encoder layer 2"),
        ("decoder.block.2.layer.0.weight", "decoder layer 2"),
        ("pooler.dense.weight", "pooler"),
        ("0.weight", "layer 0"),
    ],
)
def test_layers_by_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_where_the_host_is_late_every_step_is_read_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of things on CUDA, on the CPU: copies are read a step after they were begun."""
    results = []
    for late in (False, True):
        if late:
            monkeypatch.setattr(health_track, "Arrived", Late)
        model = Model()
        optimizer = adamw(model)
        monitor = HealthMonitor(optimizer, model, HealthConfig(record_every=1))
        train(model, optimizer, 12, monitor)
        results.append([record for record in events(monitor, "health") if record["step"] < 12])
        assert monitor.reading is not None
        assert monitor.reading.step == 12 - late
    assert results[0] == results[1]


class Late(health_track.Arrived):
    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.late = True


def test_bursting_tensors_are_held_by_a_mask() -> None:
    """What CUDA does in the step itself, since its host knows a step late; here on the CPU."""
    model = Model()
    optimizer = adamw(model)
    monitor = HealthMonitor(optimizer, model)
    train(model, optimizer, 40, monitor)
    (sampler,) = monitor._tracks[optimizer]._samplers
    sums = torch.zeros(sampler.num_sums, dtype=torch.float64)
    totals = sums[: len(sampler.tensors) * len(SUMS)].view(-1, len(SUMS))
    totals[:, SUMS.index("old_v")] = 1.0
    totals[:, SUMS.index("old_g2")] = 99.0
    totals[[0, 2], SUMS.index("old_g2")] = 101.0
    settled = np.ones(len(sampler.tensors), bool)
    settled[2] = False
    backward(model, 41)
    hold_bursts(sampler, sums, settled, 10.0)
    held = [not tensor.parameter.grad.any() for tensor in sampler.tensors]
    assert held == [True] + [False] * (len(held) - 1)
