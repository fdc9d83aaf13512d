"""Assembles: a recipe becomes a task under the one loop; a run directory becomes a Hugging Face folder."""

import json
import os
import platform
import shutil
import statistics
import tempfile
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import puna
from puna import recipe as recipes
from puna.check import WEIGHTS_DTYPE, count_ranks, inspect, refuse_other_mesh, with_sizes
from puna.console import err
from puna.errors import CheckpointError, DataError, DeviceError, RecipeError
from puna.llama import hub
from puna.llama.identity import refuse_other_tokenizer, verify_identity, write_identity
from puna.llama.pretrain import Pretrain
from puna.llama.shards import write_atomic
from puna.llama.template import TEMPLATE_FILE, chat_template
from puna.llama.tokenizer import Tokenizer
from puna.predicted import explained, out_of_memory_recorded, predict
from puna.recipe import Loaded, Recipe
from puna.train.checkpoint import complete_steps, hold_lock, latest
from puna.train.controller import most_held
from puna.train.disk import require_plan
from puna.train.divergence import code_version, require_same
from puna.train.launch import launch
from puna.train.loop import Run
from puna.train.mesh import DTYPES, choose_compute, choose_device, open_mesh
from puna.train.metrics import last_steps, read_events
from puna.train.watchdog import watch

FREE_TO_CHANGE = (
    "run.",
    "mesh.",
    "checkpoint.",
    "eval.",
    "health.",
    "data.",
    "graph.memory",
    "train.micro_batch",
    "train.recompute",
    "train.compile",
)
"""Settings that a resumed run may have anew: they do not change what is computed. The seed is not one of them."""


def train(loaded: Loaded) -> dict[str, Any]:
    """Train by a recipe, on as many local processes as it asks for; resumes where its directory stands.

    Under torchrun every rank calls it, and only rank 0 has something to return; the others get an empty dict.
    Returns run, steps, tokens, loss, heldout_loss (nats a token), tokens_per_s (median), resumed_from (step or None),
    of a graph also heldout_mrr (its tokens are edges, its steps buckets), and of a recommendation model heldout_auc,
    heldout_ne and heldout_calibration (its tokens are samples).
    Raises UserErrors before anything starts, RunLocked, NonFinite, Unfinished, RankFailed, Hung, RanksDiffer,
    OutOfMemory.
    """
    config = loaded.recipe.run
    run = Path(config.dir)
    rank = int(os.environ.get("RANK", "0"))
    if loaded.recipe.task == "graph":
        train_graph(loaded, run, rank)
        return outcome(run) if rank == 0 else {}
    if loaded.recipe.task == "dlrm":
        train_dlrm(loaded, run, rank)
        return outcome(run) if rank == 0 else {}
    if rank == 0:
        refuse_other_mesh(loaded.recipe)
        prepare(loaded, run)
    with out_of_memory_recorded(loaded.recipe, run):
        if "RANK" in os.environ:
            train_ranks(loaded.recipe, run)
        else:
            launch("puna.run:work", [str(run)], config.num_processes, run, config.num_threads, config.max_restarts)
    return outcome(run) if rank == 0 else {}


def prepare(loaded: Loaded, run: Path) -> None:
    """Check what can be checked before any process starts; write what the directory says of itself."""
    recipe = loaded.recipe
    found = inspect(recipe)
    choose_device(recipe.run.device)
    num_there = len(complete_steps(run))
    guarded = most_held(recipe.health, recipe.checkpoint.every)
    require_plan(run, recipe.checkpoint, recipe.train, recipe.schedule, recipe.model.num_parameters, num_there, guarded)
    with hold_lock(run):
        refuse_other_run(loaded, run)
        if num_there:
            refuse_other_tokenizer(run, found.tokenizer)
        write_recipe(loaded, run)
        write_atomic(run / "model.json", recipe.model.model_dump_json(indent=1).encode())
        shutil.copytree(found.sources[0].tokenizer_dir, run / "tokenizer", dirs_exist_ok=True)
        write_atomic(run / "tokenizer" / TEMPLATE_FILE, chat_template(found.tokenizer.chat_format).encode())
        write_identity(run, found.tokenizer, WEIGHTS_DTYPE)


