"""Gathers the sample of an optimiser's tensors, before it steps, from this rank's shards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import NAdam, Optimizer
from torch.optim.adamax import Adamax

from puna.train.adam_stats import (
    RATIO_BINS,
    STALL_BINS,
    SUMS,
    Hyper,
    Integers,
    Numbers,
    Sample,
    Watched,
    adds_decay,
    coordinates,
    held_here,
    rule_of,
    sums,
)
from puna.train.optim import local

CHUNK = {"cpu": 16}  # tensors that are looked at together: on a CPU what fits its cache
LARGE_CHUNK = 512


@dataclass(frozen=True)
class Kind:
    """What tensors must share to be looked at together."""

    device: torch.device
    groups: tuple[dist.ProcessGroup, ...]  # over which their sums are added
    amsgrad: bool


def kind_of(tensor: Watched) -> Kind:
    """A tensor's kind; the groups are those of the mesh axes that it is sharded over."""
    parameter = tensor.parameter
    groups: tuple[dist.ProcessGroup, ...] = ()
    if isinstance(parameter, DTensor):
        devices = parameter.device_mesh
        cut = [axis for axis, placement in enumerate(parameter.placements) if placement.is_shard()]
        groups = tuple(devices.get_group(axis) for axis in cut if devices.size(axis) > 1)
    return Kind(parameter.device, groups, bool(tensor.group.get("amsgrad")))


