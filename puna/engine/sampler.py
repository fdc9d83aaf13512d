"""From logits to a token."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample(logits: Tensor, uniforms: Sequence[float], temperature: float, top_p: float) -> Tensor:
    """One token a row: logits (B, V) -> (B,) int64.

    Row b takes the token at which the cumulative probability passes `uniforms[b]` in [0, 1): a row's draw depends on
    nothing but its own logits and number. Top-p: sort descending, drop tokens whose cumulative mass before them
    exceeds `top_p`, renormalise (Llama 3 reference generation). Temperature 0 is the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = torch.softmax(logits / temperature, -1).sort(stable=True, dim=-1, descending=True)
    cumulative = probabilities.double().cumsum(-1)
    kept = (cumulative - probabilities <= top_p) & (probabilities > 0)
    last = (kept.sum(-1, keepdim=True) - 1).clamp(min=0)
    threshold = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cumulative.gather(-1, last)
    index = (cumulative <= threshold).sum(-1, keepdim=True).minimum(last)
    return order.gather(-1, index)[:, 0]


def logprobs(
    logits: Tensor, tokens: Tensor, num_top: int, num_known: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Under the model itself (temperature 1, every id): of `tokens` (B,), and each row's best among the known ids."""
    scores = torch.log_softmax(logits, -1)
    top = scores[:, :num_known].topk(num_top, -1)
    chosen: list[float] = scores.gather(-1, tokens[:, None])[:, 0].tolist()
    best = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return chosen, [list(zip(ids, values, strict=True)) for ids, values in best]
