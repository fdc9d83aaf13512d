"""The monitor under Lightning: the same records as in a plain loop, and its state in Lightning's checkpoints."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from puna.llama.config import LlamaConfig
from puna.llama.model import Llama
from puna.report import read_events
from puna.train.config import HealthConfig
from puna.train.health import HealthMonitor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own advice on loggers, workers and devices
STEPS, BATCH, LENGTH = 50, 4, 16
CONFIG = HealthConfig(record_every=5)


def batches(first: int = 0) -> DataLoader:
    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    rows = text[: STEPS * BATCH * LENGTH].view(-1, LENGTH)
    return DataLoader(TensorDataset(rows[first * BATCH :]), batch_size=BATCH)


def model() -> Llama:
    torch.manual_seed(0)
    shape = LlamaConfig(
        num_layers=1, dim=16, ffn_dim=32, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=256, max_seq_len=LENGTH
    )
    return Llama(shape)


def loss_of(llama: Llama, rows: torch.Tensor) -> torch.Tensor:
    return cross_entropy(llama(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def adam(llama: Llama) -> torch.optim.Optimizer:
    return torch.optim.AdamW(llama.parameters(), lr=1e-2)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.llama = model()

    def training_step(self, batch):
        return loss_of(self.llama, batch[0])

    def configure_optimizers(self):
        return adam(self.llama)


def fit(root: Path, folder: Path, data: DataLoader, steps: int, **settings):
    from puna.train.callbacks.lightning import HealthCallback

    health = HealthCallback(folder, CONFIG)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[health], logger=False, default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(), data, **settings)
    return trainer


def samples(folder: Path) -> list[dict]:
    """Health records without the time, names without the module that Lightning puts around."""
    events = read_events(folder / "events.jsonl", [])
    kept = [event for event in events if event["event"] == "health"]
    return [
        {"step": one["step"], "loss": one["loss"]}
        | {name.removeprefix("llama."): values for name, values in one["tensors"].items()}
        for one in kept
    ]


def test_lightning_and_a_plain_loop_give_the_same_records(tmp_path):
    fit(tmp_path, tmp_path / "lightning", batches(), STEPS)
    llama = model()
    optimizer = adam(llama)
    monitor = HealthMonitor(optimizer, llama, CONFIG, folder=tmp_path / "plain")
    for (rows,) in batches():
        loss = loss_of(llama, rows)
        loss.backward()
        monitor.loss(loss)
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    plain = samples(tmp_path / "plain")
    assert [one["step"] for one in plain] == list(range(5, STEPS + 1, 5))
    assert samples(tmp_path / "lightning") == plain


def test_the_state_is_in_the_checkpoint(tmp_path):
    trainer = fit(tmp_path, tmp_path / "first", batches(), 23)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    assert any("tensors" in state for state in kept.values())
    fit(tmp_path, tmp_path / "second", batches(), 30, ckpt_path=tmp_path / "half.ckpt")
    assert [one["step"] for one in samples(tmp_path / "second")] == [25, 30]
