"""Curves over consumed tokens: learning rate, batch size, sequence length, when weights are averaged."""

import math

from puna.errors import RecipeError
from puna.train.config import ScheduleConfig, TrainConfig

Stages = tuple[tuple[int, int], ...]


class Schedule:
    """Every method is a pure function of the tokens consumed so far. Raises RecipeError where settings contradict."""

    def __init__(self, config: ScheduleConfig, train: TrainConfig) -> None:
        if config.warmup_tokens >= train.tokens:
            raise RecipeError(
                f"schedule.warmup_tokens {config.warmup_tokens:,} is not below train.tokens {train.tokens:,}",
                "Lower schedule.warmup_tokens; the run would end before it reached its learning rate.",
            )
        _check_stages("schedule.batch_stages", config.batch_stages)
        _check_stages("schedule.seq_stages", config.seq_stages)
        self.config, self.train = config, train
        self._decay_start = max(config.warmup_tokens, round(config.decay_start * train.tokens))

    def learning_rate(self, tokens: float) -> float:
        """Multiplier of the peak rate: linear warm-up, hold, cosine or linear to `final_ratio` (Llama 3 §3.4.1)."""
        if tokens < self.config.warmup_tokens:
            return tokens / self.config.warmup_tokens
        if tokens <= self._decay_start or self.config.decay == "constant":
            return 1.0
        progress = min(1.0, (tokens - self._decay_start) / (self.train.tokens - self._decay_start))
        left = 1 - progress if self.config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.config.final_ratio + (1 - self.config.final_ratio) * left

    def batch_tokens(self, tokens: int) -> int:
        """Tokens of one optimiser step over all ranks (Llama 3 §3.4.1: 4M, then 8M, then 16M)."""
        return _stage(self.config.batch_stages, tokens, self.train.batch_tokens)

    def seq_len(self, tokens: int) -> int:
        """Tokens of one sequence."""
        return _stage(self.config.seq_stages, tokens, self.train.seq_len)

    def averages(self, tokens: int) -> bool:
        """Whether weights are averaged after a step that ends here (Llama 3 §3.4.3)."""
        return self.config.average != "none" and tokens >= self.config.average_from * self.train.tokens


def _stage(stages: Stages, tokens: int, first: int) -> int:
    """The value of the last stage that has begun."""
    return next((value for start, value in reversed(stages) if start <= tokens), first)


def _check_stages(key: str, stages: Stages) -> None:
    starts = [start for start, _ in stages]
    if starts != sorted(set(starts)) or any(start < 0 or value < 1 for start, value in stages):
        raise RecipeError(
            f"{key} is {[list(stage) for stage in stages]}",
            "Give pairs (from token, value) with rising tokens and values of at least 1.",
        )