class Sampler:
    """Tensors of one optimiser and one kind; keeps the last gradient of their samples.

    layers: all layers with their indices; count: most coordinates of a tensor.
    """

    def __init__(self, kind: Kind, tensors: Sequence[Watched], layers: Mapping[str, int], count: int) -> None:
        self.kind, self.tensors, self.num_layers = kind, list(tensors), len(layers)
        self.optimizer = tensors[0].optimizer
        self.rule = rule_of(self.optimizer)
        self.num_sampled = np.array([min(count, tensor.parameter.numel() * _parts(tensor)) for tensor in tensors])
        chosen = [_chosen(tensor, count) for tensor in tensors]
        self._places = [torch.from_numpy(places).to(kind.device) for places, _ in chosen]
        self._index = [torch.from_numpy(index).to(kind.device) for _, index in chosen]
        self._layers = torch.tensor([layers[tensor.layer] for tensor in tensors], device=kind.device)
        width = max(1, max(len(index) for _, index in chosen))
        self._rows = CHUNK.get(kind.device.type, LARGE_CHUNK)
        self._buffer = torch.zeros(4, min(self._rows, len(tensors)), width, dtype=torch.float64, device=kind.device)
        self.previous = torch.zeros(len(tensors), width, device=kind.device)

    @property
    def num_sums(self) -> int:
        """Length of what `look` returns."""
        return len(self.tensors) * (len(SUMS) + STALL_BINS) + self.num_layers * RATIO_BINS

    def look(self, eps_of: Callable[[str, float], float] | None = None) -> Tensor:
        """This rank's sums of all tensors, and both counts, as one vector; remembers the gradients.

        eps_of: the epsilon of a tensor, from its name and its group's.
        """
        hyper, scale = self._hyper(eps_of), vars(self.optimizer).get("grad_scale")
        totals, stalls = [], []
        ratios = torch.zeros(self.num_layers, RATIO_BINS, dtype=torch.float64, device=self.kind.device)
        for start in range(0, len(self.tensors), self._rows):
            rows = slice(start, min(start + self._rows, len(self.tensors)))
            sample = self._sample(rows, scale)
            total, stall, ratio = sums(
                sample,
                Hyper(*(column[rows] for column in hyper)),
                self.rule,
                self._layers[rows],
                self.num_layers,
            )
            self.previous[rows] = sample.g
            totals.append(total)
            stalls.append(stall)
            ratios += ratio
        return torch.cat([torch.cat(totals).view(-1), torch.cat(stalls).view(-1), ratios.view(-1)])

    def whole_previous(self) -> Tensor:
        """The last gradients as one vector over all ranks' coordinates, this rank's in their places."""
        parts = [self.previous.new_zeros(int(num)) for num in self.num_sampled]
        for part, places, row in zip(parts, self._places, self.previous, strict=True):
            part[places] = row[: len(places)]
        return torch.cat(parts)

    def set_previous(self, row: int, whole: Tensor) -> None:
        """The last gradient of a tensor, from all ranks' coordinates."""
        places = self._places[row]
        self.previous[row, : len(places)] = whole.to(self.previous.device)[places]

    def keep_previous(self, rows: Mapping[str, Tensor]) -> None:
        """The last gradients of tensors that another sampler of this rank has looked at, by name."""
        for tensor, places, row in zip(self.tensors, self._places, self.previous, strict=True):
            if tensor.name in rows:
                row[: len(places)] = rows[tensor.name][: len(places)]

    def split(self, vector: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """What `look` returned, summed over ranks: sums, counts of sqrt(v) / eps, counts of r by layer."""
        ends = np.cumsum([len(self.tensors) * len(SUMS), len(self.tensors) * STALL_BINS])
        totals, stalls, ratios = np.split(vector, ends)
        return (
            totals.reshape(len(self.tensors), -1),
            stalls.reshape(len(self.tensors), -1),
            ratios.reshape(self.num_layers, -1),
        )

    def _sample(self, rows: slice, scale: Tensor | None) -> Sample:
        """Samples of some tensors; one that has no gradient in this step holds zeros."""
        tensors = self.tensors[rows]
        buffer = self._buffer[:, : len(tensors)].zero_()
        peak = torch.zeros_like(buffer[0]) if self.kind.amsgrad else None
        for row, tensor, index in zip(range(len(tensors)), tensors, self._index[rows], strict=True):
            gradient = tensor.parameter.grad
            if gradient is None or gradient.is_sparse or not len(index):
                continue
            state, held = self.optimizer.state.get(tensor.parameter, {}), slice(len(index))
            buffer[0, row, held] = _pick(gradient, index)
            buffer[3, row, held] = _pick(tensor.parameter, index)
            if "exp_avg" in state:
                buffer[1, row, held] = _pick(state["exp_avg"], index)
                buffer[2, row, held] = _pick(state[second_moment(self.optimizer)], index)
                if peak is not None:
                    peak[row, held] = _pick(state["max_exp_avg_sq"], index)
        if scale is not None:
            buffer[0] /= scale
        return Sample(buffer[0], buffer[1], buffer[2], buffer[3], self.previous[rows].double(), peak)

    def _hyper(self, eps_of: Callable[[str, float], float] | None) -> list[Tensor]:
        """Columns (tensors, 1) of `Hyper`, on the device; no device is waited for."""
        columns = [[steps_taken(tensor) for tensor in self.tensors]]
        settings = [self._settings(tensor, eps_of) for tensor in self.tensors]
        columns += [list(column) for column in zip(*settings, strict=True)]
        if isinstance(self.optimizer, NAdam):
            states = [self.optimizer.state.get(tensor.parameter, {}) for tensor in self.tensors]
            columns.append([state.get("mu_product", 1.0) for state in states])
            columns.append([tensor.group["momentum_decay"] for tensor in self.tensors])
        hyper = [_column(column, self.kind.device) for column in columns]
        hyper[0] = hyper[0] + 1
        return hyper

    def _settings(
        self, tensor: Watched, eps_of: Callable[[str, float], float] | None
    ) -> tuple[float, float, float, float, float]:
        group = tensor.group
        eps = eps_of(tensor.name, group["eps"]) if eps_of else group["eps"]
        decay = group["weight_decay"] if adds_decay(self.optimizer, group) else 0.0
        return (*group["betas"], eps, decay, -1.0 if group.get("maximize") else 1.0)


def _chosen(tensor: Watched, count: int) -> tuple[Integers, Integers]:
    """Places and local indices of a tensor's sample on this rank; a complex coordinate counts as two."""
    size = tensor.parameter.numel() * _parts(tensor)
    chosen = coordinates(tensor.name, size, count)
    if isinstance(tensor.parameter, DTensor):
        return held_here(tensor.parameter, chosen)
    return np.arange(len(chosen)), chosen


def _parts(tensor: Watched) -> int:
    return 2 if tensor.parameter.is_complex() else 1


def _pick(tensor: Tensor, index: Tensor) -> Tensor:
    """Coordinates of this rank's part by flat index, without a copy of the rest."""
    part = local(tensor.detach())
    part = torch.view_as_real(part) if part.is_complex() else part
    return part.view(-1).index_select(0, index) if part.is_contiguous() else torch.take(part, index)


def second_moment(optimizer: Optimizer) -> str:
    """Key of the second moment in the state."""
    return "exp_inf" if isinstance(optimizer, Adamax) else "exp_avg_sq"


def steps_taken(tensor: Watched) -> Tensor | float:
    """Updates that Adam has made of a tensor; some optimisers count by group."""
    state = tensor.optimizer.state.get(tensor.parameter, {})
    return state.get("step", tensor.group.get("step", 0.0))


def _column(values: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """(tensors, 1) of numbers, of which some may be on the device already."""
    if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in values):
        rows = [value if isinstance(value, Tensor) else torch.tensor(value) for value in values]
        return torch.stack([row.to(device, torch.float64, non_blocking=True).reshape(()) for row in rows])[:, None]
    host = torch.tensor([float(value) for value in values], dtype=torch.float64)[:, None]
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
