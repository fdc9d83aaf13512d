"""TorchRec's exchange of pooled embeddings within an error bound, for tables sharded whole or by columns.

    model = DistributedModelParallel(module, ...)
    compress(model, bound=0.02, back=0.01)  # on every rank, once

TorchRec's own codecs have to know how many bytes they will make; this takes the place of the collective instead. It has
run with torchrec 1.8.0 and fbgemm-gpu-cpu 1.8.0 beside torch 2.13 (`pip install --no-deps`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable

from puna.errors import RecipeError
from puna.recsys.alltoall import Blocks, Exchange
from puna.recsys.wires import Block, make_wire
from puna.sparse.hashing import key_of

Then = Callable[[Tensor], Tensor]


class PooledExchange(nn.Module):
    """(global batch, widths of this rank's tables) -> (own batch, widths of all); an awaitable, as TorchRec has it."""

    def __init__(
        self, exchange: Exchange, widths: Sequence[Sequence[int]], bound: float, back: float, then: Sequence[Then]
    ) -> None:
        """widths: by rank, of each of its tables, or pieces of tables. then: what is done with what has arrived."""
        super().__init__()
        self.exchange, self.widths, self.bound, self.back, self.then = exchange, widths, bound, back, then
        self.calls = 0

    def forward(self, pooled: Tensor, batch_size_per_rank: list[int] | None = None) -> Awaitable[Tensor]:
        """Sends at once; what waits for the awaitable meanwhile computes."""
        size, rank = self.exchange.size, self.exchange.rank
        counts = batch_size_per_rank or [len(pooled) // size] * size
        self.calls += 1
        sent = [self._blocks(rank, user, counts[user]) for user in range(size)]
        received = [self._blocks(owner, rank, counts[rank]) for owner in range(size)]
        own = list(self.widths[rank])
        pieces = [piece.reshape(-1) for part in pooled.split(counts) for piece in part.split(own, dim=1)]
        x = torch.cat([pooled.new_empty(0), *pieces])
        if torch.is_grad_enabled():
            x.requires_grad_()
            if get_gradient_division():
                x.register_hook(lambda gradient: gradient / size)
        terms = {"bound": self.bound, "bound of gradients": self.back, "calls": self.calls}
        pending = self.exchange.start(x.detach(), sent, received, terms)
        arriving = _Arriving(
            lambda: self._lay_out(self.exchange(x, sent, received, terms=terms, pending=pending), received)
        )
        arriving.callbacks.extend(self.then)
        return arriving

    def _blocks(self, owner: int, user: int, count: int) -> list[Block]:
        return [
            Block(count, width, self.bound, self.back, key_of(self.calls, owner, user, n) if self.back else 0)
            for n, width in enumerate(self.widths[owner])
        ]

    def _lay_out(self, flat: Tensor, received: Blocks) -> Tensor:
        blocks = [block for part in received for block in part]
        parts = flat.split([block.count for block in blocks])
        return torch.cat([p.view(b.rows, b.width) for p, b in zip(parts, blocks, strict=True)], dim=1)


class _Arriving(Awaitable[Tensor]):
    def __init__(self, finish: Callable[[], Tensor]) -> None:
        super().__init__()
        self._finish = finish

    def _wait_impl(self) -> Tensor:
        return self._finish()


def compress(model: nn.Module, *, bound: float = 0.02, back: float = 0.0, codec: str = "auto") -> list[Exchange]:
    """Put an `Exchange` in the place of every exchange of pooled embeddings of tables that are whole or cut by columns.

    bound, back: largest error of a table's vectors and of their gradients, which are rounded without bias, over the
    range of what one rank sends another; 0: float32. Batches have one size for all features. Returns the exchanges,
    which count their traffic.
    Raises RecipeError where the model has none to replace.
    """
    found = []
    for module in model.modules():
        for dist in getattr(module, "_output_dists", []):
            if isinstance(dist, TwPooledEmbeddingDist):
                wires = [make_wire("bounded" if error else "raw", codec) for error in (bound, back)]
                found.append(Exchange(dist._pg, *wires))
                widths, then = dist._emb_dim_per_rank_per_feature, dist._callbacks or ()
                dist._dist = PooledExchange(found[-1], widths, bound, back, then)
    if not found:
        raise RecipeError(
            "the model exchanges no pooled embeddings of tables that are whole or cut by columns",
            "Shard an EmbeddingBagCollection so, by DistributedModelParallel, and compress what that gives.",
        )
    return found
