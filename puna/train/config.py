"""Settings of the ground: frozen, typed, without torch, so that a planner can read them on any machine."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


def setting(default: Any, help: str, unit: str = "", **limits: Any) -> Any:
    """A field with its help text and unit; both are printed by `puna recipe show` and the reference page."""
    return Field(default, description=help, json_schema_extra={"unit": unit}, **limits)


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


Stages = Annotated[tuple[tuple[int, int], ...], Field(strict=False)]


class RunConfig(Section):
    """Where and on what a run happens."""

    dir: str = setting("runs/new", "folder that holds everything the run writes", "path")
    seed: int = setting(0, "seed of initialisation and data order", ge=0)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where there is one, else the CPU")
    num_processes: int = setting(1, "processes on this machine; ignored under torchrun", "processes", ge=1)
    num_threads: int = setting(0, "intra-op threads a process; 0: cores divided by processes", "threads", ge=0)
    tensorboard: bool = setting(True, "write TensorBoard files beside events.jsonl")
    hang_seconds: float = setting(
        0.0,
        "longest time without progress in a step before the run is ended as hung and RUN/hang.txt names the rank; "
        "0: 20 times the median step and at least 120 (a single process is not watched then)",
        "seconds",
        ge=0,
    )
    max_restarts: int = setting(
        0, "times that all processes start again, from the newest checkpoint, after a rank died or hung", ge=0
    )


class TrainConfig(Section):
    """The work: how many tokens, in what pieces, with which optimiser."""

    tokens: int = setting(
        1_000_000, "tokens to train on; the run ends at the first step that reaches it", "tokens", ge=1
    )
    batch_tokens: int = setting(8_192, "tokens of one optimiser step over all ranks", "tokens", ge=1)
    seq_len: int = setting(512, "tokens in one sequence", "tokens", ge=2)
    micro_batch: int = setting(
        8,
        "sequences of one forward on one rank at train.seq_len (later stages keep its tokens); "
        "accumulation is batch_tokens / (seq_len * micro_batch * ranks)",
        "sequences",
        ge=1,
    )
    optimizer: Literal["adamw", "stable_adamw", "muon"] = setting(
        "adamw",
        "adamw: decoupled weight decay; stable_adamw: the same with each tensor's update clipped by its RMS (use "
        "train.clip 0); muon: orthogonalised momentum for the block matrices, AdamW for the rest",
    )
    init: Literal["normal", "zero_out"] = setting(
        "normal",
        "fresh weights; normal: deviation 0.02, smaller where a matrix writes to the residual stream (GPT-2); "
        "zero_out: those and an untied head begin at zero, embedding 0.5, other matrices 1 / sqrt(fan-in)",
    )
    lr: float = setting(3e-4, "peak learning rate", gt=0)
    muon_lr: float = setting(0.02, "peak learning rate of the matrices under muon", gt=0)
    betas: Annotated[tuple[float, float], Field(strict=False)] = setting((0.9, 0.95), "decay of AdamW's two moments")
    eps: float = setting(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices; gains have none", ge=0)
    clip: float = setting(1.0, "global gradient norm above which gradients are scaled down; 0: never", ge=0)
    clip_rule: Literal["norm", "zclip", "spam"] = setting(
        "norm",
        "what is clipped beside train.clip; norm: nothing; zclip: a norm that is unusual for this run; spam: "
        "coordinates far beyond AdamW's second moment, whose moments begin anew every 500 steps",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "compute dtype; auto: bf16 where this machine multiplies bf16 matrices faster than fp32, else fp32"
    )
    compile: bool = setting(False, "torch.compile each block")
    recompute: Literal["none", "selective", "full"] = setting(
        "none", "activations recomputed in backward; selective keeps matrix products; full keeps block inputs only"
    )


class ScheduleConfig(Section):
    """Curves over consumed tokens."""

    warmup_tokens: int = setting(0, "tokens of linear warm-up from zero", "tokens", ge=0)
    decay: Literal["cosine", "linear", "constant"] = setting("cosine", "shape of the learning rate after warm-up")
    final_ratio: float = setting(
        0.1, "last learning rate as a share of the peak; linear with 0 ends at zero", ge=0, le=1
    )
    decay_start: float = setting(0.0, "share of the tokens held at the peak before the decay begins", ge=0, lt=1)
    batch_stages: Stages = setting((), "batch ramp: pairs (from token, batch_tokens)", "tokens")
    seq_stages: Stages = setting((), "sequence-length stages: pairs (from token, seq_len)", "tokens")
    average: Literal["none", "ema", "mean"] = setting(
        "none", "weights kept beside the trained ones: exponential moving average, or plain mean (Llama 3 §3.4.3)"
    )
    average_from: float = setting(0.9, "share of the tokens after which averaging begins", ge=0, lt=1)
    ema_decay: float = setting(0.99, "decay of the exponential moving average per step", gt=0, lt=1)


class MeshConfig(Section):
    """Sizes of the device mesh, outermost axis first: dp_replicate, dp_shard, pp, cp, tp (Llama 3 §3.3.2)."""

    dp_replicate: int = setting(1, "copies of the sharded model (hybrid sharding when > 1)", "ranks", ge=1)
    dp_shard: int = setting(0, "ranks that share one copy; 0: all that remain", "ranks", ge=0)
    reshard_after_forward: bool = setting(
        True, "true: full shard (least memory); false: grad-op, parameters stay gathered until backward"
    )
    shared_memory: bool = setting(
        True, "CPU processes of one machine exchange shards through memory they share; false: through sockets"
    )


class CheckpointConfig(Section):
    """When state is saved and what is kept."""

    every: int = setting(100, "units of work between checkpoints", "steps", ge=1)
    keep: int = setting(2, "newest checkpoints kept", "checkpoints", ge=1)
    keep_best: bool = setting(False, "also keep the checkpoint of the lowest held-out loss")
    keep_every: int = setting(
        0, "also keep every checkpoint whose step is a multiple of this; 0: only those above", "steps", ge=0
    )
    initial: bool = setting(False, "also save (and keep) the state before the first step")
    asynchronous: bool = setting(
        False,
        "false: training waits for a checkpoint; true: it goes on while a copy of the state is written, which takes "
        "that much host memory more",
    )


class EvalConfig(Section):
    """Validation while training."""

    every: int = setting(0, "units of work between evaluations on held-out data; 0: only at the end", "steps", ge=0)
    tokens: int = setting(65_536, "held-out tokens of one evaluation", "tokens", ge=0)


class HealthConfig(Section):
    """The health monitor: what is looked at, how often it is recorded, from where on it is called unusual."""

    enabled: bool = setting(True, "watch the optimiser's state in every step (weights are the same with and without)")
    act: bool = setting(False, "let the controller steer: per-tensor epsilon, ramped reset, clip, skip, roll back")
    sample: int = setting(
        4096, "most coordinates of a tensor that are looked at; fixed, spread evenly", "coordinates", ge=64
    )
    record_every: int = setting(20, "steps between health records", "steps", ge=1)
    histogram_every: int = setting(50, "steps between histograms of the update", "steps", ge=1)
    logits_every: int = setting(
        50, "steps between looks at attention logits and log Z, on a few tokens; 0: none", "steps", ge=0
    )
    settle: int = setting(50, "steps after an announced change with thresholds of the update doubled", "steps", ge=0)
    hold: int = setting(50, "steps without evidence before the state falls back", "steps", ge=1)
    surprise: float = setting(
        10.0, "watch: gradient RMS of a tensor over the RMS that Adam's second moment expects", gt=1
    )
    surge: float = setting(7.0, "alarm: the surprise that half of all tensors exceed at once", gt=1)
    surge_age: int = setting(
        100, "steps of a tensor after which its surprise counts in a surge; young gradients grow", "steps", ge=0
    )
    lurch: float = setting(
        4.0,
        "alarm, with lurch_size: median over tensors of the update over the weights, in multiples of its usual",
        gt=1,
    )
    lurch_size: float = setting(0.12, "alarm, with lurch: median over tensors of the update over the weights", gt=0)
    leap: float = setting(8.0, "alarm: as lurch, whatever the size", gt=1)
    stride: float = setting(
        20.0, "alarm, with stride_size: update of one tensor over its weights, in multiples of its usual", gt=1
    )
    stride_size: float = setting(0.1, "alarm, with stride: update of one tensor over its weights", gt=0)
    chorus: float = setting(0.7, "alarm, with chorus_rise: median over tensors of the RMS of update over rate", gt=0)
    chorus_rise: float = setting(2.5, "alarm, with chorus: the same in multiples of its usual", gt=1)
    u_rms: float = setting(0.6, "watch, with f9 and bimodality: RMS of the update over the rate", gt=0)
    f9: float = setting(0.3, "watch, with u_rms and bimodality: share of coordinates that move by over 0.9 rates", gt=0)
    bimodality: float = setting(0.555, "watch, with u_rms and f9: bimodality coefficient of the update", gt=0)
    stall: float = setting(10.0, "watch: median of sqrt(v) over epsilon", gt=0)
    below_eps: float = setting(0.5, "watch: share of coordinates with sqrt(v) below epsilon", gt=0, le=1)
    lag_cosine: float = setting(0.6, "watch: running mean of the cosine of successive gradients", gt=0, lt=1)
    descent_cosine: float = setting(0.1, "watch, with u_rms above 0.5: cosine of update and gradient", gt=-1, lt=1)
    update_ratio: float = setting(10.0, "watch: update of one tensor over its weights, in multiples of its usual", gt=1)
    stable_rms: float = setting(2.5, "watch: StableAdamW's RMS of the gradient over sqrt(v)", gt=1)
    loss_z: float = setting(6.0, "alarm: robust z of the loss, three steps in a row", gt=0)
    norm_z: float = setting(6.0, "watch: robust z of the logarithm of the global gradient norm", gt=0)
    max_logit: float = setting(1e3, "watch: largest attention logit", gt=0)
    good_after: int = setting(
        200,
        "act: steps without a reset or worse after which a checkpoint is good; the last 3 of them stay",
        "steps",
        ge=1,
    )
    margin: int = setting(
        100, "act: a roll-back goes to a good checkpoint at least so long before the trouble began", "steps", ge=0
    )
    wait: int = setting(200, "act: longest time that a spike of the loss may take to fall by itself", "steps", ge=1)
    recover: int = setting(1000, "act: steps at 0.7 of the rate after a roll-back", "steps", ge=0)


class LoopConfig(Section):
    """What the run loop itself needs, whatever the task."""

    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _eval_needs_tokens(self) -> "LoopConfig":
        if self.eval.every and not self.eval.tokens:
            raise ValueError("eval.every is set but eval.tokens is 0; set eval.tokens to the held-out tokens to score")
        return self

    @model_validator(mode="after")
    def _retention_meets_checkpoints(self) -> "LoopConfig":
        every, kept = self.checkpoint.every, self.checkpoint.keep_every
        if kept % every:
            raise ValueError(
                f"checkpoint.keep_every is {kept} but checkpoints are made every {every} steps (checkpoint.every); "
                f"make it a multiple, such as {-(-kept // every) * every}"
            )
        if self.checkpoint.keep_best and (not self.eval.every or every % self.eval.every):
            raise ValueError(
                f"checkpoint.keep_best needs held-out figures at every checkpoint, but eval.every is {self.eval.every} "
                f"and checkpoint.every {every}; set eval.every to {every} or a divisor of it"
            )
        return self
