"""Next-token prediction on token shards."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import fsum
from typing import Any

import torch
from torch import Tensor

from puna.console import err
from puna.errors import RecipeError
from puna.llama.config import DataConfig, LlamaConfig
from puna.llama.hub import build
from puna.llama.mixture import Mixture, labels, open_sources, plan, shares, table
from puna.llama.model import Llama
from puna.llama.packing import Batch, Samples, Stream, micro_batches
from puna.llama.parallel import spread
from puna.llama.shards import Shards
from puna.train import mesh
from puna.train.clipping import SpamClip, ZClip
from puna.train.config import EvalConfig, HealthConfig, MeshConfig, ScheduleConfig, TrainConfig
from puna.train.logits import measured
from puna.train.memory import keep_freed_memory
from puna.train.mesh import Compute, Mesh
from puna.train.optim import Average, LossScale, make_optimizers
from puna.train.schedule import Schedule
from puna.train.shared_memory import use_shared_memory
from puna.train.task import Cursor, GradientTask, GradientUnit

LOOK_TOKENS = 128  # of a forward for the health monitor


@dataclass(frozen=True)
class Step:
    """One optimiser step: where the run stands before it, its tokens over all ranks, this rank's micro-batches."""

    cursor: Cursor
    tokens: int
    batches: Sequence[Batch]


