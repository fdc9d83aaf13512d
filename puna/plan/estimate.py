"""Seconds of one optimiser step, for many jobs at once: kernels, collectives, and how they overlap."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from puna.plan import collectives
from puna.plan.footprint import block_parameters, ends_count, sight_parameters, stage_layers
from puna.plan.layout import Columns

Array = np.ndarray

TENSORS = 12
"""Parameter tensors of a GPT block, biases and norms included: what sharding without flat units gathers one by one."""


LAUNCH = 4e-6
"""Seconds of a kernel beyond its work."""
HANDOVER = 2e-5
"""Seconds of passing activations to the next stage, beyond their bytes."""
STOPS_EARLY = np.array([True, True, False, True, False])
"""By stack: recomputation leaves out a block's last product, whose result backward does not need. PyTorch's checkpoints
stop before it, XLA drops it as dead code; Megatron does all of the block again."""
WORST = 0.2
"""Least share of its rate that a matrix product keeps, whatever its sizes."""
SCHEDULE_FILL = np.array([1.0, 0.45, 0.05])
"""Bubble of 1F1B, ZB-1p and ZB-2p over that of 1F1B (Qi et al. 2024, arXiv 2401.10241, table 2)."""


@dataclass(frozen=True)
class Constants:
    """What no data sheet says. Fitted by `puna plan fit`; the values that ship are in constants.json."""

    matmul: float = 0.95  # share of the achievable matrix rate that large products reach in a step
    feed: float = 0.002  # bytes/FLOP that a product's operands cost at memory bandwidth beside its arithmetic
    align: float = 0.25  # loss of rate for each halving of a matrix dim's power-of-two factor below 64
    memory: float = 0.75  # share of the memory bandwidth that pointwise kernels reach
    attention: float = 0.55  # share of the achievable rate that fused attention reaches
    host: float = 1.0e-3  # seconds in which the host issues one block's forward
    link: float = 0.75  # share of the link bandwidth
    network: float = 0.8  # share of the network bandwidth
    hop: float = 2.2  # multiplier of NCCL's network hop under load
    hidden: float = 0.7  # share of tensor-parallel traffic that chunked overlap hides
    contention: float = 0.2  # slow-down of compute beside communication, per second of communication
    low: float = 0.8  # rate of 8- and 4-bit products over what their peak says
    jitter: float = 0.02  # spread of ranks' step times, which all wait for
    throttle: float = 0.6  # exponent of the power limit in the matrix rate
    step: float = 0.01  # seconds of a step that belong to no layer
    eager: float = 2.0  # pointwise traffic over that of fused kernels, by stack
    compiled: float = 1.0
    megatron: float = 1.2
    jax: float = 1.2

    def vector(self) -> Array:
        """The values in the order of the fields."""
        return np.array(list(asdict(self).values()))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The fields' names."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def of(cls, vector: Array) -> "Constants":
        """From a vector in the order of the fields."""
        return cls(*(float(value) for value in vector))


def estimate(c: Columns, k: Constants) -> dict[str, Array]:
    """Seconds by kind; "seconds" is the step.

    The parts add up to the step: products, attention, pointwise and recompute as the busiest stage does them;
    exposed communication by kind (tensor, context, experts, sharding, gradients, pipeline); bubble; vision (image
    encoder and blocks that attend to it, their traffic included); host (waiting for the launch of kernels); optimizer;
    other (waiting for the slowest rank, and what belongs to no block).
    """
    f = _Forward(c, k)
    b = _Block(c, k, f)
    layers, m = stage_layers(c), np.maximum(1.0, c.B / (c.dp * c.b))
    sight = _sight(c, k, f)
    blocks = layers * b.seconds + sight
    last = blocks + np.where(ends_count(c), f.head - b.seconds, f.head)
    slowest = np.maximum(last, blocks)
    fill = np.where(c.pp > 1, (blocks * (c.pp - 1) + last - slowest) / c.vp, 0.0) * SCHEDULE_FILL[c.zb.astype(int)]
    parts = {name: m * layers * value for name, value in b.parts.items()}
    parts["products"] = parts["products"] + m * np.where(slowest > blocks, f.head, 0.0)
    parts["vision"] = m * sight
    parts["sharding"] = parts["sharding"] + b.gather + b.reduce
    parts["bubble"] = fill
    parts["pipeline"] = _pipeline(c, k, m)
    parts["gradients"] = _gradients(c, k, layers, m, b)
    parts["optimizer"] = _optimizer(c, k, layers)
    alone = ("pipeline", "gradients", "optimizer")
    total = m * slowest + fill + b.gather + b.reduce + sum(parts[name] for name in alone)
    parts["host"] = np.maximum(0.0, total - sum(parts.values()))
    parts["other"] = total * k.jitter * np.sqrt(2 * np.log(np.maximum(1.0, c.n / c.node))) + k.step
    return parts | {"seconds": total + parts["other"]}


class _Block:
    """One block and micro-batch, forward and backward: seconds, and where they go; host is what is left."""

    def __init__(self, c: Columns, k: Constants, f: "_Forward") -> None:
        redo = np.select([c.rc == 2, (c.rc == 1) & (c.stack <= 1)], [c.redone, 0.5], 0.0)
        core = np.where((c.rc == 1) & (c.stack > 1) & (c.flash == 0), f.attention, 0.0)
        attention_back = f.attention * np.where(c.flash > 0, 2.4, 1.7)
        forward = f.products + f.pointwise + f.attention
        skipped = np.where(STOPS_EARLY[c.stack.astype(int)], f.last, 0.0)
        recompute = redo * (forward - skipped) + core
        backward = f.products_back + 1.6 * f.pointwise + attention_back + recompute
        routed = f.tensor + f.exchange
        traffic, traffic_back = routed + f.context, routed * (1 + redo) + f.context * (2 + redo)
        self.gather, self.reduce = _sharding(c, k)
        busy = np.maximum(forward + traffic, f.host)
        busy_back = np.maximum(backward + traffic_back, f.host * (1.3 + redo))
        wait = _waits(busy, self.gather, c, k)
        wait += _waits(busy_back, np.where(c.zero >= 3, self.gather, 0.0) + self.reduce, c, k)
        self.back = busy_back
        self.seconds = busy + busy_back + wait
        self.parts = {
            "products": f.products + f.products_back,
            "attention": f.attention + attention_back,
            "pointwise": 2.6 * f.pointwise,
            "recompute": recompute,
            "tensor": f.tensor * (2 + redo),
            "context": f.context * (3 + redo),
            "experts": f.exchange * (2 + redo),
            "sharding": wait,
        }


class _Forward:
    """Seconds of one block's forward on one rank, by kind."""

    def __init__(self, c: Columns, k: Constants) -> None:
        self.c, self.k = c, k
        tokens = c.b * c.s / c.cp
        head_dim = c.q / c.a
        kv = c.kv * head_dim
        low = c.low > 0
        shapes = [(c.h, (c.q + 2 * kv) / c.tp), (c.q / c.tp, c.h)]
        width = np.maximum(1.0, c.f) / c.tp
        wide = [(c.h, (1 + c.gated) * width), (width, c.h)]
        forward, backward = self._products(tokens, shapes, low)
        dense, dense_back = self._products(tokens, wide, low)
        self.last = np.where(c.f > 0, self.matmul(tokens, c.h, width, low), 0.0)
        routed, routed_back = self._experts(tokens, low)
        self.products = forward + np.where(c.f > 0, dense, 0.0) + routed
        self.products_back = backward + np.where(c.f > 0, dense_back, 0.0) + routed_back
        vocab = np.ceil(c.V / c.tp / 128) * 128
        no = np.zeros_like(low)
        head = self.matmul(tokens, vocab, c.h, no) + self.matmul(tokens, c.h, vocab, no)
        rate = c.bw * k.memory
        head = head + np.where(c.frozen > 0, 0.0, self.matmul(c.h, vocab, tokens, no))
        self.head = head + tokens * vocab * np.where(c.stack == 0, 22.0, 18.0) / rate
        self.attention = self._attention(tokens, head_dim, rate)
        self.pointwise = self._pointwise(tokens, rate)
        nodes = c.tp
        shared = np.minimum(c.tp, c.domain)
        one = collectives.reduce_all(2 * tokens * c.h, nodes, shared, c.link * k.link, c.net * k.network, k.hop)
        self.tensor = 2 * one * np.where(c.tp_overlap > 0, 1 - k.hidden, 1.0)
        self.context = self._context(tokens, kv)
        self.exchange = self._exchange(tokens)
        factor = np.array([1.0, 0.7, 1.0, 0.15, 0.5])[c.stack.astype(int)]
        self.host = k.host * factor * np.where(c.tp > 1, 1.3, 1.0)

    def _products(self, rows: Array, shapes: Sequence[tuple[Array, Array]], low: Array) -> tuple[Array, Array]:
        """Seconds of products with matrices (inner, width), and of the two that backward does for each; of frozen ones
        it does one."""
        trained = self.c.frozen == 0
        forward = sum((self.matmul(rows, width, inner, low) for inner, width in shapes), np.zeros_like(rows))
        backward = sum(
            (
                self.matmul(rows, inner, width, low) + trained * self.matmul(inner, width, rows, low)
                for inner, width in shapes
            ),
            np.zeros_like(rows),
        )
        return forward, backward

    def _experts(self, tokens: Array, low: Array) -> tuple[Array, Array]:
        """Products of a rank's experts, each with its even share of the tokens of all ep ranks."""
        c = self.c
        rows = np.maximum(1.0, tokens * c.act * c.ep / np.maximum(1.0, c.E))
        width = np.maximum(1.0, c.fe) / c.tp
        forward, backward = self._products(rows, [(c.h, (1 + c.gated) * width), (width, c.h)], low)
        return forward * c.E / c.ep, backward * c.E / c.ep

    def _exchange(self, tokens: Array) -> Array:
        """Tokens to their experts and back."""
        c, k = self.c, self.k
        inside = np.clip(c.domain / c.tp, 1, c.ep)
        size = 2 * tokens * c.act * c.h / c.tp
        return 2 * collectives.exchange(size, c.ep, inside, c.link * k.link, c.net * k.network, k.hop)

    def matmul(self, rows: Array, width: Array, inner: Array, low: Array) -> Array:
        """Seconds of a product (rows, inner) x (inner, width)."""
        c, k = self.c, self.k
        operations = 2 * rows * width * inner
        waves = np.ceil(rows / 128) * np.ceil(width / 128) / c.sm
        filled = waves / (waves + 0.5)
        deep = inner / (inner + 128)
        even = np.maximum(WORST, 1 - k.align * (_halvings(rows) + _halvings(width) + _halvings(inner)) / 3)
        peak = np.where(low, c.peak * k.low, c.peak16)
        rate = peak * c.achievable * k.matmul * filled * deep * even * c.throttle**k.throttle
        moved = 2 * (rows * width + width * inner + rows * inner)
        feed = operations * k.feed / c.bw
        return np.maximum(operations / rate + feed, moved / (c.bw * k.memory)) + LAUNCH

    def _attention(self, tokens: Array, head_dim: Array, rate: Array) -> Array:
        """Scores and values. Fused: half of the square; unfused: all of it, and its passes through memory."""
        c, k = self.c, self.k
        heads = c.a / c.tp
        operations = 4 * tokens * c.s * head_dim * heads
        top = c.peak16 * c.achievable * c.throttle**k.throttle
        long = c.s / (c.s + 512)
        fused = 0.5 * operations / (top * k.attention * c.fused_share * long * head_dim / (head_dim + 32)) + 2 * LAUNCH
        even = np.maximum(WORST, 1 - k.align * 2 * _halvings(head_dim) / 3)
        square = tokens * c.s * heads
        plain = operations / (top * k.matmul * even * head_dim / (head_dim + 128)) + square * 2 * 4 / rate + 5 * LAUNCH
        return np.where(c.flash > 0, fused, plain)

    def _pointwise(self, tokens: Array, rate: Array) -> Array:
        """Norms, residual additions, rotation, activation, casts: bytes over memory bandwidth."""
        c, k = self.c, self.k
        stack = np.array([k.eager, k.compiled, k.megatron, k.jax, k.megatron])[c.stack.astype(int)]
        wide = 2 * 10 * c.h / np.where(c.sp > 0, c.tp, 1)
        narrow = 2 * ((2 + c.gated) * (c.f + c.act * c.fe) + 4 * c.q) / c.tp
        narrow = narrow + 2 * 4 * c.act * c.h / c.tp  # tokens to the order of their experts, and back
        casts = np.where(c.low > 0, 3 * (2 * c.h + 2 * (c.f + c.act * c.fe)) / c.tp, 0)
        return tokens * ((wide + narrow) * stack + casts) / rate

    def _context(self, tokens: Array, kv: Array) -> Array:
        """Keys and values over the context ranks, beside the attention that uses them."""
        c, k = self.c, self.k
        inside = np.clip(c.domain / c.tp, 1, c.cp)
        size = 2 * 2 * c.b * c.s * kv / c.tp
        time = collectives.gather(size, c.cp, inside, c.link * k.link, c.net * k.network, k.hop)
        return np.maximum(0.1 * time, time - 0.5 * self.attention) * (c.cp > 1)


