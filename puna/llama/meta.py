"""Meta's own checkpoint folders in and out: params.json and consolidated.00.pth, consolidated.01.pth, ...

Each file is one tensor-parallel part: it holds every name, and of a shared-out tensor its own rows or columns. Rotary
embedding turns neighbouring channels (2i, 2i + 1) there and (i, i + head_dim / 2) here, so the rows of the query and
key matrices stand in another order (reference code of Llama 2 and 3, `apply_rotary_emb`).
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from puna.console import track
from puna.errors import CheckpointError
from puna.llama.config import LlamaConfig, RopeScaling
from puna.llama.folder import new_folder, read_json, read_tensors, require, write_json

PARAMS = "params.json"
COMPLETE = "Give a complete Meta folder: params.json, consolidated.00.pth and its other parts."
EMBEDDING, HEAD, FREQUENCIES = "tok_embeddings.weight", "output.weight", "rope.freqs"
LLAMA_2_THETA, LLAMA_3_THETA = 10_000.0, 500_000.0
KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "rope_scaling_factor", "max_seq_len", "max_batch_size",
}  # fmt: skip
FFN_RULES = ((256, None), (4_096, 1.3), (1_024, 1.3), (4_096, 1.2), (256, 1.5), (256, 1.0))
"""`multiple_of` and `ffn_dim_multiplier` of the models that Meta published."""


class Share(NamedTuple):
    """Where a tensor of Meta's goes: its name and whole shape here; the dim that parts share out (None: each has all),
    in units of `width` (the channels of a head, or single ones); whether its rows are in rotary order."""

    native: str
    shape: tuple[int, ...]
    dim: int | None = None
    width: int = 1
    is_turned: bool = False

    def slot(self, whole: Tensor, part: int, num_parts: int) -> Tensor:
        """The view of the whole tensor that is part `part`'s; parts that outnumber the units repeat them, neighbours
        first, as Meta's 16 parts of the 405B model do with its 8 key-value heads."""
        if self.dim is None:
            return whole
        num_units = self.shape[self.dim] // self.width
        start, length = part * num_units // num_parts, max(num_units // num_parts, 1)
        return whole.narrow(self.dim, start * self.width, length * self.width)

    def is_repeat(self, part: int, num_parts: int) -> bool:
        """Whether the part before holds the same."""
        if part == 0 or self.dim is None:
            return part > 0
        num_units = self.shape[self.dim] // self.width
        return part * num_units // num_parts == (part - 1) * num_units // num_parts


def shares(config: LlamaConfig, embedding_dim: int) -> dict[str, Share]:
    """Meta's name of every tensor -> where it goes. embedding_dim: 0 where parts share the embedding table out by rows
    (Llama 3), 1 by columns (Llama 2)."""
    dim, ffn, width = config.dim, config.ffn_dim, config.head_dim
    query, key = config.num_heads * width, config.num_kv_heads * width
    table = {
        EMBEDDING: Share("model.embed_tokens.weight", (config.vocab_size, dim), embedding_dim),
        "norm.weight": Share("model.norm.weight", (dim,)),
    }
    if not config.tie_embeddings:
        table[HEAD] = Share("lm_head.weight", (config.vocab_size, dim), 0)
    block = {
        "attention.wq": Share("self_attn.q_proj", (query, dim), 0, width, is_turned=True),
        "attention.wk": Share("self_attn.k_proj", (key, dim), 0, width, is_turned=True),
        "attention.wv": Share("self_attn.v_proj", (key, dim), 0, width),
        "attention.wo": Share("self_attn.o_proj", (dim, query), 1, width),
        "feed_forward.w1": Share("mlp.gate_proj", (ffn, dim), 0),
        "feed_forward.w2": Share("mlp.down_proj", (dim, ffn), 1),
        "feed_forward.w3": Share("mlp.up_proj", (ffn, dim), 0),
        "attention_norm": Share("input_layernorm", (dim,)),
        "ffn_norm": Share("post_attention_layernorm", (dim,)),
    }
    for layer in range(config.num_layers):
        for name, share in block.items():
            native = f"model.layers.{layer}.{share.native}.weight"
            table[f"layers.{layer}.{name}.weight"] = share._replace(native=native)
    return table