def train_graph(loaded: Loaded, run: Path, rank: int) -> None:
    """Train a graph, in this process or by several trainers; with graph.memory, in the partitions that fit it; with
    graph.size, by its sizes.

    Raises DataError (no graph), RecipeError (too little memory, too few partitions, another graph.start).
    """
    from puna.graph.graph import Graph

    graph, loaded = Graph.open(loaded.recipe.data.path), with_sizes(loaded)
    if loaded.recipe.graph.memory:
        loaded = within_memory(loaded, graph)
    trainers = num_trainers(loaded.recipe, run)
    if trainers:
        loaded = over_trainers(loaded, trainers)
        refuse_whole_types(loaded.recipe, graph)
    recipe = loaded.recipe
    if rank == 0:
        with hold_lock(run):
            refuse_other_run(loaded, run)
            write_recipe(loaded, run)
    if not trainers:
        graph_alone(recipe, run)
    elif "RANK" in os.environ:
        graph_role(recipe, run)
    else:
        roles = {"server": 1, "trainer": trainers}
        config = recipe.run
        launch("puna.run:graph_rank", [str(run)], roles, run, config.num_threads, config.max_restarts, {"trainer"})


def num_trainers(recipe: Recipe, run: Path) -> int:
    """Trainers of a graph run; 0: this process trains alone.

    Under torchrun all ranks but the first. What several trainers have begun goes on in their way.
    """
    if "RANK" in os.environ:
        return count_ranks(recipe) - 1
    begun = latest(run)
    several = recipe.run.num_processes > 1 or (begun is not None and "done" in begun.json)
    return recipe.run.num_processes if several else 0


def over_trainers(loaded: Loaded, trainers: int) -> Loaded:
    """The recipe with two partitions a trainer, where it has one. Raises RecipeError where it has too few."""
    parts, least = loaded.recipe.graph.num_partitions, 2 * trainers
    if trainers == 1 or parts >= least:
        return loaded
    if parts > 1:
        raise RecipeError(
            f"graph.num_partitions is {parts}, but {trainers} trainers need {least}: each trains two at a time",
            f"Set graph.num_partitions to {least} or more, or train by {parts // 2} (run.num_processes).",
        )
    err.print(f"{least} partitions for {trainers} trainers", markup=False, soft_wrap=True)
    return recipes.laid_over(loaded, {"graph.num_partitions": least}, "run.num_processes")


def refuse_whole_types(recipe: Recipe, graph: Any) -> None:
    """Raises RecipeError where a type is not cut: its vectors would be in every trainer's buckets at once."""
    from puna.graph.layout import Layout

    whole = Layout.of(recipe.graph, graph.types).whole
    named = [kind.name for kind, one in zip(graph.types, whole, strict=True) if one]
    if named:
        raise RecipeError(
            f"nodes of the type {', '.join(named)} are not cut into partitions; several processes cannot share them",
            "Train by one process (run.num_processes 1), or leave the type out of graph.unpartitioned; "
            "bags of features are never cut.",
        )


def graph_alone(recipe: Recipe, run: Path) -> None:
    """Train a graph in this process."""
    from puna.graph.task import GraphTask

    with open_mesh(recipe.run, recipe.mesh) as place, watch(run, recipe.run):
        job, options = graph_job(recipe, run)
        task = GraphTask(*job, **options)
        facts = {"mesh": str(place), "dtype": "float32", "dtype_reason": "graphs are trained in float32"}
        Run(task, run, recipe, facts=facts).go()


