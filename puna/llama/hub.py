"""Hugging Face folders in and out: config.json, safetensors (one file or shards with an index), tokenizer files."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puna.errors import CheckpointError
from puna.llama.config import LlamaConfig, RopeScaling
from puna.llama.model import Llama
from puna.train import checkpoint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RUN_MODEL = "model.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
DERIVED = "rotary_emb.inv_freq"
"""Ending of tensors in old Llama 2 folders that only repeat what config.json says."""


class Loaded(NamedTuple):
    """A model, its shape, and the folder of its tokenizer files where it came with any."""

    model: Llama
    config: LlamaConfig
    tokenizer_dir: Path | None


def build(config: LlamaConfig) -> Llama:
    """The model without memory for its parameters (on the meta device), to be filled by assignment."""
    with torch.device("meta"):
        return Llama(config)


def load(folder: str | Path, dtype: torch.dtype | None = None, step: int | None = None) -> Loaded:
    """The model of a Hugging Face folder or of a run directory, in `dtype` or in the dtype of its file.

    step: a run's checkpoint, the newest where None; averaged weights where the run has begun to average.
    Raises CheckpointError, which names every missing, unexpected or differently shaped tensor.
    """
    folder = Path(folder)
    if (folder / RUN_MODEL).is_file():
        return load_run(folder, dtype, step)
    if step is not None:
        raise CheckpointError(f"{folder} is not a run directory, so it has no steps", "Leave the step out.")
    require(folder, "config.json")
    config = config_from_hf(read_json(folder / "config.json"), folder / "config.json")
    model = build(config)
    files = weight_files(folder)
    check(shapes_in(files), model, folder)
    for file in files:
        model.load_state_dict(tensors_of(file, dtype), strict=False, assign=True)
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return Loaded(model, config, folder if has_tokenizer else None)


def load_run(run: Path, dtype: torch.dtype | None, step: int | None) -> Loaded:
    """The model of a run directory's checkpoint."""
    config = LlamaConfig.model_validate_json((run / RUN_MODEL).read_text(encoding="utf-8"))
    manifest = checkpoint.read_manifest(run, step)
    averaged = manifest.json.get("average.count", {"count": 0})["count"] > 0
    model = build(config).to_empty(device="cpu")
    checkpoint.load_module(run, model, manifest.cursor.units, "average.model" if averaged else "model")
    return Loaded(model.to(dtype) if dtype else model, config, run / "tokenizer")


