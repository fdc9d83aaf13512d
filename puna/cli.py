"""The front door: `puna <verb>` parses, calls one function, prints. Rooms are imported inside their verbs, so that
`puna --help` and `puna recipe` start quickly and need no torch."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from puna import __version__
from puna.clicks_verbs import VERBS as CLICKS_VERBS
from puna.clicks_verbs import plan_exchange
from puna.errors import PunaError
from puna.graph_verbs import graph
from puna.health_verbs import health
from puna.plan_verbs import plan
from puna.recipe_verbs import recipe
from puna.recsys_verbs import recsys
from puna.verbs import RECIPE_ARGUMENTS, as_json, memory, print_figures, recipe_name, settings, size, with_options

EXTRAS = {
    "data": ("tokenizers", "trafilatura", "pyarrow", "backports"),
    "train": ("torch", "safetensors", "tiktoken", "sentencepiece", "tensorboard"),
    "serve": ("fastapi", "uvicorn"),
    "demo": ("transformers", "openai"),
    "ray": ("ray",),
    "plot": ("matplotlib",),
    "graph": ("numba",),
    "recsys": ("numba",),
    "pbg": ("h5py",),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="puna")
def puna() -> None:
    """Raise Llama models: from files to token shards, to a trained checkpoint, to answers over HTTP.

    Start with `puna demo`, or read `puna recipe list`. Set PUNA_DEBUG=1 to see the trace behind an error.
    """


def main() -> None:
    """Run the command line; the status is 0, a PunaError's exit_code, 1 or 2 for click's own, 130 after Ctrl-C."""
    sys.exit(_status())


def _status() -> int:
    try:
        return puna.main(prog_name="puna", standalone_mode=False) or 0
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PunaError as error:
        return _tell(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        return _tell(_missing(error), 2)
    except OSError as error:
        if error.filename is None:
            raise
        return _tell(f"{error.filename}: {error.strerror}", 1)


def _tell(sentence: str, status: int) -> int:
    if os.environ.get("PUNA_DEBUG") == "1":
        traceback.print_exc()
    click.echo(f"error: {sentence}", err=True)
    return status


def _missing(error: ModuleNotFoundError) -> str:
    """One sentence on the extra that holds a missing module; a module that no extra holds is a defect and raises."""
    top = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if top in modules:
            return f"this command needs {top}, which is not installed. Run: pip install 'puna[{extra}]'"
    raise error


# --- the main job ---------------------------------------------------------------------------------------------------


@puna.command()
@click.option("--minutes", default=9.0, show_default=True, type=click.FloatRange(min=1), help="Time for the whole job.")
@click.option("--dir", "directory", default="runs/demo", show_default=True, type=click.Path(path_type=Path))
@as_json
def demo(minutes: float, directory: Path, as_json: bool) -> None:
    """The main job, end to end on this machine.

    Files, tokenizer, training, evaluation, export, answers, report.

    \b
    Example:  puna demo --minutes 30 --dir runs/long
    """
    from puna.demo import main

    print_figures(main(directory, minutes), as_json)


@puna.command()
@click.option(
    "--write",
    is_flag=False,
    flag_value="",
    default="",
    metavar="[FILE]",
    help="Where the planner's entry of this machine goes  [default: ~/.config/puna/hardware/this-machine.toml]",
)
@click.option("--no-write", is_flag=True, help="Leave the planner's entry as it is.")
@as_json
def doctor(write: str, no_write: bool, as_json: bool) -> int:
    """What this machine is, how fast, and what ails it.

    Measures matrices, memory, the trainer's kernels, disk and the exchange between two processes, in some 45 seconds;
    names what is slow or missing and the command that mends it; keeps the figures for `puna plan`. The exit code is 0
    unless something cannot work: then it is 1.

    \b
    Example:  puna doctor --json
    """
    from puna.doctor.examine import examine, text
    from puna.train.hardware import default_path

    report = examine(None if no_write else Path(write) if write else default_path())
    click.echo(json.dumps(report) if as_json else text(report))
    return 0 if report["healthy"] else 1


# --- corpus ---------------------------------------------------------------------------------------------------------


@puna.group()
def corpus() -> None:
    """From files to token shards: build, tokenizer, tokenize.

    \b
    Example:  puna corpus build --source notes/ --out corpus
              puna corpus tokenizer corpus --vocab-size 8192 --out tokenizer.json
              puna corpus tokenize corpus --tokenizer tokenizer.json --out shards
    """


@corpus.command("build")
@click.option(
    "--source",
    required=True,
    help="A file or folder of text, code, JSON lines, parquet, HTML or WARC, or `stdlib`: this Python's own library.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--heldout", default=0.05, show_default=True, help="Share of the bytes kept for evaluation.")
@click.option(
    "--near", default=0.8, show_default=True, help="Jaccard similarity of near duplicates; 0: only exact ones."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the split.")
@as_json
def corpus_build(source: str, out: Path, heldout: float, near: float, seed: int, as_json: bool) -> None:
    """Read, filter, deduplicate and split documents.

    The split is into train and held-out, with nothing close to a held-out document in train.

    \b
    Example:  puna corpus build --source stdlib --out corpus
    """
    from puna.corpus.build import build_corpus

    print_figures(build_corpus(source, out, heldout, near, seed), as_json)


@corpus.command("tokenizer")
@click.argument("folder", metavar="CORPUS", type=click.Path(path_type=Path))
@click.option("--vocab-size", required=True, type=int, help="Tokens, special ones included.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@as_json
def corpus_tokenizer(folder: Path, vocab_size: int, out: Path, as_json: bool) -> None:
    """Train a byte-level BPE tokenizer.

    It has Llama 3's pattern and special tokens.

    \b
    Example:  puna corpus tokenizer corpus --vocab-size 4096 --out tokenizer.json
    """
    from puna.corpus.bpe import train_tokenizer

    print_figures(train_tokenizer(folder, vocab_size, out), as_json)


@corpus.command("tokenize")
@click.argument("folder", metavar="CORPUS", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="Tokenizer file or folder.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of token shards to write.")
@as_json
def corpus_tokenize(folder: Path, tokenizer: Path, out: Path, as_json: bool) -> None:
    """Write a corpus as memory-mapped token shards.

    \b
    Example:  puna corpus tokenize corpus --tokenizer tokenizer.json --out shards
    """
    from puna.corpus.tokenize import tokenize_corpus

    print_figures(tokenize_corpus(folder, tokenizer, out), as_json)


# --- runs -----------------------------------------------------------------------------------------------------------


@puna.command(context_settings=RECIPE_ARGUMENTS)
@recipe_name
@settings
@memory
@size
@as_json
def train(recipe: str, overrides: tuple[str, ...], memory: str | None, size: str | None, as_json: bool) -> None:
    """Train by a recipe; resumes where the run directory stands.

    RECIPE is a name from `puna recipe list`, a TOML file, or a run directory; `puna recipe reference` lists what a
    flag may set. A graph recipe with --memory is trained in the partitions that fit, and with --size auto by settings
    from its numbers of nodes and edges.

    \b
    Example:  puna train demo --run.dir runs/mine --data.path shards --train.lr 1e-3
              puna train social --data.path graph --memory 4GB
              puna train graph-small --data.path graph --size auto
    """
    from puna.recipe import load

    loaded = load(recipe, with_options(overrides, memory, size))  # before the slow import: a mistake is told at once
    from puna.run import train

    if figures := train(loaded):
        print_figures(figures, as_json)


@puna.command(context_settings=RECIPE_ARGUMENTS)
@click.argument("run", type=click.Path(path_type=Path))
@settings
@click.option("--explain", is_flag=True, help="Say what would be restored, resharded, reset and redone; train nothing.")
@as_json
def resume(run: Path, overrides: tuple[str, ...], explain: bool, as_json: bool) -> None:
    """Go on with a run, by its own recipe.

    RUN is a run directory, wherever it lies now. The exit code is 4 where the steps that were asked for are not done.

    \b
    Example:  puna resume runs/mine --explain --run.num_processes 4
    """
    from puna import resume as verb
    from puna.train.explain import lines

    figures = verb.explain(run, overrides) if explain else verb.resume(run, overrides)
    if explain and not as_json:
        click.echo("\n".join(lines(figures)))
    elif figures:
        print_figures(figures, as_json)


@puna.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=int, help="Only the checkpoint of that step.")
@as_json
def verify(run: Path, step: int | None, as_json: bool) -> int:
    """Read every file of a run's checkpoints and compare hashes.

    Says of each checkpoint that it is ok, or which file is damaged; the exit code is then 2.

    \b
    Example:  puna verify runs/mine --json
    """
    from puna.train.verify import lines, verify_run

    figures = verify_run(run, step)
    click.echo(json.dumps(figures) if as_json else "\n".join(lines(figures)))
    return 0 if figures["ok"] else 2


@puna.command(context_settings=RECIPE_ARGUMENTS)
@recipe_name
@settings
@memory
@size
@as_json
def check(recipe: str, overrides: tuple[str, ...], memory: str | None, size: str | None, as_json: bool) -> None:
    """Say what a run would be, and refuse what would go wrong, before it starts.

    Paths, tokenizer and chat template, shapes, batches, memory of a rank, the share of tokens that train, and three
    decoded samples; of a graph recipe partitions, memory, disk traffic and some edges. `puna train` does the cheap part
    of it by itself.

    \b
    Example:  puna check demo --data.path shards
    """
    from puna.recipe import load

    loaded = load(recipe, with_options(overrides, memory, size))  # before the slow import: a mistake is told at once
    from puna.check import check, show
    from puna.console import out

    found = check(loaded)
    if as_json:
        click.echo(json.dumps(found))
    else:
        show(found, out())


@puna.command(context_settings=RECIPE_ARGUMENTS)
@recipe_name
@settings
@click.option(
    "--on",
    default="torchrun",
    show_default=True,
    type=click.Choice(["torchrun", "slurm", "ray"]),
    help="What starts the ranks.",
)
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1), help="Machines.")
@click.option("--endpoint", default="", metavar="HOST:PORT", help="torchrun: where the machines meet.")
@click.option("--address", default="local", show_default=True, help="ray: a running cluster; local: only this machine.")
@click.option("--gpus", default=0, show_default=True, type=click.IntRange(0), help="slurm: GPUs of a node.")
@click.option("--time", default="", metavar="HH:MM:SS", help="slurm: longest time of the job.")
@click.option("--account", default="", help="slurm: who pays.")
@click.option("--partition", default="", help="slurm: which part of the cluster.")
@click.option("--container", default="", metavar="IMAGE", help="slurm: image to run in (pyxis).")
@click.option("--dry-run", is_flag=True, help="Print the launch line of each node and write nothing.")
@as_json
def launch(
    recipe: str,
    overrides: tuple[str, ...],
    on: str,
    nodes: int,
    endpoint: str,
    address: str,
    gpus: int,
    time: str,
    account: str,
    partition: str,
    container: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train on several machines: by torchrun, Slurm or Ray.

    torchrun runs here, and the same command on the other machines joins it. slurm writes RUN/launch/train.sbatch. ray
    trains on actors of a cluster. All read the same folder of token shards and write the same run directory.

    \b
    Example:  puna launch llama3-8b --on slurm --nodes 4 --gpus 8 --run.num_processes 8 --time 24:00:00
              puna launch demo --nodes 2 --endpoint node1:29400 --dry-run
    """
    from puna import launch as launcher
    from puna.recipe import load
    from puna.train.slurm import Job

    loaded = load(recipe, overrides)
    if on == "slurm":
        figures = launcher.by_slurm(loaded, Job(nodes, gpus, time, account, partition, container), dry_run)
    elif on == "ray":
        figures = launcher.by_ray(loaded, nodes, address, dry_run)
    else:
        figures = launcher.by_torchrun(loaded, nodes, endpoint, dry_run)
    lines = figures.pop("lines", []) if not as_json else []
    print_figures(figures, as_json)
    for line in lines:
        click.echo(line)