def graph_job(recipe: Recipe, run: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a graph's task is made of, the same for one process, a server and a trainer."""
    from puna.graph.graph import Graph
    from puna.graph.trained import begin_with

    graph, start = Graph.open(recipe.data.path), None
    if recipe.graph.start:
        theirs = Path(recipe.graph.start)
        start = begin_with(theirs, graph_run(theirs).graph, recipe.graph, graph)
    options = {"seed": recipe.run.seed, "num_threads": recipe.run.num_threads, "eval_edges": recipe.eval.tokens}
    return (recipe.graph, recipe.schedule, graph, run), options | {"start": start}


def graph_rank(directory: str) -> None:
    """What every process does that `train` launches for a graph."""
    graph_role(recipes.load(directory).recipe, Path(directory))


AGREED = ("graph.", "schedule.", "run.seed")
"""Settings of a graph run in which its processes must agree; where data and run are may differ between machines."""


def graph_role(recipe: Recipe, run: Path) -> None:
    """Rank 0 serves, the others train; each is a process group of its own."""
    from puna.graph.graph import Graph
    from puna.graph.links import Meeting
    from puna.graph.serving import GraphServer
    from puna.graph.trainer import Trainer
    from puna.graph.trainer import train as train_as_told

    meeting, trainers = Meeting.from_environment(), count_ranks(recipe) - 1
    threads = recipe.run.num_threads or threads_of_a_trainer()
    for name in ("RANK", "WORLD_SIZE", "PUNA_STORE"):
        os.environ.pop(name, None)
    graph = Graph.open(recipe.data.path)
    agreed = {key: value for key, value in recipes.flat(recipe).items() if key.startswith(AGREED)}
    agreed |= code_version() | {name: entry["sha256"] for name, entry in graph.files.items()}
    if meeting.rank:
        with tempfile.TemporaryDirectory(prefix="puna-") as scratch:  # only the server writes the run directory

            def make() -> Trainer:
                job, options = graph_job(recipe, Path(scratch))
                return Trainer(*job, **(options | {"num_threads": threads, "eval_edges": 0}))

            train_as_told(meeting, agreed, graph.folder, make)
        return
    with open_mesh(recipe.run, recipe.mesh) as place, watch(run, recipe.run):
        job, options = graph_job(recipe, run)
        task = GraphServer(meeting, agreed, *job, **options)
        facts = {"mesh": f"a server and {trainers} trainers, {place.device.type}", "num_trainers": trainers}
        facts |= {"dtype": "float32", "dtype_reason": "graphs are trained in float32"}
        with task.serving():
            Run(task, run, recipe, facts=facts).go()


def threads_of_a_trainer() -> int:
    """The cores of this machine, divided by the trainers on it."""
    serves = os.environ.get("GROUP_RANK", "0") == "0"
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - serves))


def train_dlrm(loaded: Loaded, run: Path, rank: int) -> None:
    """Train a recommendation model, on as many local processes as the recipe asks for. Raises DataError (no clicks)."""
    from puna.recsys.clicks import Clicks

    config = loaded.recipe.run
    if rank == 0:
        Clicks.open(loaded.recipe.data.path)
        with hold_lock(run):
            refuse_other_run(loaded, run)
            write_recipe(loaded, run)
    if "RANK" in os.environ:
        dlrm_rank(str(run))
    else:
        launch("puna.run:dlrm_rank", [str(run)], config.num_processes, run, config.num_threads, config.max_restarts)


def dlrm_rank(directory: str) -> None:
    """One rank's part of a run of a recommendation model."""
    from puna.recsys.clicks import Clicks
    from puna.recsys.task import DlrmTask

    run = Path(directory)
    recipe = recipes.load(directory).recipe
    clicks = Clicks.open(recipe.data.path)
    agree = partial(require_same, run, recipes.flat(recipe) | code_version() | clicks.version(), "at the start")
    with open_mesh(recipe.run, recipe.mesh, agree) as place, watch(run, recipe.run):
        if place.device.type != "cpu":
            raise DeviceError("recommendation models train on CPUs", "Set run.device to cpu.")
        task = DlrmTask(
            recipe.dlrm,
            recipe.exchange,
            recipe.schedule,
            clicks,
            run,
            seed=recipe.run.seed,
            eval_samples=recipe.eval.tokens,
        )
        reason = f"dlrm.dtype is {recipe.dlrm.dtype}"
        Run(task, run, recipe, facts={"mesh": str(place), "dtype": recipe.dlrm.dtype, "dtype_reason": reason}).go()


def within_memory(loaded: Loaded, graph: Any) -> Loaded:
    """The recipe with partitions, buffer and order by graph.memory, told on stderr. Raises RecipeError."""
    from puna.graph import budget
    from puna.graph.task import num_workers

    recipe, sizes = loaded.recipe, budget.Sizes.of(graph)
    job = sizes, num_workers(recipe.graph, recipe.run.num_threads), recipe.eval.tokens > 0
    found = budget.fitted(recipe.graph, *job)
    err.print(budget.sentence(budget.plan(found, *job), found.memory), markup=False, soft_wrap=True)
    derived = found.model_dump(include=set(budget.DERIVED))
    return recipes.laid_over(loaded, {f"graph.{key}": value for key, value in derived.items()}, "memory")