def save(
    state: Mapping[str, Tensor],
    config: LlamaConfig,
    folder: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    bos: int | None = None,
    eos: Iterable[int] = (),
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write a whole state dict as a Hugging Face folder that appears complete or not at all.

    `dtype`: of the file; None keeps each tensor's own. `bos`, `eos`: ids for generation_config.json.
    Raises CheckpointError if the folder already holds files or the state does not fit the config.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is already there", "Choose a new folder, or remove this one first.")
    check({name: tuple(tensor.shape) for name, tensor in state.items()}, build(config), "the state dict")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        partial = Path(scratch) / "folder"
        partial.mkdir()
        write_tensors(state, partial, dtype, max_shard_bytes)
        ids = {"bos_token_id": bos, "eos_token_id": list(eos) or None}
        stored = dtype or next(iter(state.values())).dtype
        write_json(partial / "config.json", config_to_hf(config) | ids | {"dtype": str(stored).removeprefix("torch.")})
        write_json(partial / "generation_config.json", ids)
        if tokenizer_dir is not None:
            shutil.copytree(tokenizer_dir, partial, dirs_exist_ok=True)
        os.replace(partial, folder)


def config_from_hf(values: Mapping[str, Any], source: str | Path) -> LlamaConfig:
    """LlamaConfig of a config.json, of Transformers 5 (`rope_parameters`) or older (`rope_theta`, `rope_scaling`)."""
    refuse_other_models(values, source)
    rope = values.get("rope_parameters") or {
        "rope_theta": values.get("rope_theta", 10_000.0),
        **(values.get("rope_scaling") or {}),
    }
    try:
        return LlamaConfig(
            num_layers=values["num_hidden_layers"],
            dim=values["hidden_size"],
            ffn_dim=values["intermediate_size"],
            num_heads=values["num_attention_heads"],
            num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
            head_dim=values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
            vocab_size=values["vocab_size"],
            max_seq_len=values["max_position_embeddings"],
            rope_theta=rope["rope_theta"],
            rope_scaling=scaling_from_hf(rope, source),
            norm_eps=values["rms_norm_eps"],
            tie_embeddings=values.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise CheckpointError(f"{source} has no key {error}", "Fetch the folder's config.json again.") from error
    except ValidationError as error:
        raise CheckpointError(f"{source} does not describe a Llama: {error}", "Correct the values named.") from error


def scaling_from_hf(rope: Mapping[str, Any], source: str | Path) -> RopeScaling | None:
    """Frequency scaling of a rope group; only "default" and "llama3" are Llama's."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f'{source}: rope_type "{kind}" is not known', 'Puna reads "default" and "llama3".')
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_seq_len=rope["original_max_position_embeddings"],
    )


def refuse_other_models(values: Mapping[str, Any], source: str | Path) -> None:
    """Raise CheckpointError for a config.json of something that is not Llama's text model."""
    expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, wanted in expected.items():
        if values.get(key, wanted) != wanted:
            raise CheckpointError(
                f"{source}: {key} is {values[key]!r}, a Llama text model has {wanted!r}", "Give the folder of a Llama."
            )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """config.json of a LlamaConfig; theta and scaling under the keys of Transformers 5 and under the older ones."""
    scaling = config.rope_scaling and {
        "rope_type": "llama3",
        "factor": config.rope_scaling.factor,
        "low_freq_factor": config.rope_scaling.low_freq_factor,
        "high_freq_factor": config.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": config.rope_scaling.original_seq_len,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, **(scaling or {})},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the single one, or those its index names."""
    if not (folder / INDEX).is_file():
        require(folder, SINGLE)
        return [folder / SINGLE]
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    for name in names:
        require(folder, name)
    return [folder / name for name in names]


def shapes_in(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, read from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with opened(file) as tensors:
            names = (name for name in tensors.keys() if not name.endswith(DERIVED))  # noqa: SIM118
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    return shapes


def tensors_of(file: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of one file, in memory."""
    with opened(file) as tensors:
        return {name: tensors.get_tensor(name).to(dtype) for name in tensors.keys()}  # noqa: SIM118


def opened(file: Path) -> Any:
    """safetensors' reader of a file, a context manager. Raises CheckpointError if the file is damaged."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}", "Fetch or export the file again.") from error


def check(found: Mapping[str, tuple[int, ...]], model: Llama, source: str | Path) -> None:
    """Raise CheckpointError unless names and shapes are the model's; the message names every difference."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    common = wanted.keys() & found.keys()
    differences = (
        [f"missing {name} {wanted[name]}" for name in sorted(wanted.keys() - common)]
        + [f"unexpected {name} {found[name]}" for name in sorted(found.keys() - common)]
        + [f"{name} is {found[name]}, wanted {wanted[name]}" for name in sorted(common) if found[name] != wanted[name]]
    )
    if differences:
        raise CheckpointError(
            f"{source} does not fit its model configuration: {'; '.join(differences)}",
            "Use the configuration and the weights of one and the same model.",
        )


def write_tensors(state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """One file if all fits into `max_shard_bytes`, else shards and an index."""
    shards = shard_names(state, dtype, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: state[key].detach().to("cpu", dtype).contiguous() for key in keys}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(num_bytes(tensor, dtype) for tensor in state.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def shard_names(state: Mapping[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each shard, in order; a shard is closed before it would grow beyond the limit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        size = num_bytes(tensor, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def num_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def require(folder: Path, name: str) -> None:
    """Raise CheckpointError, saying what there is, unless `folder` holds the file `name`."""
    if (folder / name).is_file():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", "Give a folder with config.json and safetensors files.")
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise CheckpointError(f"{folder} has no {name}; it holds {there}", "Give a complete Hugging Face folder.")


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not JSON: {error}", "Fetch or export the file again.") from error


def write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