@puna.command("eval")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Token shards; the run's own where it has any.")
@click.option("--step", type=int, help="Checkpoint of that step; the newest where not given.")
@click.option("--baselines/--no-baselines", default=True, show_default=True, help="Also gzip, xz and a 5-gram model.")
@as_json
def evaluate(path: Path, data: Path | None, step: int | None, baselines: bool, as_json: bool) -> None:
    """Bits per byte on held-out text.

    PATH is a run directory or a Hugging Face folder.

    \b
    Example:  puna eval runs/mine --json
    """
    from puna.evals.suite import evaluate

    print_figures(evaluate(path, data, step, baselines), as_json)


@puna.command()
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="Texts: one a line, or JSON strings in a .jsonl file.")
@click.option("--step", type=int, help="Checkpoint of that step; the newest where not given.")
@click.option(
    "--dtype",
    default="fp32",
    show_default=True,
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Of the weights and the work; the tolerance goes with it.",
)
@as_json
def parity(ckpt: Path, prompts: Path | None, step: int | None, dtype: str, as_json: bool) -> int:
    """Hold training, decoding and transformers against one another.

    CKPT is a run directory, a Hugging Face folder or a Meta folder. Compared are token ids, the log-probability of
    every token, and greedy continuations. The exit code is 0 if all agree and 1 if not.

    \b
    Example:  puna parity runs/mine --json
    """
    from puna.evals.parity import parity

    figures = parity(ckpt, prompts, dtype, step)
    print_figures(figures, as_json)
    return 0 if figures["passed"] else 1


