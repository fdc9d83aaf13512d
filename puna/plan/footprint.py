"""Bytes of one rank of the busiest pipeline stage, by kind, for many jobs at once."""

import numpy as np

from puna.plan.layout import Columns

KINDS = ("parameters", "gradients", "optimizer", "gathered", "activations", "logits", "reserve")
FULL, HALF, CORE = 2, 1, 1


def footprint(c: Columns, reserve: float = 1.5e9) -> dict[str, np.ndarray]:
    """Bytes by kind; `total` is their sum. reserve: context, communication buffers and fragments.

    Models states (Korthikanti et al. 2022; ZeRO): 16-bit weights and 32-bit gradients on every rank, 12 bytes a
    parameter of master weights and moments, what is sharded divided by the shard group; fully sharded: 16 bytes a
    parameter over the group, two gathered blocks and the gradient of one in 16 bit. Activations of a token and block:
    2 bytes of what matrix products and pointwise kernels keep, 5 a s more without flash attention; 1F1B keeps pp
    micro-batches on the first stage, interleaving (1 + (pp - 1) / (pp vp)) as many, ZB-2p twice.
    """
    block = block_parameters(c)
    layers = np.ceil(np.round(stage_layers(c), 9))
    table = c.V * c.h / c.tp
    ends = np.where(c.pp > 1, 1.0, np.where(c.tied > 0, 1.0, 2.0)) * table
    local = layers * block / c.tp + ends
    whole = c.zero >= 3
    group = np.maximum(c.shard, 1)
    word = np.where(c.full_precision > 0, 4.0, 2.0)
    kept = np.where(c.zero == 2, local * word, 0)
    parameters = np.where(whole, 4 * local / group, np.where(c.zero == 2, 4 * local / group, word * local))
    gradients = np.where(c.zero >= 2, 4 * local / group, np.where(c.full_precision > 0, 4.0, c.reduce_bytes) * local)
    optimizer = np.where(c.zero >= 2, 8.0, np.where(c.full_precision > 0, 8.0, 12.0)) * local / group
    gathered = np.where(whole, 2 * (2 * block / c.tp + 2 * table), kept + np.where(c.zero == 2, 2 * block / c.tp, 0))
    gathered = np.where((c.zero < 2) | (group <= 1), 0, gathered)
    activations = _activations(c, layers)
    tokens = c.b * c.s / c.cp
    logits = np.where(c.pp > 1, 0.0, 1.0) * tokens * c.V / c.tp * 6.0
    logits = np.minimum(logits, np.maximum(2e9, logits * (c.stack != 1)))
    parts = dict(
        zip(KINDS, (parameters, gradients, optimizer, gathered, activations, logits, reserve + 0 * c.L), strict=True)
    )
    return parts | {"total": sum(parts.values(), np.zeros_like(c.L))}


def stage_layers(c: Columns) -> np.ndarray:
    """Blocks of the fullest stage; the embedding and the head count as one each where that makes the stages even."""
    chunks = c.pp * c.vp
    ends_count = (c.L % c.pp != 0) & ((c.L + 2) % chunks == 0)
    return np.where(ends_count, (c.L + 2) / c.pp, c.L / c.pp)


def block_parameters(c: Columns) -> np.ndarray:
    """Elements of the matrices of one block."""
    return 2 * c.h**2 * (1 + c.kv / c.a) + (2 + c.gated) * c.h * c.f


def _activations(c: Columns, layers: np.ndarray) -> np.ndarray:
    kept, light = kept_bytes(c)
    flying = in_flight(c)
    return flying * layers * ((1 - c.redone) * kept + c.redone * light) + np.where(c.rc == 2, kept, 0)


def kept_bytes(c: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that one block and micro-batch keep for backward: without recomputation, and with the job's kind of it."""
    tokens = c.b * c.s / c.cp
    word = np.where(c.full_precision > 0, 4.0, 2.0)
    pairs = np.where(c.low > 0, 1.0, word)
    ffn = (2 + c.gated) * pairs * c.f
    qkv = word * c.h * (1 + 2 * c.kv / c.a) + word * c.h
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
