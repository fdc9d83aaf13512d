"""Settings of a recommendation run: the sections `dlrm` and `exchange` of a recipe. Without torch, for planners."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from puna.train.config import Section, setting

Widths = Annotated[tuple[int, ...], Field(strict=False)]
Placed = Literal["auto", "table", "row", "column", "data"]
Wire = Literal["raw", "fp16", "int8", "bounded"]
Decay = Literal["step", "linear", "log", "constant"]


class DlrmConfig(Section):
    """A model of click-through rates and its training; rates follow `schedule`, of which tokens are samples."""

    dim: int = setting(16, "numbers in a row of a table", ge=1)
    bottom: Widths = setting((512, 256, 64), "widths of the bottom network between the dense features and dlrm.dim")
    top: Widths = setting((512, 256), "widths of the top network between the interaction and the logit")
    interaction: Literal["dot", "cat", "cross"] = setting(
        "dot",
        "dot: inner products of all pairs of vectors beside the bottom vector (DLRM); cat: the vectors side by side; "
        "cross: low-rank cross layers over cat (DCN-v2)",
    )
    cross_layers: int = setting(3, "cross: number of cross layers", ge=1)
    cross_rank: int = setting(512, "cross: rank of the matrix of a cross layer", ge=1)
    max_rows: int = setting(0, "rows of a table at most; larger ids are folded by modulo; 0: no limit", "rows", ge=0)

    epochs: int = setting(1, "times that every sample is trained on", ge=1)
    samples: int = setting(0, "samples to train on at most; 0: all of them, every epoch", "samples", ge=0)
    batch: int = setting(2048, "samples of one step over all ranks; the rest of an epoch is left out", "samples", ge=1)
    shuffle: bool = setting(True, "samples in a random order, another one every epoch; false: in the order of time")
    optimizer: Literal["sgd", "adagrad"] = setting("sgd", "of the networks")
    lr: float = setting(0.1, "peak rate of the networks", gt=0)
    table_optimizer: Literal["sgd", "adagrad"] = setting(
        "sgd", "of the tables; adagrad: row-wise, one number of state a row"
    )
    table_lr: float = setting(0.0, "peak rate of the tables; 0: as dlrm.lr", ge=0)
    eps: float = setting(1e-8, "what adagrad adds to the root of a sum", gt=0)
    dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "in which networks and interaction multiply; weights, tables and loss are float32 anyway"
    )

    placement: Placed = setting(
        "auto",
        "where tables are, over several ranks; table: each whole on one rank; row, column: cut over all ranks; data: "
        "a copy on every rank; auto: small ones copied, very large ones cut by rows, the others whole, so that bytes "
        "and lookups balance",
    )
    data_rows: int = setting(0, "auto: tables of up to so many rows are copied to every rank", "rows", ge=0)
    balance: float = setting(0.5, "auto: weight of bytes, the rest is that of lookups, in what is balanced", ge=0, le=1)

    @model_validator(mode="after")
    def _widths(self) -> "DlrmConfig":
        for name, widths in (("bottom", self.bottom), ("top", self.top)):
            if any(width < 1 for width in widths):
                raise ValueError(f"dlrm.{name} holds a width below 1; give the widths of layers, or an empty list")
        return self


class ExchangeConfig(Section):
    """What crosses between ranks: looked-up rows forward, their gradients backward."""

    forward: Wire = setting(
        "raw", "how rows are sent; raw: float32; fp16; int8: row-wise; bounded: error-bounded codec, sizes adapt"
    )
    backward: Wire = setting("raw", "how gradients are sent; bounded rounds without bias")
    distinct: bool = setting(
        True, "rows and gradients that a batch names several times are sent once, gradients summed first; exact"
    )
    dither: bool = setting(
        True,
        "bounded rows get noise before they are rounded that the receiver takes off: the same bound, and errors "
        "that do not depend on the rows; false: to the nearest, as published, in fewer bytes",
    )
    local: bool = setting(False, "what stays on its rank is put through the codec too, as if it were sent")
    tight: float = setting(0.01, "bound of tables of class tight, over the range of what is sent", gt=0, lt=1)
    base: float = setting(0.03, "bound of class base", gt=0, lt=1)
    loose: float = setting(0.05, "bound of class loose", gt=0, lt=1)
    classes: Annotated[tuple[Literal["tight", "base", "loose"], ...], Field(strict=False)] = setting(
        (), "class of every table, in order; empty: by the homogenisation index of the first batches"
    )
    warmup: int = setting(8, "batches that the index is measured on; all tables are tight until then", "steps", ge=1)
    backward_bound: float = setting(0.01, "bound of gradients, over the range of what is sent", gt=0, lt=1)
    codec: str = setting("auto", "codec of bounded; auto: the best one of each table by measured speed and ratio")
    decay: Decay = setting("step", "how the factor on all forward bounds falls to 1")
    factor: float = setting(2.0, "factor on all forward bounds in the first step", ge=1)
    decay_steps: int = setting(65_536, "steps until the factor is 1; 0: it always is", "steps", ge=0)
    record_every: int = setting(100, "steps between records of bytes and ratios by table", "steps", ge=1)
