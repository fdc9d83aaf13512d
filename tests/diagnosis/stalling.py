"""A real drop-in run whose first layers may stall and then burst."""

import os
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from puna.llama.config import LlamaConfig
from puna.llama.model import Llama
from puna.train.config import HealthConfig
from puna.train.health import HealthMonitor

BATCH, LENGTH = 8, 16
STALL = range(100)  # steps in which the first layers get next to no gradient


def train(folder: Path, num_steps: int, stall: range) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = LlamaConfig(
        num_layers=3, dim=32, ffn_dim=64, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=256, max_seq_len=LENGTH
    )
    model = Llama(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, betas=(0.9, 0.999), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    monitor = HealthMonitor(optimizer, model, HealthConfig(record_every=5, histogram_every=20), folder=folder)
    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    first = [
        p
        for name, p in model.named_parameters()
        if name.startswith(("model.embed", "model.layers.0.", "model.layers.1."))
    ]
    for step in range(num_steps):
        begins = torch.randint(len(text) - LENGTH - 1, (BATCH,)).tolist()
        rows = torch.stack([text[begin : begin + LENGTH + 1] for begin in begins])
        loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        for parameter in first if step in stall else ():
            parameter.grad *= 1e-9
        monitor.loss(loss)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
    monitor.close()
    return folder
