"""Model folders in and out. Hugging Face's: config.json, safetensors (or torch) files, one or shards with an index, and
tokenizer files. Meta's: see `meta.py`. Run directories: in."""

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
from puna.llama import meta
from puna.llama.config import LlamaConfig, RopeScaling
from puna.llama.folder import AGAIN, new_folder, read_json, read_tensors, require, write_json
from puna.llama.model import Llama
from puna.llama.tokenizer import Tokenizer
from puna.train import checkpoint
from puna.train.mesh import DTYPES

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
WEIGHTS = (SINGLE, "pytorch_model.bin")
"""Files that hold all weights, best first; shards are listed in NAME.index.json."""
RUN_MODEL = "model.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
DERIVED = "rotary_emb.inv_freq"
"""Ending of tensors in old Llama 2 folders that only repeat what config.json says."""
COMPLETE = "Give a complete Hugging Face folder (config.json and weights), a Meta folder or a run directory."


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
    """The model of a Hugging Face folder, a Meta folder or a run directory, in `dtype` or in the dtype of its file.

    step: a run's checkpoint, the newest where None; averaged weights where the run has begun to average.
    Raises CheckpointError, which names every missing, unexpected or differently shaped tensor.
    """
    folder = Path(folder)
    if (folder / RUN_MODEL).is_file():
        return load_run(folder, dtype, step)
    if step is not None:
        raise CheckpointError(f"{folder} is not a run directory, so it has no steps", "Leave the step out.")
    if meta.is_meta(folder) and not is_hf(folder):
        return load_meta(folder, dtype)
    return load_hf(folder, dtype)


def load_hf(folder: Path, dtype: torch.dtype | None) -> Loaded:
    """The model of a Hugging Face folder."""
    require(folder, "config.json", COMPLETE)
    config = config_from_hf(read_json(folder / "config.json"), folder / "config.json")
    model = build(config)
    files = weight_files(folder)
    check(shapes_in(files), model, folder)
    for file in files:
        model.load_state_dict(tensors_of(file, dtype), strict=False, assign=True)
    return Loaded(model, config, tokenizer_in(folder))


def load_meta(folder: Path, dtype: torch.dtype | None) -> Loaded:
    """The model of a folder with params.json and consolidated.0N.pth."""
    source = meta.read(folder)
    model = build(source.config).to(dtype or source.dtype).to_empty(device="cpu")
    source.fill(model.state_dict())
    return Loaded(model, source.config, tokenizer_in(folder))


def load_run(run: Path, dtype: torch.dtype | None, step: int | None) -> Loaded:
    """The model of a run directory's checkpoint."""
    config = LlamaConfig.model_validate_json((run / RUN_MODEL).read_text(encoding="utf-8"))
    manifest = checkpoint.read_manifest(run, step)
    averaged = manifest.json.get("average.count", {"count": 0})["count"] > 0
    model = build(config).to_empty(device="cpu")
    checkpoint.load_module(run, model, manifest.cursor.units, "average.model" if averaged else "model")
    return Loaded(model.to(dtype) if dtype else model, config, run / "tokenizer")


def tokenizer_in(folder: Path) -> Path | None:
    """The folder itself where it holds a tokenizer."""
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def export_meta(
    path: Path, out: Path, step: int | None = None, dtype: str | None = None, num_parts: int = 1
) -> dict[str, Any]:
    """Write any checkpoint that `load` reads as a Meta folder of `num_parts` tensor-parallel parts.

    Returns out, num_parts, num_parameters, num_bytes. Raises CheckpointError as `load` and `meta.save` do.
    """
    loaded = load(path, step=step)
    with tempfile.TemporaryDirectory() as own:
        if loaded.tokenizer_dir is not None:
            Tokenizer.load(loaded.tokenizer_dir).save(Path(own))
        meta.save(
            loaded.model.state_dict(),
            loaded.config,
            out,
            num_parts=num_parts,
            tokenizer_dir=own,
            dtype=DTYPES[dtype] if dtype else None,
        )
    return {
        "out": str(out),
        "num_parts": num_parts,
        "num_parameters": loaded.config.num_parameters,
        "num_bytes": sum(file.stat().st_size for file in out.iterdir()),
    }


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
    check({name: tuple(tensor.shape) for name, tensor in state.items()}, build(config), "the state dict")
    with new_folder(Path(folder)) as partial:
        write_tensors(state, partial, dtype, max_shard_bytes)
        ids = {"bos_token_id": bos, "eos_token_id": list(eos) or None}
        stored = dtype or next(iter(state.values())).dtype
        write_json(partial / "config.json", config_to_hf(config) | ids | {"dtype": str(stored).removeprefix("torch.")})
        write_json(partial / "generation_config.json", ids)
        if tokenizer_dir is not None:
            shutil.copytree(tokenizer_dir, partial, dirs_exist_ok=True)


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
    """The files with the weights of a folder: the single one, or those its index names. Raises CheckpointError."""
    single = next((name for name in WEIGHTS if has_weights(folder, name)), SINGLE)
    if (folder / index_of(single)).is_file():
        return indexed_files(folder, index_of(single))
    require(folder, single, COMPLETE)
    return [folder / single]


def is_hf(folder: Path) -> bool:
    """Whether a folder has weights in Hugging Face's form."""
    return any(has_weights(folder, name) for name in WEIGHTS)


def has_weights(folder: Path, single: str) -> bool:
    """Whether a folder has this file or the index of its shards."""
    return (folder / single).is_file() or (folder / index_of(single)).is_file()


def index_of(weights: str) -> str:
    """Name of the file that lists the shards of `weights`."""
    return f"{weights}.index.json"


def indexed_files(folder: Path, index: str) -> list[Path]:
    """The shards that an index names, each in the folder itself."""
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / index} has no weight_map from tensors to files", AGAIN)
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / index} names {name}, which is not a file of its own folder", AGAIN)
        require(folder, name, COMPLETE)
    return [folder / name for name in names]


def shapes_in(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, read from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.suffix == ".bin":
            found = {name: tuple(tensor.shape) for name, tensor in read_tensors(file).items()}
        else:
            with opened(file) as tensors:
                found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        shapes |= {name: shape for name, shape in found.items() if not name.endswith(DERIVED)}
    return shapes


def tensors_of(file: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of one file, in memory."""
    if file.suffix == ".bin":
        return {name: tensor.to(dtype or tensor.dtype, copy=True) for name, tensor in read_tensors(file).items()}
    with opened(file) as tensors:
        return {name: tensors.get_tensor(name).to(dtype) for name in tensors.keys()}  # noqa: SIM118


def opened(file: Path) -> Any:
    """safetensors' reader of a file, a context manager. Raises CheckpointError if the file is damaged."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}", AGAIN) from error


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
