"""`puna check RECIPE`: what can be known of a run before it starts, and refused before it costs anything."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from puna import predicted
from puna.console import err
from puna.errors import DataError, DeviceError, RecipeError
from puna.llama import hub
from puna.llama.identity import identity
from puna.llama.mixture import Mixture, open_sources, plan
from puna.llama.packing import IGNORED, Batch, Stream, packed
from puna.llama.shards import AGAIN, Shards
from puna.llama.targets import Targets, count_targets
from puna.llama.tokenizer import Tokenizer
from puna.recipe import FLAG, Loaded, Recipe, Stage, check_ranks, laid_over, stages
from puna.train.mesh import axis_sizes, choose_compute, choose_device

NUM_ROWS = 32
"""Rows of each source whose targets are counted."""
NUM_SAMPLES, SAMPLE_TOKENS = 3, 128
WEIGHTS_DTYPE = "float32"
"""Of the parameters that a run keeps and saves, whatever it computes in."""


@dataclass(frozen=True)
class Inspection:
    """What was read of a recipe's data."""

    sources: Sequence[Shards]
    tokenizer: Tokenizer
    targets: Sequence[Targets]


def inspect(recipe: Recipe) -> Inspection:
    """The cheap part, done before every run: data, tokenizer, vocabulary, and targets in some rows of every source.

    Raises DataError (a source is missing or damaged, or its tokenizer was changed; a row, batch or source without a
    target token), TokenizerError, RecipeError (the model has fewer ids than the tokenizer).
    """
    sources = open_sources(recipe.data, "train")
    open_sources(recipe.data, "heldout")
    tokenizer = Tokenizer.load(sources[0].tokenizer_dir)
    for shards in sources:
        refuse_small_vocabulary(recipe, shards)
        if shards.tokenizer_hash != tokenizer.hash:
            problem = f"{shards.folder} was made with the tokenizer {shards.tokenizer_hash[:12]}"
            found = f"{sources[0].tokenizer_dir} holds {tokenizer.hash[:12]}"
            raise DataError(f"{problem}, but {found}", AGAIN)
    counted = [count_targets(str(shards.folder), sample_batches(recipe, shards)) for shards in sources]
    return Inspection(sources, tokenizer, counted)


def refuse_small_vocabulary(recipe: Recipe, shards: Shards) -> None:
    """Raise RecipeError where the tokenizer of the data has ids that the model lacks."""
    if shards.vocab_size > recipe.model.vocab_size:
        raise RecipeError(
            f"model.vocab_size is {recipe.model.vocab_size:,} but the tokenizer of {shards.folder} has "
            f"{shards.vocab_size:,}",
            f"Set model.vocab_size to {shards.vocab_size} or more.",
        )


def refuse_other_mesh(recipe: Recipe) -> dict[str, int]:
    """Sizes of the mesh's axes on this run's processes. Raises RecipeError where mesh or batches do not fit them."""
    num_ranks = count_ranks(recipe)
    sizes = axis_sizes(recipe.mesh, num_ranks)
    check_ranks(recipe, num_ranks)
    return sizes


def count_ranks(recipe: Recipe) -> int:
    """Processes of this run: torchrun's, else the recipe's."""
    return int(os.environ.get("WORLD_SIZE", recipe.run.num_processes))


