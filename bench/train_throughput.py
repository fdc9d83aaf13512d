"""Training throughput beside Hugging Face transformers: the same 32.0 M Llama, weights and batches, steps alternated.

    python bench/train_throughput.py --json

Shape: dim 512, 8 layers, 8 heads, 4 key-value heads, feed-forward 1,408, vocabulary 8,192, untied; sequence 512,
batch 8, AdamW (fused), no clipping. Sides: transformers eager and compiled, Puna eager and compiled; the two projects
in a process each, so that what Puna does to its own (it keeps freed memory) does nothing for the other;
--keep-freed-memory gives the other that too. One side computes at a time. Matrix FLOPs per token follow
LlamaConfig.flops_per_token; the matrix rate is torch's own product of 4,096 x 512 by 512 x 1,408, in the same run.
A dtype whose matrices multiply slower than float32's is not run (its keys are null) and the reason is printed.
Then one process with two threads against two processes with one thread each under FSDP2, whole runs alternated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import machine
import torch
from torch import Tensor

from puna.llama.config import LlamaConfig
from puna.llama.model import Llama
from puna.llama.packing import Batch
from puna.llama.pretrain import Step, make_model
from puna.train.config import MeshConfig, RunConfig, TrainConfig
from puna.train.memory import keep_freed_memory
from puna.train.mesh import Compute, Mesh, open_mesh
from puna.train.optim import make_optimizers
from puna.train.task import Cursor, GradientTask

SHAPE = LlamaConfig(
    num_layers=8, dim=512, ffn_dim=1408, num_heads=8, num_kv_heads=4, head_dim=64, vocab_size=8192, max_seq_len=512,
    rope_theta=10_000.0,
)  # fmt: skip
SEQ_LEN, BATCH, LR = 512, 8, 1e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
OURS, PEERS = ("puna", "puna_compiled"), ("transformers", "transformers_compiled")


class Bench(GradientTask):
    """The product's own step over given batches."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        super().__init__({"model": model}, make_optimizers(model, TrainConfig(lr=LR, weight_decay=0.0)))

    def units(self, cursor: Cursor) -> Iterator[Step]:
        """None: the benchmark hands them in itself."""
        return iter(())

    def loss_sum(self, batch: Batch) -> Tensor:
        return self.model(batch.tokens, batch.targets)


def unit(tokens: Tensor, rank: int = 0, num_ranks: int = 1) -> Step:
    """This rank's rows of a batch (B, L) as one step; the last token of a row has no target."""
    rows = tokens.chunk(num_ranks)[rank]
    targets = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], -100)], 1)
    batch = Batch(rows, targets, torch.zeros_like(rows), (0,), int((targets >= 0).sum()))
    return Step(Cursor(), tokens.numel(), [batch])


def puna_side(dtype: str, compile: bool, place: Mesh) -> tuple[Callable[[Tensor], float], Llama]:
    """Step function and model of Puna's side."""
    train = TrainConfig(compile=compile)
    model = make_model(SHAPE, train, MeshConfig(reshard_after_forward=False), 0, place, Compute(DTYPES[dtype], "", 1.0))
    task = Bench(model)
    return lambda tokens: task.step(unit(tokens, place.rank, place.world_size)).loss, model


