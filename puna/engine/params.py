"""How tokens are drawn, and when to stop."""

from dataclasses import dataclass

from puna.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request; temperature and top-p default to Llama 3's.

    max_tokens: tokens drawn at most, the stop token included; None: up to the end of the context.
    temperature: 0 takes the likeliest token; else logits are divided by it.
    top_p: tokens are dropped whose more likely rivals already hold more than this share of the probability.
    seed: the same seed draws the same tokens whatever else is in the batch; None: from the operating system.
    stop: strings that end the text; none of them is ever part of it.
    top_logprobs: alternatives reported beside every drawn token.
    """

    max_tokens: int | None = 256
    temperature: float = 0.6
    top_p: float = 0.9
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        self._require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "Ask for at least 1 token.")
        self._require(0 <= self.temperature <= 2, "temperature", "Give a value between 0 (greedy) and 2.")
        self._require(0 <= self.top_p <= 1, "top_p", "Give a share between 0 and 1.")
        self._require(all(self.stop), "stop", "Give stop strings of at least one character.")
        self._require(0 <= self.top_logprobs <= 20, "top_logprobs", "Ask for 0 to 20 alternatives.")

    def _require(self, holds: bool, name: str, fix: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)!r}", fix)