def graph_run(run: Path) -> Recipe:
    """The recipe of a graph run. Raises CheckpointError where `run` holds none."""
    if not (run / "recipe.toml").is_file():
        raise CheckpointError(f"{run} holds no run", "Give a folder that `puna train` has written.")
    recipe = recipes.load(run).recipe
    if recipe.task != "graph":
        raise CheckpointError(f"{run} holds a run of task {recipe.task}", "Give the folder of a graph run.")
    return recipe


def migrate_graph(config: Path, out: Path, root: Path) -> dict[str, Any]:
    """PyTorch-BigGraph's configuration, with the files it names, as OUT/recipe.toml, OUT/graph and OUT/run.

    Returns out, num_nodes, num_relations, types (nodes of each), edges by split, checkpoint (None where there is none),
    left_out (keys that have no counterpart). Raises DataError.
    """
    from puna.graph import pbg

    if out.exists():
        raise DataError(f"{out} is already there", "Name another folder with --out.")
    raw = pbg.read_config(config)
    found = pbg.convert(raw, config)
    values = {key: json.dumps(v) if isinstance(v, list) else str(v).lower() for key, v in found.settings.items()}
    words = [f"--graph.{key}={value}" for key, value in values.items()]
    words += [f"--data.path={out / 'graph'}", f"--run.dir={out / 'run'}", "--schedule.decay=constant"]
    loaded = recipes.load("social", words)
    edges = pbg.splits_of(raw["edge_paths"], root)
    graph = pbg.import_graph(found, root / raw["entity_path"], edges, out / "graph")
    write_atomic(out / "recipe.toml", loaded.text.encode())
    told, folder = None, root / raw["checkpoint_path"]
    if (folder / "checkpoint_version.txt").is_file():
        told = pbg.import_checkpoint(found, folder, graph, loaded.recipe.graph, out / "run")
        write_recipe(loaded, out / "run")
    return {
        "out": str(out),
        "num_nodes": graph.num_nodes,
        "num_relations": graph.num_relations,
        "types": {kind.name: kind.num_nodes for kind in graph.types},
        "edges": {split: facts["edges"] for split, facts in graph.splits.items()},
        "checkpoint": told,
        "left_out": found.left_out,
    }


def write_recipe(loaded: Loaded, run: Path) -> None:
    """What a run directory keeps of what it was made by."""
    write_atomic(run / "recipe.toml", loaded.text.encode())
    write_atomic(run / "recipe.json", recipes.to_json(loaded).encode())
    write_atomic(run / "versions.json", json.dumps(versions(), indent=1).encode())


def refuse_other_run(loaded: Loaded, run: Path) -> None:
    """Raise RecipeError where `run` holds checkpoints of a recipe that computes something else."""
    if not (run / "recipe.toml").is_file() or not complete_steps(run):
        return
    kept, wanted = (recipes.flat(other.recipe) for other in (recipes.load(run), loaded))
    changed = [
        key
        for key in wanted
        if kept.get(key) != wanted[key] and (key == "run.seed" or not key.startswith(FREE_TO_CHANGE))
    ]
    if changed:
        told = "; ".join(f"{key} is {kept.get(key)!r} there, {wanted[key]!r} here" for key in changed[:4])
        raise RecipeError(
            f"{run} holds a run of another recipe: {told}",
            "Give the same values to resume it, or another folder with --run.dir.",
        )


def work(directory: str) -> None:
    """What every process that `train` launches does."""
    train_ranks(recipes.load(directory).recipe, Path(directory))


