"""One optimiser under watch: its tensors and their layers, what one look before a step came to, on the host."""

import re
import traceback
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from puna.train.adam_sampler import Kind, Sampler, kind_of, second_moment, steps_taken
from puna.train.adam_stats import SUMS, Numbers, Watched, follows, statistics
from puna.train.config import HealthConfig
from puna.train.detector import Detector, Reading
from puna.train.optim import local
from puna.train.phase import during

WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
NUMBERED = re.compile(r"(?:^|\.)(\d+)(?=\.)")
PLACES = {
    "embedding": re.compile(r"embed|wte|wpe|\btok"),
    "head": re.compile(r"head|unembed|classifier|^output\b"),
    "norm": re.compile(r"norm|ln_f|^ln"),
}
HEADER = 2  # of a vector: whether a rank has failed, whether the update is skipped
Given = Mapping[str, Tensor | float]


class HasEps(Protocol):
    """Who knows the epsilon that a tensor is updated with."""

    def eps_of(self, name: str, eps: float) -> float:
        """Where its group has `eps`."""


def layer_of(name: str) -> str:
    """The layer of a parameter by its name: "layer 3" where it is numbered, else "embedding", "head", "norm" or its
    first word."""
    stack = "encoder " if "encoder." in name else "decoder " if "decoder." in name else ""
    if number := NUMBERED.search(name):
        return f"{stack}layer {number[1]}"
    return next((place for place, pattern in PLACES.items() if pattern.search(name)), name.split(".")[0])


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[Tensor, tuple[str, str]]:
    """Name and layer of every parameter, in the model's order; of several modules "MODULE.PARAMETER"."""
    found: dict[Tensor, tuple[str, str]] = {}
    for module_name, module in modules.items():
        prefix = f"{module_name}." if len(modules) > 1 else ""
        for parameter_name, parameter in module.named_parameters():
            name = WRAPPERS.sub("", parameter_name)
            found.setdefault(parameter, (prefix + name, prefix.replace(".", " ") + layer_of(name)))
    return found


class Arrived:
    """What one look came to, on its way to the host: the samplers' vectors, rates, and what was given with them."""

    def __init__(self, step: int, vectors: list[Tensor], rates: list[Tensor | float], given: Given) -> None:
        self.step, self.late = step, any(vector.is_cuda for vector in vectors)
        self._vectors = [_to_host(vector) for vector in vectors]
        self._rates, self._given = [_to_host(rate) for rate in rates], {k: _to_host(v) for k, v in given.items()}
        self._event = torch.cuda.Event() if self.late else None
        if self._event:
            self._event.record()

    def wait(self) -> None:
        """Until the copies are there, which were begun a step ago."""
        if self._event:
            self._event.synchronize()

    @property
    def failed(self) -> bool:
        """Whether the monitor of any rank has failed."""
        return any(bool(vector[0] > 0) for vector in self._vectors)

    @property
    def skipped(self) -> bool:
        """Whether the update is left out, as a fused optimiser does at an overflow under a gradient scaler."""
        return any(bool(vector[1] > 0) for vector in self._vectors)

    @property
    def sums(self) -> list[Numbers]:
        """By sampler."""
        return [vector[HEADER:].numpy() for vector in self._vectors]

    @property
    def rates(self) -> Numbers:
        """Learning rates by tensor."""
        return np.array([float(rate) for rate in self._rates])

    @property
    def given(self) -> dict[str, float]:
        """Loss, gradient norm, companions."""
        return {name: float(value) for name, value in self._given.items()}


