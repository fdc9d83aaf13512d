"""What ranks of these tests do; a module of its own, so that processes can import it."""

import json
from pathlib import Path
from typing import Any

import torch

from puna.recsys.clicks import Clicks
from puna.recsys.config import DlrmConfig, ExchangeConfig
from puna.recsys.task import DlrmTask
from puna.train import checkpoint
from puna.train.config import MeshConfig, RunConfig, ScheduleConfig
from puna.train.mesh import open_mesh, rank
from puna.train.task import Cursor

START = Cursor()
SMALL: dict[str, Any] = {"dim": 4, "bottom": (8,), "top": (8,), "batch": 128, "lr": 0.1}


def task_of(clicks: Clicks, run: Path | None = None, exchange: dict[str, Any] | None = None, **values: Any) -> DlrmTask:
    config = DlrmConfig(**(SMALL | values))
    schedule = ScheduleConfig(decay="constant")
    return DlrmTask(config, ExchangeConfig(**(exchange or {})), schedule, clicks, run, eval_samples=2048)


def steps(task: DlrmTask, count: int, cursor: Cursor = START) -> list[float]:
    losses = []
    for unit, _ in zip(task.units(cursor), range(count), strict=False):
        losses.append(task.step(unit).loss)
    return losses


def train_each(data: str, out: str, settings: str, count: str) -> None:
    """Losses of the first steps under each of the settings, and the figures after them, as JSON."""
    torch.set_num_threads(1)
    clicks, found = Clicks.open(data), {}
    with open_mesh(RunConfig(device="cpu"), MeshConfig()):
        for name, values in json.loads(settings).items():
            task = task_of(clicks, exchange=values.pop("exchange", None), **values)
            found[name] = {"losses": steps(task, int(count)), **task.evaluate("heldout")}
        if rank() == 0:
            Path(out).write_text(json.dumps(found))


def save(data: str, run: str, settings: str, count: str) -> None:
    """Train some steps, save, train as many more; losses of these as JSON in RUN/after.json."""
    _then(data, run, settings, count, load=False)


def load(data: str, run: str, settings: str, count: str) -> None:
    """Load, train some steps; their losses as JSON in RUN/after.json."""
    _then(data, run, settings, count, load=True)


def _then(data: str, run: str, settings: str, count: str, *, load: bool) -> None:
    torch.set_num_threads(1)
    number, folder = int(count), Path(run)
    with open_mesh(RunConfig(device="cpu"), MeshConfig()):
        task = task_of(Clicks.open(data), folder, **json.loads(settings))
        cursor = Cursor(number, number * task.config.batch)
        if load:
            checkpoint.load(folder, task.state())
        else:
            steps(task, number)
            checkpoint.save(folder, task.state(), cursor, keep=2)
        losses = steps(task, number, cursor)
        if rank() == 0:
            (folder / "after.json").write_text(json.dumps(losses))


def plain_products(stacked):
    """By torch, with a graph."""
    rows, columns = torch.tril_indices(stacked.shape[1], stacked.shape[1], offset=-1)
    return torch.cat([stacked[:, 0], (stacked @ stacked.transpose(1, 2))[:, rows, columns]], dim=1)


def plain_logits(model, dense, vectors):
    """A model's by torch, with a graph."""
    x = dense
    for layer in model.bottom_net.layers:
        x = layer(x).relu()
    stacked = torch.cat([x[:, None], vectors], dim=1)
    first = x = plain_products(stacked) if model.config.interaction == "dot" else stacked.flatten(1)
    for layer in model.cross:
        x = first * layer.up(layer.down(x)) + x
    for layer in model.top_net.layers[:-1]:
        x = layer(x).relu()
    return model.top_net.layers[-1](x).squeeze(1)
