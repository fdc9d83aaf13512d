"""Bytes of one rank of the busiest pipeline stage, by kind, for many jobs at once."""

import numpy as np

from puna.plan.layout import Columns

KINDS = ("parameters", "gradients", "optimizer", "gathered", "activations", "logits", "reserve")
LOGIT_BYTES = 10.0
"""Of a logit: in 16 bit, in 32 bit, and the gradient in 32 bit."""


def footprint(c: Columns, reserve: float = 1.5e9) -> dict[str, np.ndarray]:
    """Bytes by kind; `total` is their sum. reserve: communication buffers and workspaces.

    Model states (Korthikanti et al. 2022; ZeRO): 16-bit weights and 32-bit gradients on every rank, 12 bytes a
    parameter of master weights and moments, what is sharded divided by the shard group; fully sharded: 16 bytes a
    parameter over the group and two gathered blocks, or everything gathered and summed in a pipeline (under zero2 the
    gradients of one chunk are summed, those of the others scattered). Frozen weights have no gradients and moments.
    Activations of a token and block: 2 bytes of what products and pointwise kernels keep, 5 a s more without flash
    attention; 1F1B keeps pp micro-batches on the first stage, interleaving (1 + (pp - 1) / (pp vp)) as many, ZB-2p
    twice.
    """
    block = block_parameters(c)
    layers = np.ceil(np.round(stage_layers(c), 9))
    inner = ends_count(c)
    table = c.V * c.h / c.tp
    tables = np.where(c.pp > 1, np.where(inner, 0.0, 1.0), np.where(c.tied > 0, 1.0, 2.0))
    local = layers * block / c.tp + tables * table
    group = np.maximum(c.shard, 1)
    word = np.where(c.full_precision > 0, 4.0, 2.0)
    sharded = (c.zero >= 2) & (group > 1)
    kept = sharded & ((c.zero == 2) | (c.pp > 1))
    summed = np.where(c.full_precision > 0, 4.0, c.reduce_bytes) * local
    master = np.where(c.full_precision > 0, 8.0, 12.0) + np.where((c.overlap == 0) & (c.zero == 1), 4.0, 0.0)
    parameters = np.where(c.zero >= 2, 4 * local / group, word * local)
    held = np.where(c.pp > 1, np.where(c.zero == 2, summed / c.vp, summed), 0)
    gradients = np.where(c.zero >= 2, 4 * local / group + np.where(sharded, held, 0), summed)
    optimizer = np.where(c.zero >= 2, 8.0, master) * local / group
    gathered = np.where(kept, word * local, 2 * word * block / c.tp + np.where(c.pp > 1, 0, 2 * word * table))
    gathered = np.where(sharded, gathered, 0)
    tokens = c.b * c.s / c.cp
    logits = np.where(c.pp > 1, 0.0, LOGIT_BYTES) * tokens * c.V / c.tp
    activations = _activations(c, layers, inner)
    parameters, gradients, optimizer = (
        np.where(c.frozen > 0, kept, value)
        for kept, value in (
            (word * local / np.where(sharded, group, 1), parameters),
            (0.0, gradients),
            (0.0, optimizer),
        )
    )
    sight = sight_parameters(c)
    parameters, gradients = parameters + word * sight, gradients + 4 * sight
    optimizer = optimizer + 12 * sight / group
    parts = dict(
        zip(KINDS, (parameters, gradients, optimizer, gathered, activations, logits, reserve + 0 * c.L), strict=True)
    )
    return parts | {"total": sum(parts.values(), np.zeros_like(c.L))}


def ends_count(c: Columns) -> np.ndarray:
    """Whether embedding and head count as a block each, so that the stages are even and the second is the fullest."""
    return (c.L % c.pp != 0) & ((c.L + 2) % (c.pp * c.vp) == 0)


def stage_layers(c: Columns) -> np.ndarray:
    """Blocks of the fullest stage; the embedding and the head count as one each where that makes the stages even."""
    return np.where(ends_count(c), (c.L + 2) / c.pp, c.L / c.pp)


def block_parameters(c: Columns) -> np.ndarray:
    """Elements of the matrices of one block; of its experts, those of one of the ep ranks."""
    return 2 * c.h * c.q * (1 + c.kv / c.a) + (2 + c.gated) * c.h * (c.f + c.E * c.fe / c.ep)


def sight_parameters(c: Columns) -> np.ndarray:
    """Elements a rank holds of what makes a decoder see: its stage's blocks that attend across, all of the encoder."""
    encoder = c.see_layers * (4 * c.see_hidden**2 + 2 * c.see_hidden * c.see_ffn) + c.see_features * c.h
    across = c.see_cross_layers / c.pp * block_parameters(c) / c.tp
    return np.where(c.see_cross_layers > 0, encoder + across, 0.0)


def _activations(c: Columns, layers: np.ndarray, inner: np.ndarray) -> np.ndarray:
    kept, light = kept_bytes(c)
    flying = np.where(inner & (c.vp == 1), np.maximum(1, in_flight(c) - np.where(c.zb == 2, 2, 1)), in_flight(c))
    blocks = flying * layers * ((1 - c.redone) * kept + c.redone * light) + np.where(c.rc == 2, kept, 0)
    return blocks + flying * _seen(c, kept)


def _seen(c: Columns, kept: np.ndarray) -> np.ndarray:
    """Of what makes a decoder see, one micro-batch: patches in the encoder, their keys and values in each block."""
    rows = c.b * c.see_image_tokens / c.tp
    encoder = rows * 2 * (c.see_layers * (8 * c.see_hidden + 2 * c.see_ffn) + c.see_features + c.h)
    keys = rows * 2 * 2 * c.kv * c.q / c.a
    return np.where(c.see_cross_layers > 0, encoder + c.see_cross_layers / c.pp * (kept + keys), 0.0)


def kept_bytes(c: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that one block and micro-batch keep for backward: without recomputation, and with the job's kind of it."""
    tokens = c.b * c.s / c.cp
    word = np.where(c.full_precision > 0, 4.0, 2.0)
    pairs = np.where((c.low > 0) & (c.stack > 1), 1.0, word)
    ffn = (2 + c.gated * c.keeps) * pairs * (c.f + c.act * c.fe)
    qkv = word * c.q * (1 + 2 * c.kv / c.a) + word * c.q
    norms = c.h * (2 * word + 2 * pairs + np.where(c.stack == 0, 8.0, 0.0))
    dropout = np.where(c.flash > 0, 0.0, 2.0) * c.h
    square = np.where(c.flash > 0, 0, 5 * c.a * c.s / c.tp)
    kept = tokens * ((ffn + qkv) / c.tp + (norms + dropout) / np.where(c.sp > 0, c.tp, 1))
    inputs = tokens * word * c.h / np.where(c.sp > 0, c.tp, 1)
    half = 0.5 * (kept + tokens * square) + inputs
    selective = np.where(c.stack <= 1, half, kept)
    return kept + tokens * square, np.where(c.rc == 1, selective, inputs)


def in_flight(c: Columns) -> np.ndarray:
    """Micro-batches whose activations the first stage keeps at one time."""
    micro_batches = np.maximum(1, c.B / (c.dp * c.b))
    depth = np.where(c.vp > 1, c.pp + (c.pp - 1) / c.vp, c.pp) * np.where(c.zb == 2, 2, 1)
    return np.minimum(micro_batches, depth)
