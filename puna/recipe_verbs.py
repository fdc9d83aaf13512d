"""`puna recipe`: parse, call one function, print. What it needs is imported inside the verbs."""

import json
from pathlib import Path

import click

from puna.verbs import RECIPE_ARGUMENTS, as_json, print_figures, recipe_name, settings


@click.group()
def recipe() -> None:
    """Recipes: list, show, init, diff, schema, reference.

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
    from puna.recipe import catalogue, load

    counts = catalogue()
    told = {
        name: f"{count:>15,} parameters" if count else f"{load(name).recipe.task:>15}" for name, count in counts.items()
    }
    print_figures(counts if as_json else told, as_json)


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


@recipe.command("init")
@click.argument("name", default="demo")
@click.option(
    "--out",
    default="mine.toml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="File to write; must not exist.",
)
def recipe_init(name: str, out: Path) -> None:
    """Write a recipe of your own to edit.

    It begins from the shipped recipe NAME (demo where not given) and holds what is usually changed, with what each
    key means.

    \b
    Example:  puna recipe init tiny --out mine.toml
    """
    from puna.recipe import write_starter

    write_starter(name, out)
    click.echo(out)


@recipe.command("diff")
@click.argument("a")
@click.argument("b")
@as_json
def recipe_diff(a: str, b: str, as_json: bool) -> None:
    """The keys whose values differ, with both values and the layers that set them.

    A and B are names, TOML files or run directories.

    \b
    Example:  puna recipe diff llama3-8b llama3.1-8b
    """
    from puna.recipe import diff, diff_table, load

    records = diff(load(a), load(b))
    click.echo(json.dumps(records) if as_json else diff_table(a, b, records), nl=as_json)


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
