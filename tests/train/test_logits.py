"""Attention logits grow at a high rate and are bounded by norms of queries and keys; log Z of the output."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puna.train.config import HealthConfig
from puna.train.health import HealthMonitor
from puna.train.logits import LogitWatch, measured

HEADS, SHARED, HEAD_DIM, VOCABULARY = 4, 2, 8, 30


class Attention(nn.Module):
    """Grouped-query attention; keeps its largest logit."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, HEADS * HEAD_DIM), nn.Linear(32, SHARED * HEAD_DIM)
        self.v_proj = nn.Linear(32, HEADS * HEAD_DIM)
        if normed:
            self.q_norm = nn.RMSNorm(HEAD_DIM, elementwise_affine=False)
            self.k_norm = nn.RMSNorm(HEAD_DIM, elementwise_affine=False)
        self.normed, self.largest = normed, 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        query = self.q_proj(hidden).unflatten(-1, (HEADS, HEAD_DIM))
        key = self.k_proj(hidden).unflatten(-1, (SHARED, HEAD_DIM))
        if self.normed:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.repeat_interleave(HEADS // SHARED, 2).transpose(1, 2)
        logits = query @ key.mT / math.sqrt(HEAD_DIM)
        self.largest = logits.abs().max().item()
        value = self.v_proj(hidden).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        return hidden + (logits.softmax(-1) @ value).transpose(1, 2).flatten(-2)


class Model(nn.Module):
    def __init__(self, normed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention = nn.Embedding(VOCABULARY, 32), Attention(normed)
        self.lm_head = nn.Linear(32, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.attention(self.embed(tokens)))


def course(normed: bool, lr: float = 0.1, num_steps: int = 40) -> tuple[list[dict[str, Any]], list[float], list[float]]:
    """Health records of a run at a high rate, and its true largest logits and log Z at every fifth step."""
    model = Model(normed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    monitor = HealthMonitor(optimizer, model, HealthConfig(record_every=5))
    watch = LogitWatch(monitor, model, HEAD_DIM, head=model.lm_head, every=5)
    largest, z = [], []
    for step in range(1, num_steps + 1):
        tokens = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(step))
        logits = model(tokens)
        largest.append(model.attention.largest)
        z.append(logits.logsumexp(-1).mean().item())
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()
    watch.close()
    assert not model.lm_head._forward_hooks
    return [record for record in monitor.records if record["event"] == "health"], largest[4::5], z[4::5]


def test_logits_grow_without_norms_and_stay_bounded_with_them() -> None:
    records, largest, z = course(normed=False)
    told = [record["max_logit"] for record in records if record["step"] % 5 == 0]
    assert all(bound >= true for bound, true in zip(told, largest, strict=True))
    assert all(bound <= 6 * true + 1 for bound, true in zip(told, largest, strict=True)), "and not far from it"
    assert told[-1] > 4 * told[0]
    assert [record["z"] for record in records if record["step"] % 5 == 0] == pytest.approx(z, rel=1e-4)
    records, _, _ = course(normed=True)
    assert max(record["max_logit"] for record in records if record["step"] % 5 == 0) <= math.sqrt(HEAD_DIM) * 1.001


def test_other_steps_and_evaluations_cost_nothing() -> None:
    model = Model(normed=False)
    monitor = HealthMonitor(torch.optim.AdamW(model.parameters()), model)
    LogitWatch(monitor, model, HEAD_DIM, head=model.lm_head, every=7)
    model(torch.zeros(1, 4, dtype=torch.long))
    monitor.at(7)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    assert monitor._given == {}
    model(torch.zeros(1, 4, dtype=torch.long))
    assert set(monitor._given) == {"max_logit", "z"}


def test_a_look_of_its_own_bounds_the_logits_and_leaves_no_hook() -> None:
    model, tokens = Model(normed=False), torch.arange(12)[None]
    found = measured(model, HEAD_DIM, tokens)
    assert model.attention.largest <= found["max_logit"] <= 6 * model.attention.largest + 1
    assert found["z"] == pytest.approx(model(tokens).logsumexp(-1).mean().item(), rel=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
