"""The front door: `puna <verb>` parses, calls one function, prints. Rooms are imported inside their verbs, so that
`puna --help` and `puna recipe` start quickly and need no torch."""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from puna import __version__
from puna.errors import PunaError
from puna.plan_verbs import plan

EXTRAS = {
    "data": ("tokenizers",),
    "train": ("torch", "safetensors", "tiktoken", "sentencepiece", "tensorboard"),
    "serve": ("fastapi", "uvicorn"),
    "demo": ("transformers", "openai"),
}

as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print the figures as JSON, and nothing else, on stdout."
)
RECIPE_ARGUMENTS = {"ignore_unknown_options": True}
recipe_name = click.argument("recipe")
settings = click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key VALUE]...")


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


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    rows = dict(_dotted(result))
    width = max(map(len, rows), default=0)
    for key, value in rows.items():
        click.echo(f"{key:<{width}}  {value}")


def _dotted(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


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

    _print(main(directory, minutes), as_json)


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
@click.option("--source", required=True, help="A file or folder of text, or `stdlib`: this Python's own library.")
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

    _print(build_corpus(source, out, heldout, near, seed), as_json)


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

    _print(train_tokenizer(folder, vocab_size, out), as_json)


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

    _print(tokenize_corpus(folder, tokenizer, out), as_json)


# --- runs -----------------------------------------------------------------------------------------------------------


@puna.command(context_settings=RECIPE_ARGUMENTS)
@recipe_name
@settings
@as_json
def train(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train by a recipe; resumes where the run directory stands.

    RECIPE is a name from `puna recipe list`, a TOML file, or a run directory; `puna recipe reference` lists what a
    flag may set.

    \b
    Example:  puna train demo --run.dir runs/mine --data.path shards --train.lr 1e-3
    """
    from puna.recipe import load

    loaded = load(recipe, overrides)  # before the slow import: a mistake is told at once
    from puna.run import train

    if figures := train(loaded):
        _print(figures, as_json)


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

    _print(evaluate(path, data, step, baselines), as_json)


@puna.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to", "form", default="hf", show_default=True, type=click.Choice(["hf"]), help="hf: Hugging Face folder."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist.")
@click.option("--step", type=int, help="Checkpoint of that step; the newest where not given.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the file; the checkpoint's where not given."
)
@click.option("--check", is_flag=True, help="Load the folder in transformers and compare logits and continuations.")
@as_json
def export(run: Path, form: str, out: Path, step: int | None, dtype: str | None, check: bool, as_json: bool) -> None:
    """Write a checkpoint as a folder that other libraries load.

    \b
    Example:  puna export runs/mine --to hf --out mine-hf --dtype bf16
    """
    from puna.run import export

    _print(export(run, out, step, dtype, check), as_json)


@puna.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN/report.html and print its path.

    The page is self-contained: it can be mailed.

    \b
    Example:  puna report runs/mine
    """
    from puna.report import write_report

    click.echo(write_report(run))


# --- answers --------------------------------------------------------------------------------------------------------


@puna.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to bind; 0.0.0.0 opens it to the network."
)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--name", help="Name of the model in /v1/models; the folder's where not given.")
def serve(path: Path, host: str, port: int, name: str | None) -> None:
    """Answer over HTTP, OpenAI-compatible.

    Serves a run directory or a Hugging Face folder, with a chat page at /.

    \b
    Example:  puna serve runs/mine --port 8000
    """
    from puna.serve.api.server import serve

    serve(path, host, port, name)


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


# --- recipes --------------------------------------------------------------------------------------------------------


@puna.group()
def recipe() -> None:
    """Recipes: list, show, schema, reference.

    \b
    Example:  puna recipe show llama3-8b --train.lr 1e-4
    """


@recipe.command("list")
@as_json
def recipe_list(as_json: bool) -> None:
    """The recipes that ship, with their exact parameter counts.

    \b
    Example:  puna recipe list
    """
    from puna.recipe import catalogue

    counts = catalogue()
    _print(counts if as_json else {name: f"{count:>15,} parameters" for name, count in counts.items()}, as_json)


@recipe.command("show", context_settings=RECIPE_ARGUMENTS)
@recipe_name
@settings
@click.option("--help-text", is_flag=True, help="Also what each key means.")
@click.option("--toml", is_flag=True, help="Print the resolved recipe as a TOML file instead.")
@as_json
def recipe_show(recipe: str, overrides: tuple[str, ...], help_text: bool, toml: bool, as_json: bool) -> None:
    """Every value of a recipe, and the layer that set it.

    \b
    Example:  puna recipe show demo --train.lr 1e-3
    """
    from puna.recipe import load, show, table

    loaded = load(recipe, overrides)
    if toml:
        click.echo(loaded.text, nl=False)
    elif as_json:
        click.echo(json.dumps(show(loaded)))
    else:
        click.echo(table(loaded, help_text), nl=False)


@recipe.command("schema")
def recipe_schema() -> None:
    """JSON schema of a recipe file, for editors.

    \b
    Example:  puna recipe schema > recipe.schema.json
    """
    from puna.recipe import schema

    click.echo(json.dumps(schema(), indent=2))


@recipe.command("reference")
def recipe_reference() -> None:
    """Every setting with default, unit, meaning and limits, in Markdown.

    \b
    Example:  puna recipe reference
    """
    from puna.recipe import reference

    click.echo(reference(), nl=False)


puna.add_command(plan)


if __name__ == "__main__":
    main()