class Track:
    """Follows one optimiser. parameters: name and layer of those of the model."""

    def __init__(
        self, name: str, optimizer: Optimizer, parameters: Mapping[Tensor, tuple[str, str]], config: HealthConfig
    ) -> None:
        self.name, self.optimizer, self.config = name, optimizer, config
        self.label = {"of": name} if name else {}
        self.detector = Detector(config)
        self.step = 0
        self.tensors: list[Watched] = []
        self.left_out: dict[str, str] = {}
        self.news = False  # whether what is watched has changed since it was told
        self.fault: str | None = None  # of this rank's last look
        self._parameters = parameters
        self._ages: dict[str, int] = {}  # steps with gradients, of tensors that have had one
        self._samplers: list[Sampler] = []
        self._signature: tuple[tuple[int, ...], ...] = ()
        self._checks = 0  # looks until the optimiser's state and gradients have shown what they are
        self._pending: Arrived | None = None
        self._fresh = True  # no look yet
        self.arrange()

    @property
    def shared(self) -> bool:
        """Whether other ranks wait for this one's sums."""
        return any(sampler.kind.groups for sampler in self._samplers)

    def arrange(self) -> None:
        """Follow the optimiser's parameter groups, and what its state and gradients turn out to be."""
        signature = tuple(tuple(map(id, group["params"])) for group in self.optimizer.param_groups)
        moved = signature != self._signature
        if moved:
            self._signature, self._checks = signature, 3
        if not self._checks:
            return
        self._checks -= 1
        tensors, left_out = self._found()
        same = {one.name for one in tensors} == {one.name for one in self.tensors} and left_out == self.left_out
        if moved or not same:
            self._lay_out(tensors)
            self.left_out, self.news, self._pending = left_out, self.news or not same, None

    def exchange(self, given: Given, failed: bool, actor: HasEps | None) -> Arrived | None:
        """Look, and add up over the ranks; what has arrived: this look, or on CUDA the one before (None at first).

        failed: this rank takes part only to tell the others that it goes. actor: who may have changed an epsilon; with
        one, on CUDA, tensors that burst have their gradients masked on the device, since the host knows a step late.
        """
        vectors = [self._vector(sampler, failed, actor) for sampler in self._samplers]
        for sampler, vector in zip(self._samplers, vectors, strict=True):
            for group in sampler.kind.groups:
                with during("collective"):
                    dist.all_reduce(vector, group=group)
        arrived = Arrived(self.step, vectors, [tensor.group["lr"] for tensor in self.tensors], given)
        if not arrived.late:
            return arrived
        if actor:
            for sampler, vector in zip(self._samplers, vectors, strict=True):
                hold_bursts(sampler, vector[HEADER:], self._settled(sampler.tensors), self.config.surprise)
        before, self._pending = self._pending, arrived
        if before:
            before.wait()
        return before

    def read(self, arrived: Arrived) -> Reading | None:
        """The reading of what has arrived; None where the update is skipped or there is no tensor."""
        if arrived.skipped or not self.tensors:
            return None
        parts = [sampler.split(vector) for sampler, vector in zip(self._samplers, arrived.sums, strict=True)]
        num_sampled = np.concatenate([sampler.num_sampled for sampler in self._samplers])
        rates = arrived.rates
        found = statistics(
            np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), rates, num_sampled
        )
        self._grow_older(found["num_active"] > 0)
        given = arrived.given
        norm = given.pop("grad_norm", None)
        return Reading(
            step=arrived.step,
            names=self._names,
            layers=self._layers,
            statistics=found,
            ages=np.array([self._ages.get(name, 0) for name in self._names]),
            settled=self._settled(self.tensors),
            loss=given.pop("loss", None),
            grad_norm=self._norm(found, num_sampled) if norm is None else norm,
            companions=given,
        )

    def histogram(self, arrived: Arrived) -> dict[str, Numbers]:
        """Counts of r in 41 bins of [-2, 2], what lies beyond in the outermost, by layer."""
        counts = sum(sampler.split(vector)[2] for sampler, vector in zip(self._samplers, arrived.sums, strict=True))
        return dict(zip(dict.fromkeys(self._layers), np.asarray(counts), strict=True))

    def reset(self, names: tuple[str, ...]) -> None:
        """The moments of these tensors were zeroed."""
        for name in names:
            self._ages.pop(name, None)
        self.detector.forget(names)

    def numbers(self) -> dict[str, Any]:
        """What is remembered, as JSON."""
        return {"step": self.step, "ages": dict(self._ages), "detector": self.detector.numbers()}

    def restore(self, numbers: dict[str, Any]) -> None:
        """From `numbers`."""
        self.step, self._ages, self._fresh = numbers["step"], dict(numbers["ages"]), False
        self.detector.restore(numbers["detector"])

    def last_gradients(self) -> dict[str, Tensor]:
        """The last gradient of every sample, whole on every rank."""
        found: dict[str, Tensor] = {}
        for sampler in self._samplers:
            whole = sampler.whole_previous()
            for group in sampler.kind.groups:
                dist.all_reduce(whole, group=group)
            sizes = sampler.num_sampled.tolist()
            found |= {t.name: part for t, part in zip(sampler.tensors, whole.split(sizes), strict=True)}
        return found

    def restore_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """From `last_gradients`, of this or another sharding."""
        for sampler in self._samplers:
            sampler.set_previous(gradients)

    def _found(self) -> tuple[list[Watched], dict[str, str]]:
        """Tensors to watch in the model's order, and why others are not."""
        tensors, left_out = [], {}
        everything = [(p, group) for group in self.optimizer.param_groups for p in group["params"]]
        for number, (parameter, group) in enumerate(everything):
            name, layer = self._parameters.get(parameter, (f"parameter {number}", "other"))
            tensor = Watched(name, layer, parameter, self.optimizer, group)
            if reason := refusal(tensor):
                left_out[name] = reason
            else:
                tensors.append(tensor)
        order = {parameter: i for i, parameter in enumerate(self._parameters)}
        return sorted(tensors, key=lambda tensor: order.get(tensor.parameter, len(order))), left_out

    def _lay_out(self, tensors: list[Watched]) -> None:
        kinds: dict[Kind, list[Watched]] = {}
        for tensor in tensors:
            kinds.setdefault(kind_of(tensor), []).append(tensor)
        self.tensors = [tensor for alike in kinds.values() for tensor in alike]
        self._names = tuple(tensor.name for tensor in self.tensors)
        self._layers = tuple(tensor.layer for tensor in self.tensors)
        layers = {layer: i for i, layer in enumerate(dict.fromkeys(self._layers))}
        kept = {name: row for sampler in self._samplers for name, row in sampler.previous().items()}
        self._samplers = [Sampler(kind, alike, layers, self.config.sample) for kind, alike in kinds.items()]
        for sampler in self._samplers:
            sampler.keep_previous(kept)

    def _vector(self, sampler: Sampler, failed: bool, actor: HasEps | None) -> Tensor:
        """Header and sums of this rank; after a fault zeros, so that no other rank waits in vain."""
        header = torch.zeros(HEADER, dtype=torch.float64, device=sampler.kind.device)
        sums: Tensor | None = None
        if not failed and self.fault is None:
            try:
                sums = sampler.look(actor.eps_of if actor else None)
            except Exception:
                self.fault = last_line()
        if sums is None:
            header[0] = 1.0
            sums = header.new_zeros(sampler.num_sums)
        overflow = vars(self.optimizer).get("found_inf")
        if overflow is not None:
            header[1] = overflow.to(header.device)
        return torch.cat([header, sums])

    def _grow_older(self, active: Any) -> None:
        """Count a step of each tensor that has gradients; at the first look Adam's own count stands for the past."""
        for tensor, alive in zip(self.tensors, active, strict=True):
            if alive:
                past = int(steps_taken(tensor)) if self._fresh else 0
                self._ages[tensor.name] = self._ages.get(tensor.name, past) + 1
        self._fresh = False

    def _settled(self, tensors: list[Watched]) -> Any:
        return np.array([self._ages.get(t.name, 0) > 3 / (1 - float(t.group["betas"][0])) for t in tensors], bool)

    def _norm(self, found: Mapping[str, Numbers], num_sampled: Any) -> float:
        """The gradient's norm over all tensors, estimated from the sample."""
        sizes = np.array([tensor.parameter.numel() for tensor in self.tensors])
        squares = found["g_rms"] ** 2 * found["num_active"] / np.maximum(num_sampled, 1) * sizes
        return float(np.sqrt(np.nansum(squares)))