def _sight(c: Columns, k: Constants, f: _Forward) -> Array:
    """Seconds of what makes a decoder see, forward and backward, of one micro-batch on one stage.

    Every stage has its share of the blocks that attend across, and the whole encoder, whose patches are spread over the
    tensor-parallel ranks. All of it is trained.
    """
    if not c.see_cross_layers.any():
        return np.zeros_like(c.L)
    tokens, images = c.b * c.s / c.cp, np.maximum(1.0, c.b * c.see_image_tokens)
    no = np.zeros_like(c.L, dtype=bool)
    rate, head_dim = c.bw * k.memory, c.q / c.a
    top = c.peak16 * c.achievable * c.throttle**k.throttle * k.attention * c.fused_share

    def thrice(rows: Array, shapes: Sequence[tuple[Array, Array]]) -> Array:
        return sum(
            (
                f.matmul(rows, width, inner, no) + f.matmul(rows, inner, width, no) + f.matmul(inner, width, rows, no)
                for inner, width in shapes
            ),
            np.zeros_like(rows),
        )

    ffn = np.maximum(1.0, c.f) / c.tp
    text = thrice(tokens, [(c.h, c.q / c.tp), (c.q / c.tp, c.h), (c.h, (1 + c.gated) * ffn), (ffn, c.h)])
    keys = thrice(images, [(c.h, 2 * c.kv * head_dim / c.tp)])
    scores = 3.4 * 4 * tokens * c.see_image_tokens * c.q / c.tp / (top * head_dim / (head_dim + 32))
    across = text + keys + scores + 2.6 * f.pointwise + 2 * f.tensor
    wide, inner = np.maximum(1.0, c.see_hidden), np.maximum(1.0, c.see_ffn)
    rows = images / c.tp
    layer = thrice(rows, [(wide, 3 * wide), (wide, wide), (wide, inner), (inner, wide)])
    thin = np.maximum(1.0, c.see_hidden / np.maximum(1.0, c.see_heads))
    layer = layer + 3.4 * 4 * rows * c.see_tile * wide / (top * thin / (thin + 32))
    layer = layer + 2.6 * rows * 2 * (10 * wide + 2 * inner) / rate
    joint = thrice(rows, [(np.maximum(1.0, c.see_features), c.h)])
    seconds = c.see_cross_layers / c.pp * across + c.see_layers * layer + joint
    return np.where(c.see_cross_layers > 0, seconds, 0.0)


