"""What the verbs share: options, arguments, and how figures are printed."""

import json
from collections.abc import Iterator
from typing import Any

import click

as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print the figures as JSON, and nothing else, on stdout."
)
RECIPE_ARGUMENTS = {"ignore_unknown_options": True}
recipe_name = click.argument("recipe")
settings = click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key VALUE]...")

memory = click.option("--memory", metavar="SIZE", help="Most memory of a graph run, such as 4GB; partitions follow.")
size = click.option(
    "--size", type=click.Choice(["auto"]), help="Settings of a graph run from its nodes and edges; flags stay."
)


def with_options(overrides: tuple[str, ...], memory: str | None, size: str | None) -> tuple[str, ...]:
    """The settings of a command line with what --memory and --size stand for."""
    found = {"--graph.memory": memory, "--graph.size": size}
    return (*overrides, *(word for key, value in found.items() if value for word in (key, value)))


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """As one line of JSON, or a dotted key and its value a line; what is None is left out of the lines."""
    if as_json:
        click.echo(json.dumps(figures))
        return
    rows = {key: value for key, value in _dotted(figures) if value is not None}
    width = max(map(len, rows), default=0)
    for key, value in rows.items():
        click.echo(f"{key:<{width}}  {f'{value:.6g}' if isinstance(value, float) else value}")


def _dotted(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