def refusal(tensor: Watched) -> str | None:
    """Why a tensor cannot be watched, if so."""
    group, state = tensor.group, tensor.optimizer.state.get(tensor.parameter, {})
    kind = type(tensor.optimizer).__name__
    if "betas" not in group or "eps" not in group:
        return f"{kind} keeps no second moment as Adam does"
    if not follows(tensor.parameter):
        return "it is sharded in strides, of which it is not known which coordinates a rank holds"
    if tensor.parameter.grad is not None and tensor.parameter.grad.is_sparse:
        return "its gradients are sparse"
    if not state:
        return None
    moments = [state.get(key) for key in ("exp_avg", second_moment(tensor.optimizer))]
    if not all(isinstance(moment, Tensor) for moment in moments):
        return f"{kind} keeps {', '.join(state)} of it and not the two moments of Adam"
    parts = [local(moment) for moment in moments]
    if any(type(part) is not Tensor or part.shape != local(tensor.parameter).shape for part in parts):
        return f"{kind} keeps its moments packed or in another shape"
    return None


def hold_bursts(sampler: Sampler, sums: Tensor, settled: Any, threshold: float) -> None:
    """Mask the gradients of settled tensors whose surprise is above the threshold, without asking the device."""
    totals = sums[: len(sampler.tensors) * len(SUMS)].view(-1, len(SUMS))
    burst = totals[:, SUMS.index("old_g2")] > threshold**2 * totals[:, SUMS.index("old_v")]
    held = burst & torch.from_numpy(settled).to(burst.device, non_blocking=True)
    for tensor, mask in zip(sampler.tensors, held, strict=True):
        if tensor.parameter.grad is not None:
            local(tensor.parameter.grad).masked_fill_(mask, 0.0)


def last_line() -> str:
    """Of the exception that is being handled."""
    return traceback.format_exc().strip().splitlines()[-1]


def _to_host(value: Any) -> Any:
    """A tensor's copy on the host, under way if it comes from CUDA; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_cuda:
        return value
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
