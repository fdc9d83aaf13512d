"""What is done to a torch Adam from outside, exactly and for one step: rates and epsilons of single tensors, resets."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from puna.train.actions import Knobs, Plan
from puna.train.sharding import local

ONES = {"mu_product"}
"""State that begins at 1 (NAdam's product); all else begins at 0."""


class Levers:
    """Gives single tensors a rate and an epsilon of their own in one step of their optimiser.

    For the length of the step they are in parameter groups of their own, so torch's kernels (for-loop, foreach, fused)
    do the arithmetic. Before and after it the groups are as they were; schedulers never see others.
    """

    def __init__(self) -> None:
        self._kept: dict[Optimizer, list[dict[str, Any]]] = {}

    def engage(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], plan: Plan) -> None:
        """Before a step. parameters: the optimiser's, by the names of the plan; other names are another one's."""
        self.release(optimizer)
        zero_moments(optimizer, [parameters[name] for name in plan.resets if name in parameters])
        knobs = {parameters[name]: knob for name, knob in plan.knobs.items() if name in parameters}
        if not plan.skip and not knobs:
            return
        groups = self._kept[optimizer] = optimizer.param_groups
        if plan.skip:
            optimizer.param_groups = [{**group, "params": []} for group in groups]
        else:
            optimizer.param_groups = [part for group in groups for part in _parts(group, knobs)]

    def release(self, optimizer: Optimizer) -> None:
        """After the step (or where one never came to its end): the groups as they were."""
        if optimizer in self._kept:
            optimizer.param_groups = self._kept.pop(optimizer)

    def release_all(self) -> None:
        """The groups of all optimisers as they were."""
        for optimizer in list(self._kept):
            self.release(optimizer)


@torch.no_grad()
def zero_moments(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Adam begins anew on these tensors: moments and step counters as before the first step."""
    for parameter in parameters:
        for key, tensor in optimizer.state.get(parameter, {}).items():
            local(tensor).fill_(1.0 if key in ONES else 0.0)


def _parts(group: dict[str, Any], knobs: Mapping[nn.Parameter, Knobs]) -> list[dict[str, Any]]:
    """The group without the tensors that have knobs, and a group for each of those."""
    own = [p for p in group["params"] if p in knobs]
    rest = {**group, "params": [p for p in group["params"] if p not in knobs]}
    return [rest, *({**group, "params": [p], **_settings(group, knobs[p])} for p in own)]


def _settings(group: dict[str, Any], knobs: Knobs) -> dict[str, Any]:
    return {"lr": group["lr"] * knobs.rate, "eps": group["eps"] if knobs.eps is None else knobs.eps}
