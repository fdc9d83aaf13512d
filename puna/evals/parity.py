"""An exported Hugging Face folder held against the model it came from, through transformers itself."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.engine.generator import Generator
from puna.engine.params import SamplingParams
from puna.llama.model import Llama
from puna.llama.tokenizer import Tokenizer


@torch.inference_mode()
def compare(
    model: Llama, tokenizer: Tokenizer, folder: Path, prompts: list[str], new_tokens: int = 64
) -> dict[str, Any]:
    """Logits, greedy continuations and token ids of `model` and of `folder` loaded by transformers, in float32.

    Returns hf_logits_max_abs_diff, hf_logits_std, hf_greedy_identical, hf_token_ids_identical, num_prompts, new_tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    peer_tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    ours = [model(torch.tensor([row])) for row in rows]
    theirs = [peer(torch.tensor([row])).logits for row in rows]
    own = Generator(model, tokenizer).generate(rows, params=SamplingParams(max_tokens=new_tokens, temperature=0.0))
    return {
        "hf_logits_max_abs_diff": max(_distance(a, b) for a, b in zip(ours, theirs, strict=True)),
        "hf_logits_std": float(torch.cat([logits.flatten() for logits in ours]).std()),
        "hf_greedy_identical": all(
            _greedy(peer, row, new_tokens, tokenizer.stop_ids) == completion.tokens
            for row, completion in zip(rows, own, strict=True)
        ),
        "hf_token_ids_identical": all(
            peer_tokenizer.encode(prompt, add_special_tokens=False) == row[1:]
            for prompt, row in zip(prompts, rows, strict=True)
        ),
        "num_prompts": len(prompts),
        "new_tokens": new_tokens,
    }


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def _greedy(peer: Any, row: list[int], new_tokens: int, stop_ids: Any) -> list[int]:
    prompt = torch.tensor([row])
    out = peer.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=sorted(stop_ids),
        pad_token_id=0,
    )
    return out[0, len(row) :].tolist()