def to_half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (heads * head_dim, D) whose rotary pairs are neighbours -> pairs half a head apart."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_half_split`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


# --- in -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A checked Meta folder: its parts, the model they hold, the dtype they are in, where each tensor goes."""

    parts: list[Path]
    config: LlamaConfig
    dtype: torch.dtype
    table: dict[str, Share]

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights into a model's state dict, one part after another; a part is mapped, not read whole.

        Raises CheckpointError where two parts should hold the same key-value head and do not.
        """
        num_parts = len(self.parts)
        for part in track(range(num_parts), "parts") if num_parts > 1 else range(num_parts):
            tensors = read_tensors(self.parts[part])
            for name, share in self.table.items():
                piece = to_half_split(tensors[name], share.width) if share.is_turned else tensors[name]
                slot = share.slot(state[share.native], part, num_parts)
                if not share.is_repeat(part, num_parts):
                    slot.copy_(piece)
                elif share.dim is not None and not torch.equal(slot, piece.to(slot.dtype)):
                    raise self._unlike(name, part)

    def _unlike(self, name: str, part: int) -> CheckpointError:
        return CheckpointError(
            f"{name} of {self.parts[part]} differs from that of {self.parts[part - 1].name}, but with "
            f"{self.config.num_kv_heads} key-value heads in {len(self.parts)} parts the two hold the same head",
            f"Set n_kv_heads in {PARAMS} to the number of heads that the parts hold together.",
        )


def is_meta(folder: Path) -> bool:
    """Whether a folder looks like Meta's."""
    return (folder / PARAMS).is_file() or any(folder.glob("consolidated.*.pth"))


def read(folder: Path) -> Source:
    """Look a folder through without loading its weights.

    Raises CheckpointError, which names every missing, unexpected or differently shaped tensor of every part.
    """
    require(folder, PARAMS, COMPLETE)
    parts = part_files(folder)
    headers = [header(file) for file in parts]
    config = config_from_params(read_json(folder / PARAMS), folder / PARAMS, headers[0], len(parts))
    refuse_uneven(config, folder, len(parts))
    table = shares(config, embedding_dim=int(is_by_columns(headers[0], config, len(parts))))
    check(headers, parts, table)
    return Source(parts, config, headers[0][EMBEDDING].dtype, table)


def part_files(folder: Path) -> list[Path]:
    """The parts in order. Raises CheckpointError where one is missing."""
    num_parts = max(len(list(folder.glob("consolidated.*.pth"))), 1)
    names = [f"consolidated.{part:02d}.pth" for part in range(num_parts)]
    for name in names:
        require(folder, name, COMPLETE)
    return [folder / name for name in names]


def header(file: Path) -> dict[str, Tensor]:
    """Shape and dtype of every tensor, on the meta device; an output head that repeats the embedding is left out."""
    tensors = read_tensors(file)
    if EMBEDDING in tensors and HEAD in tensors and are_same(tensors[EMBEDDING], tensors[HEAD]):
        del tensors[HEAD]
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items() if name != FREQUENCIES}


