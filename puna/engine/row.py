"""One continuation in the making."""

import random
from dataclasses import dataclass
from typing import Literal

from puna.engine.params import SamplingParams
from puna.engine.stops import StopFilter
from puna.llama.tokenizer import Detokenizer, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Delta:
    """One drawn token of sample `sample` of prompt `prompt`.

    text: what became certain with it; empty for a stop token and inside an unfinished character or stop string.
    logprob, top: log-probabilities under the model itself; top pairs are (token, log-probability), best first.
    finish_reason: "stop" (a stop token or stop string), "length" (max_tokens or the context), None while it goes on.
    """

    prompt: int
    sample: int
    token: int
    logprob: float
    top: list[tuple[int, float]]
    text: str
    finish_reason: FinishReason | None


class Row:
    """One row of the batch: where it stands, what it may still draw (`left`) and what its tokens say."""

    def __init__(
        self, prompt: int, sample: int, tokens: list[int], left: int, params: SamplingParams, tokenizer: Tokenizer
    ) -> None:
        self.prompt, self.sample, self.tokens, self.left, self.finished = prompt, sample, tokens, left, False
        after_text = bool(tokenizer.decode_bytes(tokens[-1:]))
        self._detokenizer, self._stops = Detokenizer(tokenizer, continuing=after_text), StopFilter(params.stop)
        self._stop_ids = tokenizer.stop_ids
        # Random hashes a seed that is a string, so neighbouring seeds and samples are unrelated.
        self._random = random.Random(None if params.seed is None else f"{params.seed}/{sample}")

    def uniform(self) -> float:
        """The next number in [0, 1): a function of the seed, the sample and how many were drawn."""
        return self._random.random()

    def push(self, token: int, logprob: float, top: list[tuple[int, float]]) -> Delta:
        """Takes a drawn token in."""
        self.left -= 1
        text, reason = self._read(token)
        self.finished = reason is not None
        return Delta(self.prompt, self.sample, token, logprob, top, text, reason)

    def _read(self, token: int) -> tuple[str, FinishReason | None]:
        ended = token in self._stop_ids
        text = "" if ended else self._stops.push(self._detokenizer.push(token))
        if self._stops.stopped:
            return text, "stop"
        if not ended and self.left:
            return text, None
        text += self._stops.push(self._detokenizer.flush())
        if self._stops.stopped:
            return text, "stop"
        return text + self._stops.flush(), "stop" if ended else "length"