@puna.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    default="hf",
    show_default=True,
    type=click.Choice(["hf", "meta"]),
    help="hf: Hugging Face folder; meta: params.json and consolidated.0N.pth.",
)
@click.option(
    "--parts", default=1, show_default=True, type=click.IntRange(1, 100), help="Tensor-parallel files (meta only)."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist.")
@click.option("--step", type=int, help="Checkpoint of that step; the newest where not given.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the file; the checkpoint's where not given."
)
@click.option("--check", is_flag=True, help="Load the folder in transformers and compare logits and continuations.")
@as_json
def export(
    run: Path,
    form: str,
    parts: int,
    out: Path,
    step: int | None,
    dtype: str | None,
    check: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint as a folder that other libraries load.

    RUN is a run directory, or a Hugging Face or Meta folder to be written in another form.

    \b
    Example:  puna export runs/mine --to hf --out mine-hf --dtype bf16
              puna export runs/mine --to meta --parts 8 --out mine-meta
    """
    if form == "meta":
        if check:
            raise click.UsageError("--check is for --to hf; check a Meta folder with: puna parity OUT")
        from puna.llama.hub import export_meta

        print_figures(export_meta(run, out, step, dtype, parts), as_json)
        return
    from puna.run import export

    print_figures(export(run, out, step, dtype, check), as_json)


@puna.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN/report.html and print its path.

    The page is self-contained: it can be mailed.

    \b
    Example:  puna report runs/mine
    """
    from puna.report import read, write_report

    if read(run).setting("task") != "graph":
        click.echo(write_report(run))
        return
    from puna.graph.panels import GRAPH_PANELS

    click.echo(write_report(run, GRAPH_PANELS))


# --- answers --------------------------------------------------------------------------------------------------------


@puna.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to bind; 0.0.0.0 opens it to the network."
)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--name", help="Name of the model in /v1/models; the folder's where not given.")
@click.option(
    "--allow-mismatch",
    is_flag=True,
    help="Serve also where tokenizer, chat template or dtype are not those that the checkpoint was made with.",
)
@click.option("--trim", is_flag=True, help="Write chats as Hugging Face's templates do, without space around messages.")
@click.option(
    "--tool-dialect",
    default="json",
    show_default=True,
    type=click.Choice(["json", "function_tag", "python_list"]),
    help="How calls of functions are written in chats.",
)
def serve(
    path: Path, host: str, port: int, name: str | None, allow_mismatch: bool, trim: bool, tool_dialect: Any
) -> None:
    """Answer over HTTP, OpenAI-compatible.

    Serves a run directory or a Hugging Face folder, with a chat page at /.

    \b
    Example:  puna serve runs/mine --port 8000
    """
    from puna.llama.dialog import Style
    from puna.serve.api.server import serve

    serve(path, host, port, name, allow_mismatch, Style(tool_dialect, trim))


@puna.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-tokens", default=128, show_default=True, help="Tokens drawn at most.")
@click.option("--temperature", default=0.6, show_default=True, help="0: always the likeliest token.")
@click.option("--top-p", default=0.9, show_default=True, help="Share of the probability that is drawn from.")
@click.option("--seed", type=int, help="The same seed draws the same text.")
def generate(path: Path, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int | None) -> None:
    """Continue a prompt once, on the terminal, as it is drawn.

    \b
    Example:  puna generate runs/mine --prompt "import os" --temperature 0
    """
    from puna.engine.load import load
    from puna.engine.params import SamplingParams

    generator = load(path)
    tokens = generator.tokenizer.encode(prompt, bos=True)
    for delta in generator.stream([tokens], params=SamplingParams(max_tokens, temperature, top_p, seed)):
        click.echo(delta.text, nl=False)
    click.echo()


# --- instruments ----------------------------------------------------------------------------------------------------


@puna.group()
def lab() -> None:
    """Instruments: what is claimed, counted on this machine.

    \b
    Example:  puna lab fsdp --processes 2
    """


@lab.command("fsdp")
@click.option(
    "--processes",
    multiple=True,
    default=(2, 4),
    show_default=True,
    type=click.IntRange(2),
    help="Local processes; may be given several times.",
)
@click.option("--steps", default=5, show_default=True, type=click.IntRange(1), help="Steps to time in each case.")
@click.option("--simulate", is_flag=True, help="Simulate prefetch and the rate limiter instead; needs no torch.")
@as_json
def lab_fsdp(processes: tuple[int, ...], steps: int, simulate: bool, as_json: bool) -> None:
    """FSDP's collectives, bytes and memory, beside the formulas.

    Trains a small Llama under every sharding strategy on local processes, in about a minute.

    \b
    Example:  puna lab fsdp --processes 2 --json
              puna lab fsdp --simulate
    """
    from puna.lab import show

    if simulate:
        from puna.lab.overlap import overlap

        result, print_tables = overlap(), show.simulated
    else:
        from puna.lab.fsdp import count

        result, print_tables = count(processes, steps), show.counted
    if as_json:
        click.echo(json.dumps(result))
    else:
        print_tables(result)


@lab.command("adam")
@click.argument(
    "experiment", default="injection", type=click.Choice(["injection", "mitigation", "search", "scale", "batch"])
)
@click.option("--seeds", type=click.IntRange(1), help="Seeds of each case; 20 for injection, else 1 to 3.")
@click.option("--data", default="stdlib", show_default=True, help="Text: a file, a folder, or stdlib.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Processes, of one thread each.")
@click.option("--out", default="runs/adam", show_default=True, type=Path, help="Folder of results, a file a run.")
@click.option("--fields", is_flag=True, help="Print the settings that a run has, and nothing else.")
@as_json
def lab_adam(
    experiment: str, seeds: int | None, data: str, workers: int, out: Path, fields: bool, as_json: bool
) -> None:
    """Adam's instability in a small Llama on real text: stalls and bursts, remedies, a search without injection.

    What was trained already (in --out) is not trained again.

    \b
    Example:  puna lab adam injection --seeds 5
              puna lab adam mitigation --json
              puna lab adam --fields
    """
    from puna.lab import adam, adam_show

    if fields:
        adam_show.fields()
        return
    where = adam.Where(out, workers, seeds or adam.SEEDS[experiment], data)
    result = adam.EXPERIMENTS[experiment](where)
    if as_json:
        click.echo(json.dumps(result))
    else:
        adam_show.PRINTERS[experiment](result)


puna.add_command(health)
puna.add_command(graph)
puna.add_command(plan)
puna.add_command(recipe)
plan.add_command(plan_exchange)
for verb in CLICKS_VERBS:
    recsys.add_command(verb)
puna.add_command(recsys)


if __name__ == "__main__":
    main()