def are_same(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices are equal; where they are not, the first row mostly tells."""
    return one.shape == other.shape and torch.equal(one[:1], other[:1]) and torch.equal(one, other)


def is_by_columns(header: Mapping[str, Tensor], config: LlamaConfig, num_parts: int) -> bool:
    """Whether parts share the embedding table out by columns."""
    return num_parts > 1 and header[EMBEDDING].shape[-1] * num_parts == config.dim


def config_from_params(
    params: Mapping[str, Any], source: Path, header: Mapping[str, Tensor], num_parts: int
) -> LlamaConfig:
    """LlamaConfig of a params.json and the header of the first part.

    What Meta's file leaves open: the vocabulary of Llama 2 (-1: as many rows as the parts have); whether the head is
    the embedding table (where the parts hold no other); the context (131,072 with scaled frequencies, else 8,192, 4,096
    or 16,384 for the rotary base of Llama 3, Llama 2 or Code Llama); the factor of the scaling (32 for the small models
    of 3.2, the ones with a tied head, else 8). Raises CheckpointError for unknown keys.
    """
    if unknown := sorted(params.keys() - KNOWN):
        raise CheckpointError(
            f"{source} has {', '.join(unknown)}, which Puna does not know",
            "Give a plain text model; take a key out only if it does not change what is computed.",
        )
    if EMBEDDING not in header:
        raise CheckpointError(f"the first part of {source.parent} holds no {EMBEDDING}", COMPLETE)
    is_tied = HEAD not in header
    theta, is_scaled = params.get("rope_theta", LLAMA_2_THETA), params.get("use_scaled_rope", False)
    factor = params.get("rope_scaling_factor", implied_factor(is_tied))
    contexts = {LLAMA_2_THETA: 4_096, LLAMA_3_THETA: 8_192}
    try:
        return LlamaConfig(
            num_layers=params["n_layers"],
            dim=params["dim"],
            ffn_dim=ffn_dim(params["dim"], params.get("multiple_of", 256), params.get("ffn_dim_multiplier")),
            num_heads=params["n_heads"],
            num_kv_heads=params.get("n_kv_heads") or params["n_heads"],
            head_dim=params["dim"] // params["n_heads"],
            vocab_size=params["vocab_size"] if params.get("vocab_size", -1) > 0 else num_rows(header, num_parts),
            max_seq_len=131_072 if is_scaled else contexts.get(theta, 16_384),
            rope_theta=theta,
            rope_scaling=RopeScaling(factor=factor) if is_scaled else None,
            norm_eps=params["norm_eps"],
            tie_embeddings=is_tied,
        )
    except KeyError as error:
        raise CheckpointError(f"{source} has no key {error}", "Fetch the folder's params.json again.") from error
    except (ValidationError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} does not describe a Llama: {error}", "Correct the values named.") from error


def implied_factor(is_tied: bool) -> float:
    """Division of the low rotary frequencies that Meta's code holds and its params.json does not tell."""
    return 32.0 if is_tied else 8.0


def num_rows(header: Mapping[str, Tensor], num_parts: int) -> int:
    """Rows of the vocabulary that the parts hold together; the output head is always shared out by rows."""
    rows = header[HEAD] if HEAD in header else header[EMBEDDING]
    return rows.shape[0] * num_parts


def ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward: 2/3 of 4 dim, times the multiplier, rounded up (reference code of Llama 2 and 3)."""
    width = int(2 * 4 * dim / 3)
    width = width if multiplier is None else int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


def refuse_uneven(config: LlamaConfig, source: str | Path, num_parts: int) -> None:
    """Raise CheckpointError where a model cannot be shared out into so many parts."""
    kv_heads = config.num_kv_heads
    counts = {"query heads": config.num_heads, "feed-forward channels": config.ffn_dim, "tokens": config.vocab_size}
    uneven = [f"{count:,} {name}" for name, count in counts.items() if count % num_parts]
    uneven += [f"{kv_heads} key-value heads"] if kv_heads % num_parts and num_parts % kv_heads else []
    if uneven:
        raise CheckpointError(
            f"{source}: {num_parts} parts cannot share {' or '.join(uneven)} evenly",
            "Give all the parts there are, or write a number of parts that divides these counts.",
        )


def check(headers: list[dict[str, Tensor]], parts: list[Path], table: Mapping[str, Share]) -> None:
    """Raise CheckpointError, which names every difference, unless every part has the names and shapes it should."""
    differences = [
        f"{file.name}: {difference}"
        for part, (file, found) in enumerate(zip(parts, headers, strict=True))
        for difference in differences_of(found, wanted_shapes(table, part, len(parts)))
    ]
    if differences:
        raise CheckpointError(
            f"{parts[0].parent} does not fit its {PARAMS}: {'; '.join(differences)}",
            f"Use the {PARAMS} and all the parts of one and the same model.",
        )


def wanted_shapes(table: Mapping[str, Share], part: int, num_parts: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of one part."""
    wholes = {name: torch.empty(share.shape, device="meta") for name, share in table.items()}
    return {name: tuple(share.slot(wholes[name], part, num_parts).shape) for name, share in table.items()}


def differences_of(found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What is missing, unexpected or of another shape, in the order of the names."""
    for name in sorted(wanted.keys() | found.keys()):
        shape = tuple(found[name].shape) if name in found else None
        if shape is None:
            yield f"missing {name} {wanted[name]}"
        elif name not in wanted:
            yield f"unexpected {name} {shape}"
        elif shape != wanted[name]:
            yield f"{name} is {shape}, wanted {wanted[name]}"


# --- out ------------------------------------------------------------------------------------------------------------


def save(
    state: Mapping[str, Tensor],
    config: LlamaConfig,
    folder: str | Path,
    *,
    num_parts: int = 1,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a whole state dict as a Meta folder that appears complete or not at all.

    num_parts: files, as many as there are tensor-parallel ranks to load them. dtype: of the files; None keeps each
    tensor's own. Where parts outnumber the key-value heads these are repeated and counted so, as Meta does. The context
    (`max_seq_len`) has no place in params.json. Raises CheckpointError for a model that Meta's form cannot express, a
    number of parts that does not divide it, or a folder in use.
    """
    params = params_of(config, num_parts)
    refuse_uneven(config, "this model", num_parts)
    table = shares(config, embedding_dim=int(config.rope_theta == LLAMA_2_THETA))
    if differences := list(differences_of(state, {share.native: share.shape for share in table.values()})):
        raise CheckpointError(
            f"the state dict does not fit its model configuration: {'; '.join(differences)}",
            "Give the whole state dict of one model.",
        )
    with new_folder(Path(folder)) as partial:
        for part in range(num_parts):
            torch.save(dict(pieces(state, table, part, num_parts, dtype)), partial / f"consolidated.{part:02d}.pth")
        write_json(partial / PARAMS, params)
        if tokenizer_dir is not None:
            shutil.copytree(tokenizer_dir, partial, dirs_exist_ok=True)


def pieces(
    state: Mapping[str, Tensor], table: Mapping[str, Share], part: int, num_parts: int, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything that one part holds; a tied head is the embedding's own tensor once more."""
    for name, share in table.items():
        piece = share.slot(state[share.native].detach(), part, num_parts)
        piece = to_neighbours(piece, share.width) if share.is_turned else piece
        piece = piece.to("cpu", dtype, copy=True).contiguous()
        yield name, piece
        if name == EMBEDDING and HEAD not in table:
            yield HEAD, piece


def params_of(config: LlamaConfig, num_parts: int) -> dict[str, Any]:
    """params.json of a model; keys that Llama 2's code does not know are there only where they say something."""
    refuse_inexpressible(config)
    params = {
        "dim": config.dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": max(config.num_kv_heads, num_parts),
        "vocab_size": config.vocab_size,
        **ffn_params(config.dim, config.ffn_dim),
        "norm_eps": config.norm_eps,
    }
    if config.rope_theta != LLAMA_2_THETA:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        params["use_scaled_rope"] = True
        if config.rope_scaling.factor != implied_factor(config.tie_embeddings):
            params["rope_scaling_factor"] = config.rope_scaling.factor
    return params


def ffn_params(dim: int, width: int) -> dict[str, Any]:
    """Keys of params.json from which `ffn_dim` gives `width`: those of a published model where they do."""
    for multiple_of, multiplier in FFN_RULES:
        if ffn_dim(dim, multiple_of, multiplier) == width:
            keys: dict[str, Any] = {"multiple_of": multiple_of}
            return keys if multiplier is None else keys | {"ffn_dim_multiplier": multiplier}
    return {"multiple_of": 1, "ffn_dim_multiplier": (width + 0.5) / int(2 * 4 * dim / 3)}


def refuse_inexpressible(config: LlamaConfig) -> None:
    """Raise CheckpointError for a model that params.json has no words for."""
    if config.head_dim * config.num_heads != config.dim:
        raise CheckpointError(
            f"model.head_dim {config.head_dim} x {config.num_heads} heads is not model.dim {config.dim}, as it is "
            "everywhere in Meta's form",
            "Export it with --to hf.",
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling != RopeScaling(factor=scaling.factor):
        raise CheckpointError(
            "model.rope_scaling has other bands than Llama 3.1's (1, 4, 8,192), which Meta's form does not tell",
            "Export it with --to hf.",
        )
