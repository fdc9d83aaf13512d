"""What an experiment on Adam's instability is: one run, said in full by a few settings. No torch here."""

import json
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from puna.errors import DataError
from puna.train.config import HealthConfig, Section, setting

Names = Annotated[tuple[str, ...], Field(strict=False)]
CHANGES = ("rate_after", "batch_after", "eps_after", "beta2_after")

RUN = ("lab/adam_run.py", "lab/adam_text.py", "lab/adam_trial.py")
WATCHED = (
    "train/adam_stats.py",
    "train/adam_sampler.py",
    "train/detector.py",
    "train/health.py",
    "train/health_track.py",
)
REMEDIES = (
    "lab/adam_arms.py", "train/clipping.py", "train/stable_adamw.py", "train/controller.py", "train/tensor_guard.py",
    "train/spike_judge.py", "train/actions.py", "train/levers.py", "train/trend.py",
)  # fmt: skip
"""Code that a result depends on, beside PyTorch: every result, those of watched runs, those under a remedy."""


class RunSpec(Section):
    """One run of a small Llama on real text, byte by byte, under AdamW; `puna lab adam --fields` prints the settings.

    Whether it diverges is not said here: that is read off its loss.
    """

    name: str = setting("", "a name of its own in a list of runs; made from cause and seed where it is empty")
    cause: str = setting("none", "word under which the run is counted in by_cause", min_length=1)
    seed: int = setting(0, "seed of the weights and of the order of the text", ge=0)
    steps: int = setting(250, "optimiser steps", "steps", ge=1)
    data: str = setting("stdlib", "a text file or a folder of them, or stdlib: this Python's own library", "path")

    num_layers: int = setting(2, "size: transformer blocks", "layers", ge=1)
    dim: int = setting(32, "size: width of the residual stream, 4 heads", ge=8, multiple_of=8)
    seq_len: int = setting(32, "size: characters of a sequence", "tokens", ge=2)
    vocab_size: int = setting(128, "rows of the embedding; the text uses the first 128 only", "tokens", ge=128)
    tie_embeddings: bool = setting(False, "one table for embedding and head")
    rank: int = setting(0, "down projections as products of this rank, the outer factor begun at 1e-4; 0: whole", ge=0)
    adapter: Literal["none", "dormant", "training"] = setting(
        "none", "low-rank adapters beside the query projections: switched off throughout, or trained from zero"
    )
    frozen: Names = setting((), "patterns of parameter names that are not trained")

    batch: int = setting(16, "sequences of a step", "sequences", ge=1)
    rate: float = setting(0.01, "learning rate after the warm-up", gt=0)
    warmup: int = setting(20, "steps of linear warm-up", "steps", ge=0)
    beta1: float = setting(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.95, "decay of the second moment", ge=0, lt=1)
    eps: float = setting(1e-8, "AdamW's epsilon", ge=0)
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices", ge=0)
    clip: float = setting(0.0, "global gradient norm above which gradients are scaled down; 0: never", ge=0)
    state_dtype: Literal["fp32", "bf16"] = setting("fp32", "what the optimiser's moments are rounded to after a step")

    start: int = setting(0, "first step of the stall, the burst, the cut or the change", "steps", ge=0)
    length: int = setting(0, "steps that it lasts; 0: a cut or change stays", "steps", ge=0)
    tensors: Names = setting((), "stall: patterns of parameter names whose gradients are scaled by depth")
    depth: float = setting(1e-6, "stall: factor of these gradients", gt=0, le=1)
    release: int = setting(0, "stall: steps in which the factor returns to 1, by equal ratios; 0: at once", ge=0)
    burst: Literal["none", "repeat", "flood", "noise"] = setting(
        "none", "data of the burst: one batch again and again, a single character, or characters drawn at random"
    )
    burst_share: float = setting(1.0, "share of a batch's sequences that the burst replaces", gt=0, le=1)
    warmup_cut: bool = setting(False, "the rate is at its full value, whatever warm-up is left")
    rate_after: float | None = setting(None, "changed rate", gt=0)
    batch_after: int | None = setting(None, "changed batch", "sequences", ge=1)
    eps_after: float | None = setting(None, "changed epsilon", ge=0)
    beta2_after: float | None = setting(None, "changed decay of the second moment", ge=0, lt=1)

    @model_validator(mode="after")
    def _lasts(self) -> "RunSpec":
        if (self.tensors or self.burst != "none") and not self.length:
            raise ValueError("a stall (tensors) or burst needs length, the steps that it lasts")
        return self

    @property
    def title(self) -> str:
        """The name, or cause and seed."""
        return self.name or f"{self.cause}-{self.seed}"

    def holds(self, step: int) -> bool:
        """Whether what goes wrong is so in a step (0: the first)."""
        return step >= self.start and (not self.length or step < self.start + self.length)

    def reference(self) -> "RunSpec":
        """The same run without what goes wrong at `start`, and with moments in fp32."""
        calm: dict[str, None] = dict.fromkeys(CHANGES)
        return self.model_copy(
            update={
                **calm, "name": f"{self.title}-reference", "cause": "none", "tensors": (), "burst": "none",
                "warmup_cut": False, "state_dtype": "fp32",
            }
        )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A run and what it is trained under: the name of an arm (see `puna.lab.adam_jobs`), whether it is watched."""

    spec: RunSpec
    arm: str = "nothing"
    watch: bool = True
    health: dict[str, Any] = field(default_factory=dict)  # settings of HealthConfig other than the defaults

    def file(self) -> str:
        """Name of its result: changes with anything that it depends on."""
        settings = HealthConfig(**self.health).model_dump(mode="json") if self.watch else None
        facts = [self.spec.model_dump(mode="json"), self.arm, settings, _code(self.watch, self.arm)]
        digest = blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6).hexdigest()
        return f"{self.spec.title}-{self.arm.replace('/', 'over').replace(' ', '_')}-{digest}.json"


def _code(watch: bool, arm: str) -> str:
    root = Path(__file__).parents[1]
    files = RUN + WATCHED * watch + REMEDIES * (arm != "nothing")
    return blake2b(b"".join((root / name).read_bytes() for name in files), digest_size=6).hexdigest()


def read_specs(path: Path) -> list[RunSpec]:
    """The runs of a JSON file: a list of objects with the settings of `RunSpec`. Raises DataError."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}", "Give a file that holds a list of runs.") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no list of runs", 'Write [{"cause": "stall", "seed": 1, ...}, ...].')
    specs = [_spec(path, index, row) for index, row in enumerate(rows)]
    titles = [spec.title for spec in specs]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise DataError(f"{path} has two runs of the name {twice[0]}", "Give each run a name or a seed of its own.")
    return specs


def _spec(path: Path, index: int, row: object) -> RunSpec:
    try:
        return RunSpec.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(
            f"{path}, run {index}, {key}: {first['msg']}", "`puna lab adam --fields` prints the settings of a run."
        ) from error
