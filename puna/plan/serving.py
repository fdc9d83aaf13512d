"""Answers instead of training: prefill bound by arithmetic, decoding by reading weights and keys and values."""

from dataclasses import dataclass

from puna.plan.estimate import Constants
from puna.plan.hardware import Cluster
from puna.plan.workload import PlanError, Transformer


@dataclass(frozen=True)
class Serving:
    """Seconds of one prefill and one decoding step of a batch, bytes of a device, and tokens/s of all devices."""

    prefill: float
    decode: float
    weight_bytes: float
    cache_bytes: float
    tokens_per_s: float
    fits: bool


def cache_bytes(model: Transformer, tokens: int, element: float = 2.0) -> float:
    """Keys and values of `tokens`: 2 layers kv_heads head_dim elements a token."""
    return 2 * model.layers * model.kv_heads * model.head_dim * element * tokens


def _expert(model: Transformer) -> float:
    return (3 if model.gated else 2) * model.hidden * model.expert_ffn


def serve(
    model: Transformer, cluster: Cluster, k: Constants, *, batch: int, prompt: int, answer: int, precision: str = "bf16"
) -> Serving:
    """A tensor-parallel replica over the whole cluster, which must be one fast domain. Raises PlanError where not."""
    if cluster.gpus > cluster.domain:
        raise PlanError(
            f"{cluster.gpus} GPUs are more than the {cluster.domain} that fast links join",
            f"Serve replicas of at most {cluster.domain}.",
        )
    for name, size in (("batch", batch), ("prompt", prompt), ("answer", answer)):
        if size < 1:
            raise PlanError(f"{name} is {size}", "Give a whole number of at least 1.")
    gpu, n = cluster.gpu, cluster.gpus
    element = 1.0 if precision in ("fp8", "mxfp8") else 2.0
    rate = gpu.peak(precision) * 1e12 * gpu.achievable * k.matmul
    band = gpu.bandwidth * 1e12 * k.memory
    weights = model.parameters * element / n
    touched = min(model.experts, batch * model.active)
    read_weights = weights - (model.experts - touched) * model.layers * _expert(model) * element / n
    cache = cache_bytes(model, batch * (prompt + answer)) / n
    width = model.heads * model.head_dim
    flops = 2 * (model.layers * model.active_matrices) + 2 * model.layers * prompt * width
    sums = 0.0 if n == 1 else 2 * model.layers * 12e-6
    prefill = max(flops * batch * prompt / n / rate, weights / band) + sums
    sums += 0.0 if n == 1 else 2 * model.layers * 2 * 2 * batch * model.hidden / (gpu.link * 1e9 * k.link)
    read = read_weights + cache_bytes(model, batch * (prompt + answer // 2)) / n
    computed = model.layers * model.active_matrices + model.vocab * model.hidden
    decode = max(read / band, 2 * computed * batch / n / rate) + sums + model.layers * 8 * 4e-6
    total = prefill + answer * decode
    return Serving(
        prefill, decode, weights, cache, batch * answer / total, (weights + cache) / 1e9 <= 0.92 * gpu.memory
    )