def transformers_side(dtype: str, compile: bool, state: dict[str, Tensor]) -> Callable[[Tensor], float]:
    """Step function of transformers' LlamaForCausalLM with the same weights: autocast for bf16, loss in float32."""
    from transformers import LlamaConfig as PeerConfig
    from transformers import LlamaForCausalLM

    config = PeerConfig(
        vocab_size=SHAPE.vocab_size, hidden_size=SHAPE.dim, intermediate_size=SHAPE.ffn_dim,
        num_hidden_layers=SHAPE.num_layers, num_attention_heads=SHAPE.num_heads, num_key_value_heads=SHAPE.num_kv_heads,
        max_position_embeddings=SHAPE.max_seq_len,
        rms_norm_eps=SHAPE.norm_eps, tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    call = torch.compile(model) if compile else model

    def step(tokens: Tensor) -> float:
        with nullcontext() if dtype == "fp32" else torch.autocast("cpu", DTYPES[dtype]):
            loss = call(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def matrix_rate(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of 4,096 x 512 by 512 x 1,408, repeated for `seconds`."""
    a, b = torch.randn(4096, 512).to(dtype), torch.randn(512, 1408).to(dtype)
    a @ b
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return 2 * 4096 * 512 * 1408 * count / (time.perf_counter() - start)


def spread_of(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def serve_peer(link: Connection, dtype: str, keep: bool) -> None:
    """A process of transformers: takes weights, then (side, tokens) after one another, and answers with the loss."""
    torch.set_num_threads(2)
    if keep:
        keep_freed_memory()
    state = link.recv()
    sides = {name: transformers_side(dtype, name.endswith("compiled"), state) for name in PEERS}
    while (order := link.recv()) is not None:
        link.send(sides[order[0]](order[1]))


def compare(dtype: str, num_steps: int, place: Mesh, keep: bool) -> dict[str, Any]:
    """Alternate the four sides for `num_steps` steps; the first two of each are not timed."""
    torch.manual_seed(0)
    batches = [torch.randint(SHAPE.vocab_size, (BATCH, SEQ_LEN)) for _ in range(num_steps)]
    sides: dict[str, Callable[[Tensor], float]] = {}
    for name in OURS:
        sides[name], model = puna_side(dtype, name.endswith("compiled"), place)
    context = get_context("spawn")
    link, far = context.Pipe()
    peer = context.Process(target=serve_peer, args=(far, dtype, keep), daemon=True)
    peer.start()
    link.send({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def ask(name: str, tokens: Tensor) -> float:
        link.send((name, tokens))
        return link.recv()

    sides |= {name: partial(ask, name) for name in PEERS}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for number, tokens in enumerate(batches):
        for name, step in sides.items():
            start = time.perf_counter()
            losses[name].append(step(tokens))
            seconds[name].append(time.perf_counter() - start)
        peaks.append(matrix_rate(DTYPES[dtype], 0.2))
        shown = "  ".join(f"{name} {BATCH * SEQ_LEN / spent[-1]:,.0f}" for name, spent in seconds.items())
        print(f"{dtype} step {number + 1}/{num_steps}, tokens/s: {shown}", file=sys.stderr)
    link.send(None)
    peer.join()
    return figures(dtype, seconds, losses, peaks)


def figures(
    dtype: str, seconds: dict[str, list[float]], losses: dict[str, list[float]], peaks: list[float]
) -> dict[str, Any]:
    """Ratios of the pairs of steps, and whether the losses stayed together."""
    timed = {name: spent[2:] for name, spent in seconds.items()}
    rates = {name: spread_of([BATCH * SEQ_LEN / spent for spent in times]) for name, times in timed.items()}
    ours = max(OURS, key=lambda name: rates[name]["median"])
    theirs = max(PEERS, key=lambda name: rates[name]["median"])

    def ratio(peer: str) -> dict[str, float]:
        return spread_of([b / a for a, b in zip(timed[ours], timed[peer], strict=True)])

    drift = max(abs(a[-1] - b[-1]) for a in losses.values() for b in losses.values())
    if drift > LOSS_TOLERANCE[dtype]:
        raise SystemExit(
            f"{dtype}: the losses of the sides differ by {drift} after {len(losses[ours])} steps: not the same work"
        )
    peak = statistics.median(peaks)
    return {
        "tokens_per_s": rates, "ours": ours, "best_peer": theirs, "max_loss_diff": drift, "matrix_rate": peak,
        "ratio_vs_eager": ratio("transformers"), "ratio_vs_compiled": ratio("transformers_compiled"),
        "ratio_vs_best": ratio(theirs),
        "mfu_vs_measured_peak": rates[ours]["median"] * SHAPE.flops_per_token(SEQ_LEN) / peak,
    }  # fmt: skip


def worker(num_steps: int) -> None:
    """One process of the FSDP2 comparison: prints its median tokens/s."""
    with open_mesh(RunConfig(device="cpu"), MeshConfig(reshard_after_forward=False)) as place:
        step, _ = puna_side("fp32", False, place)
        torch.manual_seed(0)
        times = []
        for _ in range(num_steps):
            tokens = torch.randint(SHAPE.vocab_size, (BATCH, SEQ_LEN))
            start = time.perf_counter()
            step(tokens)
            times.append(time.perf_counter() - start)
        if place.rank == 0:
            print(BATCH * SEQ_LEN / statistics.median(times[2:]))


def fsdp2(num_rounds: int, num_steps: int) -> dict[str, float]:
    """Two processes of one thread over one process of two threads, whole runs alternated."""
    ratios = []
    for number in range(num_rounds):
        rates = {}
        for processes in (1, 2):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc-per-node={processes}",
                "--standalone",
                __file__,
            ]
            env = os.environ | {"OMP_NUM_THREADS": str(2 // processes)}
            done = subprocess.run(
                [*command, "--worker", "--steps", str(num_steps)], env=env, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            rates[processes] = float(done.stdout.split()[-1])
        ratios.append(rates[2] / rates[1])
        print(
            f"fsdp2 round {number + 1}: 1 process {rates[1]:,.0f}, 2 processes {rates[2]:,.0f} tokens/s",
            file=sys.stderr,
        )
    return spread_of(ratios)


def main() -> None:
    """Run what was asked for; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("--steps", type=int, default=20, help="steps of each side, two of them to warm up")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the FSDP2 comparison")
    parser.add_argument("--parts", nargs="+", default=["bf16", "fp32", "fsdp2"], choices=["bf16", "fp32", "fsdp2"])
    parser.add_argument("--keep-freed-memory", action="store_true", help="in the process of transformers too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.steps)
        return
    torch.set_num_threads(2)
    parts: dict[str, Any] = {}
    with open_mesh(RunConfig(device="cpu"), MeshConfig()) as place:
        slow = matrix_rate(torch.bfloat16) < matrix_rate(torch.float32)
        for dtype in ("bf16", "fp32"):
            if dtype in args.parts and not (dtype == "bf16" and slow):
                parts[dtype] = compare(dtype, args.steps, place, args.keep_freed_memory)
    if "fsdp2" in args.parts:
        parts["fsdp2"] = fsdp2(args.rounds, 8)
    bf16, fp32 = parts.get("bf16", {}), parts.get("fp32", {})
    keys = ("ratio_vs_eager", "ratio_vs_compiled", "ratio_vs_best")
    result = (
        {key: bf16[key]["median"] if bf16 else None for key in keys}
        | {
            "mfu_vs_measured_peak": bf16.get("mfu_vs_measured_peak"),
            "fp32_ratio_vs_best": fp32["ratio_vs_best"]["median"] if fp32 else None,
            "fp32_mfu_vs_measured_peak": fp32.get("mfu_vs_measured_peak"),
            "fsdp2_ratio": parts["fsdp2"]["median"] if "fsdp2" in parts else None,
            "bf16_not_run": "bf16 matrices multiply slower than fp32 ones on this machine" if slow else None,
            "detail": parts,
        }
        | machine.facts()
    )
    if not args.json:
        for key, value in result.items():
            print(f"{key}: {value}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