def _halvings(size: Array) -> Array:
    """How many times 64 must be halved until it divides `size`."""
    size = np.round(size)
    return sum((size % (1 << n) != 0).astype(float) for n in range(1, 7))


def _waits(busy: Array, traffic: Array, c: Columns, k: Constants) -> Array:
    """What compute of `busy` seconds waits for traffic beside it, which also slows it."""
    both = busy + k.contention * np.minimum(busy, traffic)
    total = np.where(c.overlap > 0, (both**6 + traffic**6) ** (1 / 6), busy + traffic)
    return np.where(traffic > 0, total - busy, 0.0)


def _group(c: Columns) -> tuple[Array, Array]:
    """Ranks of the sharding group, and how many of them a fast domain holds."""
    inside = np.clip(c.domain / (c.tp * c.cp), 1, None)
    return c.shard, np.minimum(c.shard, inside)


def _sharding(c: Columns, k: Constants) -> tuple[Array, Array]:
    """Gather and reduction of one block's parameters where they are sharded (zero2, zero3)."""
    n, inside = _group(c)
    block = block_parameters(c) / c.tp
    net = c.net * k.network
    calls = np.where((c.zero == 3) & (c.overlap == 0), TENSORS, 1.0)
    ag = calls * collectives.gather(2 * block / calls, n, inside, c.link * k.link, net, k.hop)
    rs = calls * collectives.gather(c.reduce_bytes * block / calls, n, inside, c.link * k.link, net, k.hop)
    replicas = c.dp * c.cp / np.maximum(1, n)
    whole = collectives.reduce_all(c.reduce_bytes * block / n, replicas, np.ones_like(n), c.link * k.link, net, k.hop)
    rs = rs + np.where(replicas > 1, whole, 0)
    every = ~once_a_step(c)
    return np.where(every, ag, 0.0), np.where(every & (c.frozen == 0), rs, 0.0)


