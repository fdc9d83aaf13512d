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
    less_eps,
    rule_of,
    sums,
)
from puna.train.optim import local

ELEMENTS = {"cpu": (1 << 15) - 1}  # looked at together: on a CPU so few that PyTorch wakes no other thread
MOST_ELEMENTS = 1 << 22  # elsewhere
EpsOf = Callable[[str, float], float]
"""The epsilon that a tensor is updated with, from its name and its group's."""


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


@dataclass
class Chunk:
    """Tensors of about one size, which are looked at together."""

    at: list[int]  # their numbers in the sampler
    rows: Tensor  # the same
    layers: Tensor
    previous: Tensor  # (tensors, width), the last gradients


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
        self._chunks = [self._chunk(at, layers) for at in _together([len(i) for i in self._index], kind.device)]
        back = np.argsort([i for chunk in self._chunks for i in chunk.at])
        self._back = torch.from_numpy(back).to(kind.device)

    @property
    def num_sums(self) -> int:
        """Length of what `look` returns."""
        return len(self.tensors) * (len(SUMS) + STALL_BINS) + self.num_layers * RATIO_BINS

    def look(self, eps_of: EpsOf | None = None) -> Tensor:
        """This rank's sums of all tensors, and both counts, as one vector; remembers the gradients."""
        columns = self._hyper(eps_of)
        totals, stalls = [], []
        ratios = torch.zeros(self.num_layers, RATIO_BINS, dtype=torch.float64, device=self.kind.device)
        for chunk in self._chunks:
            own = Hyper(*(column[chunk.rows] for column in columns))
            sample = self._sample(chunk, own)
            total, stall, ratio = sums(sample, own, self.rule, chunk.layers, self.num_layers)
            chunk.previous.copy_(sample.g)
            totals.append(total)
            stalls.append(stall)
            ratios += ratio
        ordered = [torch.cat(parts)[self._back].view(-1) for parts in (totals, stalls)]
        return torch.cat([*ordered, ratios.view(-1)])

    def split(self, vector: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """What `look` returned, summed over ranks: sums, counts of the root of v^ over eps, counts of r by layer."""
        num = len(self.tensors)
        totals, stalls, ratios = np.split(vector, np.cumsum([num * len(SUMS), num * STALL_BINS]))
        return totals.reshape(num, -1), stalls.reshape(num, -1), ratios.reshape(self.num_layers, -1)

    def previous(self) -> dict[str, Tensor]:
        """The last gradients of this rank's coordinates, by tensor, as they lie here."""
        return {
            self.tensors[i].name: row[: len(self._places[i])]
            for chunk in self._chunks
            for i, row in zip(chunk.at, chunk.previous, strict=True)
        }

    def whole_previous(self) -> Tensor:
        """The last gradients of all tensors as one vector over all ranks' coordinates, this rank's in their places."""
        here, parts = self.previous(), []
        for tensor, places, num in zip(self.tensors, self._places, self.num_sampled, strict=True):
            part = torch.zeros(int(num), device=self.kind.device)
            part[places] = here[tensor.name]
            parts.append(part)
        return torch.cat(parts)

    def set_previous(self, whole: Mapping[str, Tensor]) -> None:
        """The last gradients, from all ranks' coordinates of each tensor."""
        here = self.previous()
        for tensor, places in zip(self.tensors, self._places, strict=True):
            if tensor.name in whole:
                here[tensor.name].copy_(whole[tensor.name].to(places.device)[places])

    def keep_previous(self, rows: Mapping[str, Tensor]) -> None:
        """The last gradients of this rank's coordinates, from other samplers' `previous`."""
        for name, row in self.previous().items():
            if name in rows:
                row.copy_(rows[name])

    def _chunk(self, at: list[int], layers: Mapping[str, int]) -> Chunk:
        numbers = torch.tensor([layers[self.tensors[i].layer] for i in at], device=self.kind.device)
        width = max(1, *(len(self._index[i]) for i in at))
        rows = torch.tensor(at, device=self.kind.device)
        return Chunk(at, rows, numbers, torch.zeros(len(at), width, device=self.kind.device))

    def _sample(self, chunk: Chunk, hyper: Hyper) -> Sample:
        """Samples of some tensors; one that has no gradient in this step holds zeros."""
        shape, device = chunk.previous.shape, self.kind.device
        buffer = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(4 + self.kind.amsgrad)]
        for row, i in enumerate(chunk.at):
            gradient, index = self.tensors[i].parameter.grad, self._index[i]
            if gradient is None or gradient.is_sparse or not len(index):
                continue
            sources = self._sources(self.tensors[i].parameter, gradient)
            for number, source in sources.items():
                buffer[number][row, : len(index)] = _pick(source, index)
        scale = vars(self.optimizer).get("grad_scale")
        if scale is not None:
            buffer[0] /= scale
        if isinstance(self.optimizer, Adamax):
            buffer[2] = less_eps(buffer[2], hyper.eps)
        g, m, v, weight, *peak = buffer
        return Sample(g, m, v, weight, chunk.previous.double(), *peak)

    def _sources(self, parameter: Tensor, gradient: Tensor) -> dict[int, Tensor]:
        """What goes into the sample's places: gradient, moments (none before the first step), weight, amsgrad's v."""
        state = self.optimizer.state.get(parameter, {})
        found = {0: gradient, 3: parameter.detach()}
        if "exp_avg" in state:
            found |= {1: state["exp_avg"], 2: state[second_moment(self.optimizer)]}
            if self.kind.amsgrad:
                found[4] = state["max_exp_avg_sq"]
        return found

    def _hyper(self, eps_of: EpsOf | None) -> list[Tensor]:
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

    def _settings(self, tensor: Watched, eps_of: EpsOf | None) -> tuple[float, float, float, float, float]:
        group = tensor.group
        eps = eps_of(tensor.name, group["eps"]) if eps_of else group["eps"]
        decay = group["weight_decay"] if adds_decay(self.optimizer, group) else 0.0
        return (*group["betas"], eps, decay, -1.0 if group.get("maximize") else 1.0)


def _together(widths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Numbers of tensors in chunks: the widest first, so that few places of a chunk are empty."""
    most = ELEMENTS.get(device.type, MOST_ELEMENTS)
    chunks: list[list[int]] = []
    for i in sorted(range(len(widths)), key=lambda i: -widths[i]):
        if not chunks or (len(chunks[-1]) + 1) * widths[chunks[-1][0]] > most or widths[i] < widths[chunks[-1][0]] // 2:
            chunks.append([])
        chunks[-1].append(i)
    return chunks


def _chosen(tensor: Watched, count: int) -> tuple[Integers, Integers]:
    """Places and local indices of a tensor's sample on this rank; a complex coordinate counts as two."""
    chosen = coordinates(tensor.name, tensor.parameter.numel() * _parts(tensor), count)
    if isinstance(tensor.parameter, DTensor):
        return held_here(tensor.parameter, chosen)
    return np.arange(len(chosen)), chosen


def _parts(tensor: Watched) -> int:
    return 2 if tensor.parameter.is_complex() else 1


def _pick(tensor: Tensor, index: Tensor) -> Tensor:
    """Coordinates of this rank's part by flat index, without a copy of the rest."""
    part = local(tensor)
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