def sample_batches(recipe: Recipe, shards: Shards) -> Iterator[Batch]:
    """The first `NUM_ROWS` rows (or all there are) of one source, in micro-batches of the first stage."""
    stream, seq_len, size = Stream(shards, recipe.run.seed), recipe.train.seq_len, recipe.train.micro_batch
    num_rows = min(NUM_ROWS, max(1, shards.num_tokens // seq_len))
    for start in range(0, num_rows, size):
        yield packed(stream, list(range(start, min(start + size, num_rows))), seq_len)


def check(loaded: Loaded) -> dict[str, Any]:
    """Everything that `puna check` says, by key; docs/check.md documents them. Raises what `inspect` does, and
    RecipeError and DeviceError where the mesh, the batches or the device are not possible."""
    recipe = loaded.recipe
    if recipe.task == "graph":
        return check_graph(with_sizes(loaded).recipe)
    if recipe.task != "pretrain":
        raise RecipeError(
            f"{recipe.run.dir} is to be a run of task {recipe.task}, and puna check knows token shards",
            "`puna train` refuses what cannot be before it starts.",
        )
    mesh = refuse_other_mesh(recipe)
    device = choose_device(recipe.run.device)
    compute = choose_compute(recipe.train.dtype, device)
    if compute.dtype == torch.float16 and device.type == "cpu":
        problem = "train.dtype is fp16 but the device is a CPU, which has no fast fp16"
        raise DeviceError(problem, "Use auto, fp32 or bf16.")
    found = inspect(recipe)
    model = hub.build(recipe.model)
    marks = identity(found.tokenizer, WEIGHTS_DTYPE)
    return {
        "run": recipe.run.dir,
        "task": recipe.task,
        "device": str(device),
        "compute": str(compute.dtype).removeprefix("torch."),
        "mesh": mesh,
        "model": {
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "vocab_size": recipe.model.vocab_size,
            "tokenizer_vocab_size": found.tokenizer.vocab_size,
        },
        "stages": _stages(recipe, math.prod(mesh.values())),
        "memory": _memory(recipe, mesh, compute.dtype.itemsize, device),
        "sources": _sources(recipe, found),
        "identity": {key: marks[key] for key in ("tokenizer", "special_tokens", "template", "dtype")},
        "samples": list(_samples(recipe, found)),
    }


def with_sizes(loaded: Loaded) -> Loaded:
    """A graph recipe with what `--size auto` decides in its place, told on stderr; flags stay. Raises DataError (no
    graph), RecipeError."""
    if loaded.recipe.graph.size == "given":
        return loaded
    from puna.graph.budget import Sizes
    from puna.graph.graph import Graph
    from puna.graph.sizing import sized
    from puna.graph.task import num_workers
    from puna.train.out_of_memory import limit_bytes

    recipe = loaded.recipe
    graph = Graph.open(recipe.data.path)
    job = num_workers(recipe.graph, recipe.run.num_threads), recipe.eval.tokens > 0
    found = sized(recipe.graph, Sizes.of(graph), limit_bytes(), *job)
    found = {key: value for key, value in found.items() if loaded.origins[f"graph.{key}"] != FLAG.name}
    shown = ", ".join(f"{key} {value}" for key, value in found.items())
    err.print(f"for {graph.num_nodes:,} nodes and {graph.split('train')['edges']:,} edges: {shown}", markup=False)
    values = {f"graph.{key}": value for key, value in (found | {"size": "given"}).items()}
    return laid_over(loaded, values, "size auto")


def check_graph(recipe: Recipe) -> dict[str, Any]:
    """The same of a recipe that trains a graph. Raises DataError, RecipeError."""
    from puna.graph.graph import Graph
    from puna.graph.inspecting import inspect as inspect_graph
    from puna.graph.task import num_workers

    graph = Graph.open(recipe.data.path)
    job = num_workers(recipe.graph, recipe.run.num_threads), recipe.eval.tokens > 0
    found = inspect_graph(recipe.graph, graph, *job)
    return {"run": recipe.run.dir, "task": recipe.task} | found


def _stages(recipe: Recipe, num_ranks: int) -> list[dict[str, int]]:
    """One record a stage of the batch and sequence schedule."""
    found = [stage for stage in stages(recipe) if stage.start < recipe.train.tokens]
    ends = [stage.start for stage in found[1:]] + [recipe.train.tokens]
    return [_stage(recipe, stage, end, num_ranks) for stage, end in zip(found, ends, strict=True)]


def _stage(recipe: Recipe, stage: Stage, end: int, num_ranks: int) -> dict[str, int]:
    micro_tokens = recipe.train.seq_len * recipe.train.micro_batch
    return {
        "from_token": stage.start,
        "num_steps": math.ceil((end - stage.start) / stage.batch_tokens),
        "batch_tokens": stage.batch_tokens,
        "seq_len": stage.seq_len,
        "rows_per_step": stage.batch_tokens // stage.seq_len,
        "rows_per_micro_batch": micro_tokens // stage.seq_len,
        "num_micro_batches": stage.batch_tokens // (micro_tokens * num_ranks),
    }


def _memory(recipe: Recipe, mesh: dict[str, int], compute_bytes: int, device: torch.device) -> dict[str, Any]:
    """Bytes of one rank by use, their sum, what the rank has, and whether it fits."""
    held = predicted.memory(recipe, mesh, compute_bytes, device)
    available = predicted.available(device, math.prod(mesh.values()))
    return {**asdict(held), "total": held.total, "available": available, "fits": held.total <= available}


def _sources(recipe: Recipe, found: Inspection) -> list[dict[str, Any]]:
    """What the run reads of each source, and of the rows that were looked at, how much trains."""
    records = plan(recipe.data, found.sources, recipe.train.tokens)
    return [
        {**record, "checked_rows": targets.num_rows, "trained_share": targets.share}
        for record, targets in zip(records, found.targets, strict=True)
    ]


def _samples(recipe: Recipe, found: Inspection) -> Iterator[dict[str, Any]]:
    """The beginnings of the run's first rows, decoded, in pieces that train and pieces that do not."""
    mixture = Mixture(
        [Stream(shards, recipe.run.seed) for shards in found.sources],
        [weight for _, weight in recipe.data.mixture()],
    )
    for index in range(NUM_SAMPLES):
        batch = packed(mixture, [index], recipe.train.seq_len)
        source, own = mixture.place(index)
        trained = [False, *(batch.targets[0, :-1] != IGNORED).tolist()]
        yield {
            "source": str(found.sources[source].folder),
            "index": own,
            "num_tokens": len(trained),
            "num_trained": sum(trained),
            "pieces": marked(found.tokenizer, batch.tokens[0].tolist()[:SAMPLE_TOKENS], trained[:SAMPLE_TOKENS]),
        }


def marked(tokenizer: Tokenizer, ids: Sequence[int], trained: Sequence[bool]) -> list[dict[str, Any]]:
    """Text in pieces whose tokens all train, or none; control tokens by name."""
    names = {i: name.encode() for name, i in tokenizer.special.items()}
    pieces = []
    for trains, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        data = b"".join(names.get(i) or tokenizer.decode_bytes([i]) for i, _ in group)
        pieces.append({"text": data.decode("utf-8", "replace"), "trained": trains})
    return pieces


# --- the page -------------------------------------------------------------------------------------------------------


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `check` returned as a page."""
    if found["task"] == "graph":
        from puna.graph.inspecting import show as show_graph

        show_graph(found, console)
        return
    model, memory = found["model"], found["memory"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one process"
    console.print(f"[bold]{escape(found['run'])}[/]  {found['task']} on {found['device']}, {found['compute']}, {mesh}")
    console.print(
        f"{model['num_parameters']:,} parameters; {model['vocab_size']:,} ids, "
        f"of which the tokenizer has {model['tokenizer_vocab_size']:,}\n"
    )
    console.print(_table("Batches", found["stages"]))
    console.print(_table("Data", [_rounded(record) for record in found["sources"]]))
    uses = {key: value for key, value in memory.items() if key not in ("total", "available", "fits")}
    records = [{"memory of a rank": use, "MiB": f"{size / 2**20:,.1f}"} for use, size in uses.items() if size]
    records.append({"memory of a rank": "total", "MiB": f"{memory['total'] / 2**20:,.1f}"})
    console.print(_table("Memory (an estimate)", records))
    if not memory["fits"]:
        told = f"more than the {memory['available'] / 2**20:,.0f} MiB that a rank has here"
        console.print(f"[bold red]This is {told}.[/] Lower train.micro_batch, or set train.recompute.\n")
    marks = found["identity"].items()
    console.print(_table("Made with", [{"what": key, "sha256": mark["sha256"][:16]} for key, mark in marks]))
    for sample in found["samples"]:
        console.print(
            f"[bold]Sample {sample['index']} of {escape(sample['source'])}[/]: {sample['num_trained']:,} of "
            f"{sample['num_tokens']:,} tokens train (green); those in ⟦ ⟧ do not"
        )
        console.print(Text.assemble(*map(_marked, sample["pieces"])), "\n")


def _marked(piece: dict[str, Any]) -> tuple[str, str]:
    return (piece["text"], "green") if piece["trained"] else (f"⟦{piece['text']}⟧", "dim")


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"epochs": f"{record['epochs']:.2f}"} | {k: f"{record[k]:.2%}" for k in ("share", "trained_share")}


def _table(title: str, records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for key in records[0]:
        table.add_column(key.replace("_", " "), justify="left" if isinstance(records[0][key], str) else "right")
    for record in records:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else escape(str(value)) for value in record.values()))
    return table
