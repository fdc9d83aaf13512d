"""A checkpoint's numbers by every road that leads to them: training, decoding, and transformers itself.

`parity` scores the same tokens three times. Training: documents packed into rows under the document mask, and the loss
that training minimises. Decoding: one token at a time through the key-value cache. Transformers: its own model and
tokenizer on the Hugging Face form of the checkpoint. `compare` is the short form that `puna export --check` prints.
"""

import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.console import track
from puna.engine.generator import Generator
from puna.engine.params import SamplingParams
from puna.errors import CheckpointError, DataError
from puna.llama import hub
from puna.llama.attention import Mask
from puna.llama.cache import DenseCache
from puna.llama.loss import IGNORED, token_loss_sum
from puna.llama.model import Llama
from puna.llama.tokenizer import Tokenizer
from puna.train.mesh import DTYPES, choose_device

TOLERANCES = {"fp32": 5e-4, "fp16": 5e-2, "bf16": 4e-1}
"""Largest difference of two log-probabilities (nats) that rounding may make; see docs/hub.md."""
NEW_TOKENS = 32
PROMPTS = [
    "The llama is a domesticated South American camelid,",
    "def fibonacci(n: int) -> int:\n    ",
    "class Error(Exception):\n    ",
    "In 1532 there were 12,345 of them; by 1,600",
    "naïve café, 東京, Ñandú 🦙🦙",
    "  two  spaces,\ttabs\t\tand\n\n\nlines  ",
    "I'll say it's theirs, WE'LL see",
    '{"key": [1, 2.5, null], "x": "\\u00e9"}',
]

Scores = list[list[float]]
"""For each row of tokens the log-probability (nats) of every token but the first."""


@torch.inference_mode()
def parity(
    path: Path, prompts_file: Path | None = None, dtype: str = "fp32", step: int | None = None
) -> dict[str, Any]:
    """Hold the three roads against one another for a run directory, a Hugging Face folder or a Meta folder.

    prompts_file: texts to score, see `read_prompts`; built-in ones where None. dtype: of all weights and of the work.
    Scored are the prompts and a greedy continuation of each, up to 32 tokens. Returns passed, failures (sentences),
    dtype, tolerance, logprob_max_abs_diff (nats; one of each pair of roads, and loss: of the training loss from the sum
    of its parts, a token), token_ids_identical, greedy_identical, num_prompts, num_tokens. In 16 bits another greedy
    continuation is no failure: near ties fall either way. Raises CheckpointError, DataError, TokenizerError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts, device = PROMPTS if prompts_file is None else read_prompts(prompts_file), choose_device("auto")
    loaded = hub.load(path, DTYPES[dtype], step)
    if loaded.tokenizer_dir is None:
        raise CheckpointError(f"{path} holds no tokenizer", "Put its tokenizer.json or tokenizer.model there.")
    tokenizer, model = Tokenizer.load(loaded.tokenizer_dir), loaded.model.to(device)
    check_room(model, tokenizer, prompts)
    with tempfile.TemporaryDirectory() as scratch:
        folder = hf_form(Path(path), loaded, tokenizer, Path(scratch))
        try:
            their_model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval().to(device)
            peer = Peer(their_model, AutoTokenizer.from_pretrained(folder))
        except Exception as error:  # transformers raises whatever it likes at a folder that it cannot read
            problem = f"transformers cannot load {path}: {str(error).partition(chr(10))[0]}"
            raise CheckpointError(problem, "Write it anew: puna export CKPT --to hf --out DIR.") from error
        return examine(model, tokenizer, peer, prompts, dtype)


def hf_form(path: Path, loaded: hub.Loaded, tokenizer: Tokenizer, scratch: Path) -> Path:
    """The checkpoint as a Hugging Face folder: `path` itself where it is one, else written under `scratch`."""
    if hub.is_hf(path):
        return path
    tokenizer.to_hf(scratch / "tokenizer")
    hub.save(loaded.model.state_dict(), loaded.config, scratch / "model", tokenizer_dir=scratch / "tokenizer")
    return scratch / "model"


def check_room(model: Llama, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """Raise DataError where a prompt and its continuation do not fit the context."""
    room = model.config.max_seq_len - NEW_TOKENS
    for number, prompt in enumerate(prompts, 1):
        length = len(tokenizer.encode(prompt, bos=True))
        if length > room:
            raise DataError(
                f"prompt {number} has {length} tokens; with {NEW_TOKENS} new ones it exceeds the model's context of "
                f"{model.config.max_seq_len}",
                f"Shorten it to {max(room, 0)} tokens, or give other prompts with --prompts.",
            )


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: a line each, or in a .jsonl file a JSON string a line. Blank lines are passed over.

    Raises DataError, which names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error}", "Save it as UTF-8 text.") from error
    except FileNotFoundError as error:
        raise DataError(f"There is no file {file}", "Give a text file with a prompt a line.") from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{file} holds no prompt", "Give a text file with a prompt a line.")
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [json_string(file, number, line) for number, line in numbered]


def json_string(file: Path, number: int, line: str) -> str:
    """The string that a line of a .jsonl file of prompts holds."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, str):
        raise DataError(f"{file}, line {number} is not a JSON string", 'Write each prompt as one: "text\\n".')
    return value


# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """transformers' model and tokenizer of the same checkpoint."""

    model: Any
    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def logprobs(self, row: list[int]) -> list[float]:
        """Log-probability of every token but the first."""
        tokens = torch.tensor([row], device=self.model.device)
        scores = self.model(tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return scores.gather(1, tokens[0, 1:, None])[:, 0].tolist()

    def greedy(self, row: list[int], num_ids: int, stop_ids: Collection[int]) -> list[int]:
        """The likeliest continuation among the first `num_ids` ids, token by token through its own cache."""
        drawn: list[int] = []
        past, fed = None, row
        while len(drawn) < NEW_TOKENS and not (drawn and drawn[-1] in stop_ids):
            out = self.model(torch.tensor([fed], device=self.model.device), past_key_values=past, use_cache=True)
            past, fed = out.past_key_values, [int(out.logits[0, -1, :num_ids].argmax())]
            drawn += fed
        return drawn


def examine(model: Llama, tokenizer: Tokenizer, peer: Peer, prompts: Sequence[str], dtype: str) -> dict[str, Any]:
    """`parity` of what has been loaded."""
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    drawn = Generator(model, tokenizer).generate(ids, params=greedy)
    rows = [row + completion.tokens for row, completion in zip(ids, drawn, strict=True)]
    prompts_decoded = decode_logprobs(model, ids)
    trained, loss_gap = train_logprobs(model, rows)
    decoded = [scores + completion.logprobs for scores, completion in zip(prompts_decoded, drawn, strict=True)]
    theirs = [peer.logprobs(row) for row in track(rows, "transformers")]
    gaps = {
        "train_decode": largest_gap(trained, decoded),
        "train_transformers": largest_gap(trained, theirs),
        "decode_transformers": largest_gap(decoded, theirs),
        "loss": loss_gap,
    }
    continued = [peer.greedy(row, tokenizer.vocab_size, tokenizer.stop_ids) for row in track(ids, "continuations")]
    same_ids = [peer.encode(prompt) == row[1:] for prompt, row in zip(prompts, ids, strict=True)]
    same_text = [theirs == completion.tokens for theirs, completion in zip(continued, drawn, strict=True)]
    failures = [*too_wide(gaps, TOLERANCES[dtype]), *unlike("token ids", same_ids, prompts)]
    if dtype == "fp32":
        failures += unlike("greedy continuation", same_text, prompts)
    return {
        "passed": not failures,
        "dtype": dtype,
        "tolerance": TOLERANCES[dtype],
        "logprob_max_abs_diff": gaps,
        "token_ids_identical": all(same_ids),
        "greedy_identical": all(same_text),
        "num_prompts": len(prompts),
        "num_tokens": sum(len(row) - 1 for row in rows),
        "failures": failures,
    }


def too_wide(gaps: dict[str, float], tolerance: float) -> Iterator[str]:
    """A sentence for every gap above the tolerance (or not a number)."""
    for name, gap in gaps.items():
        if not gap <= tolerance:
            pair = name.replace("_", " and ")
            yield f"{pair}: log-probabilities differ by up to {gap:.3g} nats, allowed {tolerance:g}"


def unlike(what: str, same: Sequence[bool], prompts: Sequence[str]) -> list[str]:
    """A sentence for every prompt where transformers differs."""
    pairs = enumerate(zip(same, prompts, strict=True), 1)
    return [f"prompt {n}: {what} of transformers differ: {prompt!r}" for n, (equal, prompt) in pairs if not equal]


def largest_gap(ours: Scores, theirs: Scores) -> float:
    """Largest absolute difference, over all tokens; not a number where one of them is none."""
    flat = (torch.tensor([value for row in scores for value in row], dtype=torch.float64) for scores in (ours, theirs))
    one, other = flat
    return float((one - other).abs().max())


def train_logprobs(model: Llama, rows: list[list[int]]) -> tuple[Scores, float]:
    """Scores as training sees the rows, packed up to the context; and how far the loss of a pack is from their sum, a
    token, at most."""
    device, gap = model.head.device, 0.0
    scores: Scores = []
    for pack in packs(rows, model.config.max_seq_len):
        tokens = torch.tensor([[token for row in pack for token in row]], device=device)
        documents = torch.tensor([[number for number, row in enumerate(pack) for _ in row]], device=device)
        ends = documents[:, :-1] != documents[:, 1:]
        targets = torch.full_like(tokens, IGNORED)
        targets[:, :-1] = tokens[:, 1:].masked_fill(ends, IGNORED)
        mask = Mask(documents=documents)
        hidden = model.hidden(tokens, mask=mask)
        nats = [float(token_loss_sum(hidden[:, at], model.head, targets[:, at])) for at in range(tokens.shape[1])]
        ends_at = list(accumulate(map(len, pack)))
        own = [nats[end - len(row) : end - 1] for end, row in zip(ends_at, pack, strict=True)]
        num_scored = sum(map(len, own))
        gap = max(gap, abs(float(model(tokens, targets, mask=mask)) - sum(map(sum, own))) / num_scored)
        scores += [[-value for value in row] for row in own]
    return scores, gap


def packs(rows: list[list[int]], max_tokens: int) -> Iterator[list[list[int]]]:
    """Neighbouring rows that hold up to `max_tokens` together."""
    pack: list[list[int]] = []
    for row in rows:
        if pack and sum(map(len, pack)) + len(row) > max_tokens:
            yield pack
            pack = []
        pack.append(row)
    yield pack


def decode_logprobs(model: Llama, rows: list[list[int]]) -> Scores:
    """Scores as serving would give them: all rows side by side, one token at a time, through the key-value cache."""
    head, width = model.head, max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=head.device)
    cache = DenseCache(len(rows), width, model.config, head.dtype, head.device)
    columns: list[Tensor] = []
    for at in track(range(width - 1), "token by token"):
        positions = torch.full((len(rows), 1), at, device=head.device)
        hidden = model.hidden(tokens[:, at : at + 1], positions=positions, cache=cache)[:, 0]
        columns.append(model.logits(hidden).log_softmax(-1).gather(1, tokens[:, at + 1 : at + 2]))
    scores = torch.cat(columns, 1).tolist() if columns else [[] for _ in rows]
    return [values[: len(row) - 1] for values, row in zip(scores, rows, strict=True)]


# --- of an export ---------------------------------------------------------------------------------------------------


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