class Pretrain(GradientTask):
    """Trains a Llama from random weights, a function of the seed; documents packed under the document mask."""

    def __init__(
        self,
        model: LlamaConfig,
        data: DataConfig,
        train: TrainConfig,
        schedule: ScheduleConfig,
        sharding: MeshConfig,
        evaluation: EvalConfig,
        seed: int,
        place: Mesh,
        compute: Compute,
        health: HealthConfig | None = None,
    ) -> None:
        self.config, self.data, self.train, self.place, self.compute = model, data, train, place, compute
        self.evaluation, self.schedule = evaluation, Schedule(schedule, train)
        self.shards = {split: open_sources(data, split) for split in ("train", "heldout")}
        _check_vocabulary(model, self.shards["train"][0])
        self.streams = {split: [Stream(s, seed) for s in sources] for split, sources in self.shards.items()}
        self.mixture = Mixture(self.streams["train"], [weight for _, weight in data.mixture()])
        self.shares, self.plan = shares(data), plan(data, self.shards["train"], train.tokens)
        if place.rank == 0:
            err.print(table(self.plan), markup=False, soft_wrap=True)
        self.model = make_model(model, train, sharding, seed, place, compute)
        average = schedule.average
        optimizers = make_optimizers(self.model, train, is_block_matrix=_is_block_matrix)
        super().__init__(
            {"model": self.model},
            optimizers,
            learning_rate=self.schedule.learning_rate,
            clip=train.clip,
            zclip=ZClip() if train.clip_rule == "zclip" else None,
            spam=SpamClip(optimizers["adamw"]) if train.clip_rule == "spam" else None,
            loss_scale=LossScale() if compute.dtype == torch.float16 else None,
            average=None if average == "none" else Average({"model": self.model}, average, schedule.ema_decay),
            averages=self.schedule.averages,
            health=health,
        )

    def units(self, cursor: Cursor) -> Iterator[Step]:
        """Steps until `train.tokens` are consumed."""
        while cursor.tokens < self.train.tokens:
            tokens = self.schedule.batch_tokens(cursor.tokens)
            seq_len = self.schedule.seq_len(cursor.tokens)
            yield Step(cursor, tokens, self._batches(self.mixture, cursor.position, tokens, seq_len))
            cursor = cursor.after(tokens)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies (nats) over the batch's targets."""
        batch = batch.to(self.place.device)
        return self.model(batch.tokens, batch.targets, mask=batch.mask)

    def companions(self, unit: GradientUnit) -> dict[str, Tensor]:
        """Largest attention logit and log Z of the first tokens of the step."""
        tokens = unit.batches[0].tokens[:1, :LOOK_TOKENS].to(self.place.device)
        with torch.compiler.set_stance("force_eager") if self.train.compile else nullcontext():
            return measured(self.model, self.config.head_dim, tokens)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Mean loss (nats a token) over the first `eval.tokens` tokens of the split, with averaged weights if any.

        Of a mixture: each source in its share, `loss` the mean of their losses by share, loss_NAME that of one.
        """
        with self.average.swapped() if self.average else nullcontext():
            scored = [self._score(*pair) for pair in zip(self.streams[split], self.shares, strict=True)]
        totals = mesh.agree([figure for pair in scored for figure in pair])
        losses = [loss_sum / weight for loss_sum, weight in zip(totals[::2], totals[1::2], strict=True)]
        figures = {"loss": fsum(share * loss for share, loss in zip(self.shares, losses, strict=True))}
        if len(losses) > 1:
            names = labels(self.shards[split])
            figures |= {f"loss_{name}": loss for name, loss in zip(names, losses, strict=True)}
        return figures | {"tokens": sum(totals[1::2])}

    def _score(self, stream: Stream, share: float) -> tuple[float, float]:
        """Sum of this rank's losses over the first `share` of eval.tokens of a stream, and their number."""
        piece = self.train.seq_len * self.train.micro_batch * self.place.world_size
        tokens = max(1, min(int(share * self.evaluation.tokens), stream.shards.num_tokens) // piece) * piece
        total, weight = torch.zeros((), dtype=torch.float64), 0
        for batch in self._batches(stream, 0, tokens, self.schedule.seq_len(self.train.tokens)):
            total += self.loss_sum(batch).double().cpu()
            weight += batch.weight
        return float(total), float(weight)

    def describe(self) -> dict[str, Any]:
        """Facts for the report."""
        return {
            "total_tokens": self.train.tokens,
            "num_parameters": self.config.num_parameters,
            "flops_per_token": self.config.flops_per_token(self.train.seq_len),
            "num_train_tokens": sum(shards.num_tokens for shards in self.shards["train"]),
            "num_train_documents": sum(shards.num_documents for shards in self.shards["train"]),
            "sources": self.plan,
        }

    def _batches(self, stream: Samples, offset: int, tokens: int, seq_len: int) -> list[Batch]:
        return micro_batches(
            stream,
            offset,
            batch_tokens=tokens,
            seq_len=seq_len,
            micro_batch=self.train.micro_batch * self.train.seq_len // seq_len,
            rank=self.place.rank,
            num_ranks=self.place.world_size,
            pack=self.data.packing == "packed",
        )


def make_model(
    config: LlamaConfig, train: TrainConfig, sharding: MeshConfig, seed: int, place: Mesh, compute: Compute
) -> Llama:
    """The model with fresh weights: built on meta, spread, then materialised shard by shard and drawn from the seed."""
    if place.device.type == "cpu":
        keep_freed_memory()
    model = build(config)
    alone = place.world_size == 1 and (compute.dtype == torch.float32 or train.recompute == "none")
    spread(
        model,
        None if alone else place.data_parallel,
        dtype=compute.dtype,
        recompute=train.recompute,
        compile=train.compile,
        reshard_after_forward=sharding.reshard_after_forward,
    )
    if place.shares_memory:
        use_shared_memory(model, place.devices["dp_shard"].get_group())
    model.to_empty(device=place.device)
    model.init_weights(seed, train.init)
    return model


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and ".layers." in name


def _check_vocabulary(model: LlamaConfig, shards: Shards) -> None:
    if shards.vocab_size > model.vocab_size:
        raise RecipeError(
            f"model.vocab_size is {model.vocab_size:,} but the tokenizer of {shards.folder} has {shards.vocab_size:,}",
            f"Set model.vocab_size to {shards.vocab_size} or more.",
        )
