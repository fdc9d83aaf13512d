"""`puna plan`: parse, call one function, print. What it needs is imported inside the verbs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from puna.verbs import RECIPE_ARGUMENTS, as_json, memory, print_figures, recipe_name, settings, size, with_options

csv_file = click.argument("file", metavar="FILE.csv", type=click.Path(path_type=Path))


def finite(context: Any, parameter: Any, value: float | None) -> float | None:
    """A click callback that refuses what is no number."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number")
    return value


def job_options(command: Any) -> Any:
    """The options that name a job: what is trained, on what."""
    for option in (
        click.option("--network", type=click.FloatRange(min=0), callback=finite, help="Gb/s between nodes of one GPU."),
        click.option("--batch-tokens", type=click.IntRange(1), help="Tokens of one optimiser step."),
        click.option("--seq-len", type=click.IntRange(1), help="Tokens of a sequence."),
        click.option("--gpus", required=True, type=int, help="Devices."),
        click.option("--gpu", required=True, help="Accelerator or cluster; see `puna plan hardware`."),
        click.option("--model", help="A model by name, such as llama3-405b."),
        click.argument("recipe", required=False),
    ):
        command = option(command)
    return command


@click.group()
def plan() -> None:
    """What a run will cost, before it runs, with an error bar.

    \b
    Example:  puna plan search --model llama3-405b --gpu h100-sxm --gpus 16384
              puna plan estimate llama3-8b --gpu a100-80 --gpus 64 --tp 2
              puna plan graph social --data.path graph --memory 4GB
    """


@plan.command()
@job_options
@click.option("--dp", type=int, help="Data-parallel ranks; what remains where not given.")
@click.option("--tp", type=int, help="Tensor-parallel ranks.")
@click.option("--pp", type=int, help="Pipeline stages.")
@click.option("--vp", type=int, help="Chunks of the model in each stage.")
@click.option("--cp", type=int, help="Context-parallel ranks.")
@click.option("--micro-batch", type=int, help="Sequences of one forward.")
@click.option(
    "--sharding",
    type=click.Choice(["none", "zero1", "zero2", "zero3", "hsdp"]),
    help="What is sharded over the data-parallel ranks; hsdp: everything, within a node.",
)
@click.option("--recompute", type=click.Choice(["none", "selective", "full"]), help="What is recomputed in backward.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4"]),
    help="Number format of the matrix products.",
)
@click.option("--frozen", is_flag=True, help="The decoder's own weights are not trained: adapters, or its sight, are.")
@click.option(
    "--stack",
    type=click.Choice(["pytorch-eager", "pytorch-compiled", "megatron", "jax-xla", "oneflow"]),
    help="What runs it; decides its pointwise kernels.",
)
@as_json
def estimate(
    recipe: str | None, model: str | None, gpu: str, gpus: int, seq_len: int | None, batch_tokens: int | None,
    network: float | None, as_json: bool, **changes: Any,
) -> None:  # fmt: skip
    """Step time by part, memory by kind, power, money and goodput of one layout.

    RECIPE is a name from `puna recipe list` or a file; or give --model.

    \b
    Example:  puna plan estimate --model llama2-7b --gpu h100-sxm --gpus 128 --sharding zero3 --json
    """
    from puna.plan.constants import load
    from puna.plan.describe import describe
    from puna.plan.fits import gap, remedies, sentence, shortfall
    from puna.plan.job import build
    from puna.plan.local import overlay

    shape, cluster, base = _job(recipe, model, gpu, gpus, seq_len, batch_tokens, network)
    case = build(shape, cluster, base, changes)
    figures = describe(case, load())
    found = _here_of(recipe, case) if recipe else None
    if found:
        figures = overlay(figures, found)
    if not figures["fits"]:
        need = {kind: size for kind, size in figures["memory_gb"].items() if kind not in ("total", "capacity")}
        figures["shortfall"] = gap(need, figures["memory_gb"]["capacity"]) if found else shortfall(case)
        figures["remedies"] = remedies(case, load())
    print_figures(figures, as_json)
    if not figures["fits"] and not as_json:
        click.echo(sentence(figures["shortfall"], figures["remedies"]))


