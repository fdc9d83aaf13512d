"""Peak memory of the chunked cross-entropy beside the plain one, each in a fresh process.

4,096 tokens x 128,256 vocabulary x dim 512, fp32, forward and backward to hidden states and weight; the figure is the
largest resident size while it ran minus the resident size just before. The gradient of the weight (263 MB) is in both.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import machine

TOKENS, VOCAB, DIM = 4_096, 128_256, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    parser.add_argument("--side", choices=("naive", "chunked"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side)))
        return
    naive, chunked = (in_fresh_process(side) for side in ("naive", "chunked"))
    result = {
        "naive_bytes": naive["bytes"],
        "chunked_bytes": chunked["bytes"],
        "ratio": round(chunked["bytes"] / naive["bytes"], 4),
        "naive_seconds": naive["seconds"],
        "chunked_seconds": chunked["seconds"],
        "loss_rel_diff": abs(chunked["loss"] - naive["loss"]) / naive["loss"],
        "tokens": TOKENS, "vocab_size": VOCAB, "dim": DIM, "dtype": "float32",
        "num_threads": naive["num_threads"],
    }  # fmt: skip
    if not options.json:
        for side in (naive, chunked):
            print(f"{side['side']:8} {side['bytes'] / 1e6:8.0f} MB {side['seconds']:6.1f} s")
    print(json.dumps(result | machine.facts()))


def in_fresh_process(side: str) -> dict:
    done = subprocess.run([sys.executable, __file__, "--side", side], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(side: str) -> dict:
    import torch
    from torch.nn.functional import cross_entropy

    from puna.llama.loss import token_loss_sum

    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCAB, DIM) * 0.02)
    targets = torch.randint(0, VOCAB, (TOKENS,))
    small = token_loss_sum(hidden[:8, :8], weight[:8, :8], targets[:8] % 8)
    small.backward()
    hidden.grad = weight.grad = None
    before, start = resident_bytes(), time.perf_counter()
    if side == "naive":
        loss = cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
    else:
        loss = token_loss_sum(hidden, weight, targets)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "side": side, "bytes": peak - before, "seconds": round(seconds, 2), "loss": loss.item(),
        "num_threads": torch.get_num_threads(),
    }  # fmt: skip


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
