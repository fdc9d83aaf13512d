"""Batched generation over a live module."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from puna.engine.params import SamplingParams
from puna.engine.row import Delta, FinishReason, Row
from puna.engine.sampler import logprobs, sample
from puna.errors import NonFinite, TokenizerError, UserError
from puna.llama.cache import DenseCache
from puna.llama.model import Llama
from puna.llama.tokenizer import Tokenizer

DEFAULTS = SamplingParams()


@dataclass
class Completion:
    """Sample `sample` of prompt `prompt`. tokens: all that were drawn, a stop token included; logprobs: one a token;
    top: alternatives of each token; texts: what became certain with each token, without stops."""

    prompt: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)

    def push(self, delta: Delta) -> None:
        """Appends the next token."""
        self.tokens.append(delta.token)
        self.logprobs.append(delta.logprob)
        self.top.append(delta.top)
        self.texts.append(delta.text)
        self.finish_reason = delta.finish_reason


class Generator:
    """Draws continuations from `model`, at most `max_rows` at a time; weights may change between calls.

    Raises TokenizerError where the tokenizer knows more ids than the model. Ids only the model has are never drawn.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, max_rows: int = 32) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise TokenizerError(
                f"The tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}",
                "Use the tokenizer the model was trained with.",
            )
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows

    def generate(self, prompts: Sequence[list[int]], n: int = 1, params: SamplingParams = DEFAULTS) -> list[Completion]:
        """`n` completions of each prompt, prompt by prompt. Raises UserError as the two checks do."""
        done = [Completion(prompt, sample) for prompt in range(len(prompts)) for sample in range(n)]
        for delta in self.stream(prompts, n, params):
            done[delta.prompt * n + delta.sample].push(delta)
        return done

    def stream(self, prompts: Sequence[list[int]], n: int = 1, params: SamplingParams = DEFAULTS) -> Iterator[Delta]:
        """The same, token by token, rows interleaved; closing the iterator ends the work. The checks come at once."""
        self.check_ids(prompts)
        self.check_room(prompts, params)
        rows = [self._row(index, sample, tokens, params) for index, tokens in enumerate(prompts) for sample in range(n)]
        rows.sort(key=lambda row: len(row.tokens))
        groups = (rows[start : start + self.max_rows] for start in range(0, len(rows), self.max_rows))
        return (delta for group in groups for delta in self._decode(group, params))

    def check_ids(self, prompts: Sequence[list[int]]) -> None:
        """Raises UserError where a prompt is empty or holds an unknown id."""
        vocab_size = self.tokenizer.vocab_size
        for tokens in prompts:
            if not tokens:
                raise UserError("The prompt holds no token", "Give at least one token or some text.")
            if not 0 <= min(tokens) <= max(tokens) < vocab_size:
                raise UserError(
                    f"The prompt holds token ids outside the vocabulary of {vocab_size}",
                    f"Use ids from 0 to {vocab_size - 1}.",
                )

    def check_room(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        """Raises UserError where the context cannot hold a prompt and its `max_tokens`."""
        max_seq_len, new = self.model.config.max_seq_len, params.max_tokens or 1
        for tokens in prompts:
            if len(tokens) + new > max_seq_len:
                raise UserError(
                    f"The prompt has {len(tokens)} tokens and {new} more were asked for, but this model's context is "
                    f"{max_seq_len} tokens",
                    "Shorten the prompt or ask for fewer tokens.",
                )

    def _row(self, index: int, sample: int, tokens: list[int], params: SamplingParams) -> Row:
        left = params.max_tokens or self.model.config.max_seq_len - len(tokens)
        return Row(index, sample, tokens, left, params, self.tokenizer)

    @torch.inference_mode()
    def _decode(self, rows: list[Row], params: SamplingParams) -> Iterator[Delta]:
        # Prompts are padded on the right: a query sees key positions up to its own, and new keys overwrite the padding.
        head = self.model.head
        lengths = torch.tensor([len(row.tokens) for row in rows], device=head.device)
        width = int(lengths.max())
        tokens = torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in rows], device=head.device)
        longest = max(len(row.tokens) + row.left for row in rows)
        cache = DenseCache(len(rows), longest, self.model.config, head.dtype, head.device)
        positions = torch.arange(width, device=head.device).expand(len(rows), -1)
        hidden = self.model.hidden(tokens, positions=positions, cache=cache)
        hidden = hidden[torch.arange(len(rows), device=head.device), lengths - 1]
        while True:
            logits = self.model.logits(hidden)
            num_known = self.tokenizer.vocab_size
            uniforms = [row.uniform() for row in rows]
            drawn = sample(logits[:, :num_known], uniforms, params.temperature, params.top_p)
            yield from _push(rows, drawn.tolist(), *logprobs(logits, drawn, params.top_logprobs, num_known))
            going = torch.tensor([not row.finished for row in rows], device=head.device)
            if not going.any():
                return
            hidden = self.model.hidden(drawn[:, None], positions=lengths[:, None], cache=cache)[:, 0]
            lengths = lengths + going


def _push(
    rows: list[Row], drawn: list[int], scores: list[float], tops: list[list[tuple[int, float]]]
) -> Iterator[Delta]:
    for row, token, score, top in zip(rows, drawn, scores, tops, strict=True):
        if row.finished:
            continue
        if not math.isfinite(score):
            raise NonFinite(f"The model gave a drawn token the log-probability {score}; its weights may be damaged")
        yield row.push(token, score, top)