@plan.command()
@job_options
@click.option(
    "--precision",
    multiple=True,
    type=click.Choice(["fp32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4"]),
    help="Formats to try; several times.  [default: the recipe's, else bf16]",
)
@click.option("--trainable", is_flag=True, help="Only what this package trains: no tensor, pipeline or context axis.")
@click.option("--emit", type=click.Path(path_type=Path), help="Write the best as a recipe to run; implies --trainable.")
@as_json
def search(
    recipe: str | None, model: str | None, gpu: str, gpus: int, seq_len: int | None, batch_tokens: int | None,
    network: float | None, precision: tuple[str, ...], trainable: bool, emit: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """The fastest layout that fits, the runner-up, what binds, and what would flip the choice.

    \b
    Example:  puna plan search --model llama3-405b --gpu h100-sxm --gpus 16384 --json
    """
    from puna.plan import hardware, job, output
    from puna.plan.constants import load
    from puna.plan.fits import sentence
    from puna.plan.layout import Layout
    from puna.plan.search import lines, report

    shape, cluster, base = _job(recipe, model, gpu, gpus, seq_len, batch_tokens, network)
    allowed = _emits(recipe or model or "") if emit else job.trainable if trainable else lambda layout: True
    figures = report(shape, cluster, base, load(), precision or (base.precision,), allowed)
    if emit and figures["fits"]:
        source = Path(recipe or model or "")
        best, here = Layout(**figures["best"]["layout"]), min(gpus, cluster.gpus_per_node)
        if cluster.gpu.name == hardware.THIS_MACHINE:
            here = gpus
        output.write(emit, job.emit(str(source.resolve() if source.exists() else source), best, here))
    if as_json:
        click.echo(json.dumps(figures))
    elif figures["fits"]:
        click.echo("\n".join(lines(figures)))
    else:
        click.echo(sentence(figures["shortfall"], figures["remedies"]))


@plan.command()
@click.option("--model", required=True, help="A model by name, such as llama2-7b.")
@click.option("--gpu", required=True, help="Accelerator or cluster; see `puna plan hardware`.")
@click.option("--gpus", "sizes", default="8,32,128,256,512,1024,2048", show_default=True, help="Numbers of devices.")
@click.option("--batch", type=click.IntRange(1), help="Sequences of the batch of strong scaling.")
@click.option("--out", type=click.Path(path_type=Path), help="Page or picture to write: .html or .png.")
@as_json
def sweep(model: str, gpu: str, sizes: str, batch: int | None, out: Path | None, as_json: bool) -> None:
    """Weak and strong scaling, exposed communication, tokens a joule and the best layout by number of devices.

    \b
    Example:  puna plan sweep --model llama2-7b --gpu h100-sxm --out scaling.html
    """
    from puna.plan import hardware, job
    from puna.plan import sweep as scaling
    from puna.plan.constants import load
    from puna.plan.workload import PlanError

    if not all(word.strip().isdecimal() for word in sizes.split(",")):
        raise PlanError(f"--gpus {sizes!r} is no list of whole numbers", "Give numbers of devices, such as 8,64,512.")
    counts = [int(word) for word in sizes.split(",")]
    shape = job.by_name(model)
    base = job.usual_layout(shape, hardware.cluster(gpu, max(counts)), None, None)
    found = scaling.sweep(shape, gpu, counts, base, load(), batch)
    if out:
        scaling.write(shape, gpu, found, out)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, rows in found.items():
        for row in rows:
            click.echo(
                f"{name:<7} {row['gpus']:>6} GPUs  mfu {row['mfu']:.3f}  exposed {row['exposed']:.2f}  "
                f"{row['tokens_per_s_per_gpu']:.0f} tokens/s/GPU  tp {row['tp']} pp {row['pp']} cp {row['cp']}"
            )


@plan.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--gpu", default="this-machine", show_default=True, help="What it ran on; `puna doctor` names this.")
@click.option("--gpus", type=int, help="Devices; the run's own processes where not given.")
@as_json
def compare(run: Path, gpu: str, gpus: int | None, as_json: bool) -> None:
    """A run's step time and memory beside what is predicted for it.

    \b
    Example:  puna plan compare runs/mine --json
    """
    from puna.plan import compare as comparison
    from puna.plan import hardware, job
    from puna.plan.constants import load as constants
    from puna.recipe import load

    recipe = load(str(run), ()).recipe
    cluster = hardware.cluster(gpu, gpus or recipe.run.num_processes)
    shape, base = job.of_recipe(recipe.model, recipe.train, recipe.mesh, cluster)
    case = job.build(shape, cluster, base, {})
    figures = comparison.compare(case, run, constants(), _here(recipe, case))
    print_figures(figures, as_json)


@plan.command()
@csv_file
@click.option("--predictions", type=click.Path(path_type=Path), help="CSV to write: id, predicted_s, low_s, high_s.")
@click.option(
    "--kind",
    multiple=True,
    default=("dense",),
    show_default=True,
    type=click.Choice(["dense", "lora", "moe"]),
    help="Rows to attempt, by their column `kind`; several times.",
)
@as_json
def validate(file: Path, predictions: Path | None, kind: tuple[str, ...], as_json: bool) -> None:
    """Errors on published runs: predicted over measured iteration time.

    \b
    Example:  puna plan validate runs.csv --json --predictions out.csv
    """
    from puna.plan import validate as validation
    from puna.plan.constants import load
    from puna.plan.runs import read

    found = read(file, kind)
    for line in found.broken:
        click.echo(f"left out: {line}", err=True)
    figures, rows = validation.validate(found, load())
    if predictions:
        validation.write_predictions(rows, predictions)
    print_figures(figures, as_json)


@plan.command()
@csv_file
@click.option("--draws", default=12, show_default=True, type=click.IntRange(0), help="Bootstrap draws of the sources.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write; the one that ships where not given.")
@as_json
def fit(file: Path, draws: int, out: Path | None, as_json: bool) -> None:
    """Fit the constants to published runs; errors are those on sources left out. Takes some ten minutes.

    \b
    Example:  puna plan fit runs.csv --out constants.json
    """
    from puna.plan import constants
    from puna.plan.fit import fit_all
    from puna.plan.runs import read
    from puna.plan.validate import left_out
    from puna.plan.workload import PlanError

    runs = read(file).runs
    if len({run.source for run in runs}) < 2:
        raise PlanError(f"{file} holds no source to leave out and another to fit", "Give runs of at least two sources.")
    fitted, predicted = fit_all(runs, draws)
    figures = left_out(runs, fitted, predicted)
    constants.save(fitted, out or constants.FILE, num_runs=len(runs), leave_one_source_out=figures)
    print_figures({"leave_one_source_out": figures, "constants": fitted.confidence()}, as_json)


@plan.command()
@click.argument("name", required=False)
@as_json
def hardware(name: str | None, as_json: bool) -> None:
    """Accelerators and clusters with the sources of their figures; your own TOML files are read too.

    \b
    Example:  puna plan hardware h100-sxm --json
    """
    from dataclasses import asdict

    from puna.plan import hardware as table

    if name or as_json:
        gpus = [table.find(name)] if name else list(table.gpus().values())
        figures = {gpu.name: asdict(gpu) for gpu in gpus}
        print_figures(figures if name else {"gpus": figures, "clusters": table.clusters()}, as_json)
        return
    click.echo(f"{'name':<16}{'TFLOPS bf16':>12}{'GB':>6}{'TB/s':>7}{'link GB/s':>11}{'net Gb/s':>10}{'W':>6}")
    for gpu in table.gpus().values():
        peak = gpu.flops.get("bf16", 0)
        click.echo(
            f"{gpu.name:<16}{peak:>12.0f}{gpu.memory:>6.0f}{gpu.bandwidth:>7.2f}{gpu.link:>11.0f}{gpu.network:>10.1f}"
            f"{gpu.power:>6.0f}"
        )
    click.echo(f"clusters: {', '.join(table.clusters())}; your own: {table.user_folder()}/*.toml")


@plan.command("graph", context_settings=RECIPE_ARGUMENTS)
@recipe_name
@settings
@memory
@size
@as_json
def plan_graph(recipe: str, overrides: tuple[str, ...], memory: str | None, size: str | None, as_json: bool) -> None:
    """Partitions, their order, memory by use and disk traffic of a graph recipe.

    With --memory the partitions are those that fit it, and `puna train` with the same flags trains in them; with --size
    auto settings follow from the graph.

    \b
    Example:  puna plan graph social --data.path graph --memory 4GB --json
    """
    from puna.recipe import load

    loaded = load(recipe, with_options(overrides, memory, size))
    from puna.check import check
    from puna.plan.workload import PlanError

    if loaded.recipe.task != "graph":
        raise PlanError(f"{recipe} is a recipe of task {loaded.recipe.task}", "Name a graph recipe, such as social.")
    figures = check(loaded)
    print_figures({key: value for key, value in figures.items() if key not in ("run", "task", "samples")}, as_json)


def _emits(name: str) -> Callable[[Any], bool]:
    """Whether a layout is trainable and divides every stage of a recipe. Raises RecipeError where there is none."""
    from puna.errors import RecipeError
    from puna.plan import job
    from puna.recipe import check_ranks, load

    recipe = load(name, ()).recipe

    def allowed(layout: Any) -> bool:
        sizes = {"batch_tokens": layout.global_batch * layout.seq_len, "seq_len": layout.seq_len}
        train = recipe.train.model_copy(update=sizes | {"micro_batch": layout.micro_batch})
        try:
            check_ranks(recipe.model_copy(update={"train": train}), layout.dp)
        except RecipeError:
            return False
        return job.trainable(layout)

    return allowed


def _here_of(name: str, case: Any) -> dict[str, Any] | None:
    """See `_here`, for a recipe by its name or file."""
    from puna.recipe import load

    return _here(load(name, ()).recipe, case)


def _here(recipe: Any, case: Any) -> dict[str, Any] | None:
    """What the kernels timed on this machine say of a recipe laid out as `case`; None where they do not cover it."""
    from puna.plan.local import here

    return here(
        case, recipe.model, recipe.train, recipe.mesh, recipe.data, num_threads=recipe.run.num_threads,
        averages=recipe.schedule.average != "none",
    )  # fmt: skip


def _job(
    recipe: str | None, model: str | None, gpu: str, gpus: int, seq_len: int | None, batch_tokens: int | None,
    network: float | None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Shape, cluster and layout that options and a recipe name."""
    from dataclasses import replace

    from puna.plan import hardware, job
    from puna.plan.workload import PlanError

    if (recipe is None) == (model is None):
        raise PlanError("a job needs a recipe or --model, and not both", "Name one of them.")
    cluster = hardware.cluster(gpu, gpus)
    if network is not None:
        cluster = replace(cluster, network=network)
    if model is not None:
        shape = job.by_name(model)
        return shape, cluster, job.usual_layout(shape, cluster, seq_len, batch_tokens)
    from puna.recipe import load

    loaded = load(recipe or "", ()).recipe
    if loaded.task == "graph":
        raise PlanError(
            f"{recipe} trains a graph", f"See what it takes with `puna plan graph {recipe} --data.path DIR`."
        )
    shape, base = job.of_recipe(loaded.model, loaded.train, loaded.mesh, cluster)
    seq_len = seq_len or base.seq_len
    tokens = batch_tokens or base.global_batch * base.seq_len
    return shape, cluster, replace(base, seq_len=seq_len, global_batch=max(1, tokens // seq_len))