def once_a_step(c: Columns) -> Array:
    """Whether parameters stay gathered and gradients local over the micro-batches: zero1, none, pipelines."""
    return (c.zero < 2) | (c.pp > 1)


def _pipeline(c: Columns, k: Constants, m: Array) -> Array:
    """Activations between stages: forward and backward of every micro-batch and chunk that nothing hides."""
    size = 2 * c.b * c.s / c.cp * c.h / c.tp
    across = c.tp * c.cp * c.dp >= c.domain
    time = size / np.where(across, c.net * k.network, c.link * k.link) + HANDOVER
    exposed = np.where((c.vp > 1) | (c.overlap > 0), 0.3, 1.0)
    return np.where(c.pp > 1, 2 * time * (m * c.vp * exposed + c.pp - 1), 0.0)


def _gradients(c: Columns, k: Constants, layers: Array, m: Array, block: _Block) -> Array:
    """Reduction of gradients and gather of new parameters, once a step, where they are not sharded in the step.

    The reduction hides behind the last backward and the gather behind the next forward. But PyTorch's sharded optimiser
    (torch.distributed.optim.ZeroRedundancyOptimizer) gathers before the step ends: every rank broadcasts its part in
    turn, so that the hops count once a rank, and nothing hides them.
    In a pipeline under zero2, gradients are scattered after every round of as many micro-batches as stages; those of
    the rounds before the last run beside compute.
    """
    local = np.where(c.frozen > 0, 0.0, layers * block_parameters(c) / c.tp + c.V * c.h / c.tp)
    local = np.where(once_a_step(c), local, 0.0) + sight_parameters(c)
    ranks = c.dp * c.cp
    inside = np.clip(np.minimum(ranks, c.domain / c.tp), 1, None)
    net = c.net * k.network
    args = (ranks, inside, c.link * k.link, net, k.hop)
    every = collectives.reduce_all(c.reduce_bytes * local, *args)
    in_turn = (c.stack <= 1) & (c.zero == 1)
    turns = np.where(in_turn, np.maximum(1.0, c.shard), 1.0)
    near = (c.shard, np.minimum(c.shard, inside), c.link * k.link, net, k.hop)
    fetch = np.where(c.zero == 0, 0.0, turns * collectives.gather(2 * local / turns, *near))
    scatter = collectives.gather(c.reduce_bytes * local, *args)
    time = np.where((c.zero == 0) | (c.shard < ranks), every, scatter) + np.where(in_turn, 0.0, fetch)
    beside = np.where(in_turn | (c.zero == 0), block.back, block.seconds)
    waves = np.where(c.vp > 1, np.minimum(m, c.pp) * (1 - 1 / c.vp) * 0.67, 0.0)
    window = np.where(c.overlap > 0, np.maximum(0.8, waves) * layers * beside, 0.0)
    left = np.maximum(time - window, 0.1 * time * (c.overlap > 0))
    early = np.where((c.zero == 2) & (c.pp > 1), np.maximum(0.0, m / c.pp - 1), 0.0) * collectives.gather(
        c.reduce_bytes * local, *args
    )
    slowed = k.contention * (np.minimum(time, window) + early)
    return np.where((local > 0) & (ranks > 1), left + slowed + np.where(in_turn, fetch, 0.0), 0.0)


def _optimizer(c: Columns, k: Constants, layers: Array) -> Array:
    """Reading and writing weights, moments and gradients."""
    local = np.where(c.frozen > 0, 0.0, layers * block_parameters(c) / c.tp + c.V * c.h / c.tp) + sight_parameters(c)
    mine = np.where(c.zero > 0, local / np.maximum(1, c.shard), local)
    return mine * 30 / (c.bw * k.memory) + local * np.where(once_a_step(c), 6.0, 0.0) / (c.bw * k.memory)