def train_ranks(recipe: Recipe, run: Path) -> None:
    """One rank's part of a run."""
    common = recipes.flat(recipe) | code_version() | data_version(recipe)
    agree = partial(require_same, run, common, "at the start")
    with open_mesh(recipe.run, recipe.mesh, agree) as place, watch(run, recipe.run), explained(recipe, run, place):
        recipes.check_ranks(recipe, place.world_size)
        compute = choose_compute(recipe.train.dtype, place.device)
        if compute.dtype == torch.float16 and place.device.type == "cpu":
            raise DeviceError(
                "train.dtype is fp16 but the device is a CPU, which has no fast fp16", "Use auto, fp32 or bf16."
            )
        facts = {"mesh": str(place), "dtype": str(compute.dtype).removeprefix("torch."), "dtype_reason": compute.reason}
        if place.rank == 0:
            err.print(f"{place}  {facts['dtype']} ({compute.reason})", markup=False, soft_wrap=True)
        task = Pretrain(
            recipe.model,
            recipe.data,
            recipe.train,
            recipe.schedule,
            recipe.mesh,
            recipe.eval,
            recipe.run.seed,
            place,
            compute,
            recipe.health,
        )
        prediction = predict(recipe, place, compute)
        Run(task, run, recipe, facts=facts, peak_flops=compute.peak_flops, prediction=prediction).go()


def data_version(recipe: Recipe) -> dict[str, str]:
    """A hash of what each folder of token shards says of itself: copies on several machines must be the same."""
    files = [Path(folder) / "shards.json" for folder, _ in recipe.data.mixture()]
    return {str(file): sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "missing" for file in files}


def outcome(run: Path) -> dict[str, Any]:
    """The figures of a run that has ended, from its records."""
    events = read_events(run)
    steps = last_steps(events)
    if not steps:
        raise CheckpointError(f"{run} has no record of a step", "Train with `puna train RECIPE --run.dir DIR`.")
    last = steps[max(steps)]
    heldout = [event["loss"] for event in events if event["event"] == "eval" and "loss" in event]
    last_eval: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "eval"), {})
    resumes = [event["step"] for event in events if event["event"] == "resume"]
    return {
        "run": str(run),
        "steps": last["step"],
        "tokens": last["tokens"],
        "loss": last["loss"],
        "heldout_loss": heldout[-1] if heldout else None,
        **{f"heldout_{name}": last_eval[name] for name in ("mrr", "auc", "ne", "calibration") if name in last_eval},
        "tokens_per_s": statistics.median(step["tokens_per_s"] for step in steps.values()),
        "resumed_from": resumes[-1] if resumes else None,
    }


def export(
    path: Path, out: Path, step: int | None = None, dtype: str | None = None, check: bool = False
) -> dict[str, Any]:
    """Write a checkpoint as a Hugging Face folder; with `check`, hold it against the checkpoint in transformers.

    Returns out, step, num_parameters, num_bytes, and with check what `puna.evals.parity.compare` returns.
    Raises CheckpointError where the checkpoint is missing or `out` holds files.
    """
    if complete_steps(path) and step is None:
        step = complete_steps(path)[-1]
    loaded = hub.load(path, step=step)
    if loaded.tokenizer_dir is None:
        raise CheckpointError(f"{path} has no tokenizer", "Put its tokenizer.json or tokenizer.model there.")
    tokenizer = Tokenizer.load(loaded.tokenizer_dir)
    stored = str(loaded.model.head.dtype).removeprefix("torch.")
    verify_identity(path, loaded.tokenizer_dir, tokenizer, stored)
    with tempfile.TemporaryDirectory() as forms:
        tokenizer.to_hf(Path(forms))
        written = str(DTYPES[dtype]).removeprefix("torch.") if dtype else stored
        write_identity(Path(forms), Tokenizer.load(forms), written)
        hub.save(
            loaded.model.state_dict(),
            loaded.config,
            out,
            tokenizer_dir=forms,
            bos=tokenizer.bos,
            eos=sorted(tokenizer.stop_ids),
            dtype=DTYPES[dtype] if dtype else None,
        )
    result: dict[str, Any] = {
        "out": str(out),
        "step": step,
        "num_parameters": loaded.config.num_parameters,
        "num_bytes": sum(file.stat().st_size for file in out.iterdir()),
    }
    if check:
        from puna.evals.parity import compare

        result |= compare(loaded.model, tokenizer, out, PROMPTS)
    return result


PROMPTS = [
    "import os\n\n\ndef ",
    "class Error(Exception):\n    ",
    "The quick brown fox",
    "for i in range(10):\n    print(",
]
"""Texts that an exported folder is compared on."""


def versions() -> dict[str, Any]:
    """What a figure of this run depends on besides the recipe."""
    return {
        "puna": puna.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_cores": len(os.sched_getaffinity(0)),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
