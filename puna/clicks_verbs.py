"""Verbs of `puna recsys` around clicks: parse, call one function, print. What they need is imported inside them."""

import json
from pathlib import Path

import click

from puna.verbs import RECIPE_ARGUMENTS, as_json, print_figures, recipe_name, settings

run_folder = click.argument("run", type=click.Path(path_type=Path))


@click.command("import")
@click.option("--train", "train_files", required=True, multiple=True, type=click.Path(path_type=Path), help="Samples.")
@click.option("--valid", multiple=True, type=click.Path(path_type=Path), help="Later ones, to look at while training.")
@click.option("--test", multiple=True, type=click.Path(path_type=Path), help="Later ones still, to test on.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--layout", type=click.Choice(["criteo", "avazu"]), help="Columns of a known data set.")
@click.option("--columns", help="Columns in order: label, dense:NAME, table:NAME, bag:NAME:SIZE, hour, - (left out).")
@click.option("--delimiter", default=",", show_default=True, help="With --columns: what parts the fields.")
@click.option("--positive", default="1", show_default=True, help="With --columns: the label of a click.")
@click.option("--negative", help="With --columns: the label of none  [default: 0, or any where --positive is given]")
@click.option(
    "--values",
    default="map",
    show_default=True,
    type=click.Choice(["map", "hash", "ids"]),
    help="How categories become ids.",
)
@click.option("--buckets", default=0, help="With hash: rows of every table; with ids: ids there may be.")
@click.option("--min-count", default=1, show_default=True, help="Training samples a value needs for its own row.")
@click.option("--max-rows", default=0, help="Most rows of a table, frequent values first  [default: no limit]")
@click.option("--log/--no-log", default=True, show_default=True, help="Dense features as log(1 + x).")
@click.option("--maps", type=click.Path(path_type=Path), help="Clicks whose ids are taken over.")
@click.option(
    "--unseen",
    default="share",
    show_default=True,
    type=click.Choice(["share", "refuse"]),
    help="With --maps: values that have no id share row 0, or are refused.",
)
@click.option("--valid-share", default=0.0, help="Share of the training samples, before the test's, to validate on.")
@click.option("--test-share", default=0.0, help="Share of the training samples, the last ones, to test on.")
@as_json
def clicks_import(
    train_files: tuple[Path, ...], valid: tuple[Path, ...], test: tuple[Path, ...], out: Path, layout: str | None,
    columns: str | None, delimiter: str, positive: str, negative: str | None, values: str, buckets: int, min_count: int,
    max_rows: int, log: bool, maps: Path | None, unseen: str, valid_share: float, test_share: float, as_json: bool,
) -> None:  # fmt: skip
    """Click files to a folder of clicks.

    TSV, CSV or Parquet, plain or as .gz, .xz, .zst, .bz2, in the order of time. They stream; an import that was cut
    short goes on where it stands when the same command is given again.

    \b
    Example:  puna recsys import --train train.txt --layout criteo --min-count 4 --test-share 0.1 --out clicks
              puna recsys import --train a.csv.gz --columns label,dense:age,table:city --out clicks
              puna recsys import --train a.csv --columns label,table:city,bag:tags:20 --out clicks  (tags: a|b|c)
    """
    from puna.errors import DataError
    from puna.recsys.importing import Options, import_clicks
    from puna.recsys.layouts import LAYOUTS, parse_columns

    if bool(layout) == bool(columns):
        raise DataError("it is not said what the columns are", "Give either --layout or --columns.")
    if columns:
        other = negative if negative is not None or positive != "1" else "0"
        found = parse_columns(columns, delimiter.replace("\\t", "\t"), positive, other)
    else:
        found = LAYOUTS[str(layout)]
    options = Options(
        values=values,  # type: ignore[arg-type]
        buckets=buckets,
        min_count=min_count,
        max_rows=max_rows,
        log=log,
        maps=str(maps) if maps else None,
        unseen=unseen,  # type: ignore[arg-type]
        valid_share=valid_share,
        test_share=test_share,
    )
    print_figures(import_clicks({"train": train_files, "valid": valid, "test": test}, out, found, options), as_json)


@click.command("generate")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--samples", default=1_000_000, show_default=True, type=click.IntRange(1), help="To train on.")
@click.option("--test", default=200_000, show_default=True, type=click.IntRange(0), help="To test on.")
@click.option("--tables", default="kaggle", show_default=True, help="kaggle, terabyte, or rows of each: 1000,50,20000.")
@click.option("--max-rows", default=0, help="Most rows of a table  [default: no limit]")
@click.option("--hots", default="", help="Ids of a sample in each table at most: 1,8,1  [default: one in each]")
@click.option("--dense", default=13, show_default=True, type=click.IntRange(0), help="Dense features.")
@click.option("--exponent", default=1.05, show_default=True, help="Of Zipf's law for the ids.")
@click.option("--click-rate", default=0.25, show_default=True, help="Share of clicks.")
@click.option("--seed", default=0, show_default=True, help="Seed of truth and samples.")
@as_json
def clicks_generate(
    out: Path, samples: int, test: int, tables: str, max_rows: int, hots: str, dense: int, exponent: float,
    click_rate: float, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Clicks with a planted truth.

    Prints also the AUC and log loss of the truth itself, which no model can be expected to beat.

    \b
    Example:  puna recsys generate --samples 5000000 --test 2000000 --max-rows 200000 --out planted
    """
    from puna.errors import DataError
    from puna.recsys.generator import ROWS, generate

    def numbers(option: str, text: str) -> tuple[int, ...]:
        try:
            return tuple(int(word) for word in text.split(","))
        except ValueError:
            raise DataError(
                f"{option} {text} is no list of numbers",
                "Write whole numbers with commas; for --tables also kaggle or terabyte.",
            ) from None

    rows = ROWS[tables] if tables in ROWS else numbers("--tables", tables)
    figures = generate(
        out,
        samples=samples,
        test=test,
        rows=rows,
        max_rows=max_rows,
        hots=numbers("--hots", hots) if hots else (),
        num_dense=dense,
        exponent=exponent,
        click_rate=click_rate,
        seed=seed,
    )
    print_figures(figures, as_json)


@click.command("report")
@run_folder
@click.option("--beside", type=click.Path(path_type=Path), help="A run without compression, to hold accuracy against.")
@as_json
def clicks_report(run: Path, beside: Path | None, as_json: bool) -> None:
    """What a run's exchange came to: ratio, bound, class and bytes by table.

    \b
    Example:  puna recsys report runs/dlrm --beside runs/dlrm-raw
    """
    from puna.recsys.report import lines, report

    found = report(run, beside)
    click.echo(json.dumps(found) if as_json else "\n".join(lines(found)))


@click.command("tune", context_settings=RECIPE_ARGUMENTS)
@recipe_name
@settings
@click.option("--ne-budget", default="0.02%", show_default=True, help="Rise of the normalised entropy that is allowed.")
@click.option("--samples", default=500_000, show_default=True, type=click.IntRange(1), help="Of a rehearsal.")
@as_json
def clicks_tune(recipe: str, overrides: tuple[str, ...], ne_budget: str, samples: int, as_json: bool) -> None:
    """Bounds for an accuracy budget, by a short search.

    Trains on the first samples without compression, then with the recipe's bounds times some scales, and prints the
    largest bounds whose normalised entropy stays within the budget.

    \b
    Example:  puna recsys tune dlrm-terabyte --data.path clicks --ne-budget 0.02% --samples 200000
    """
    from puna.errors import RecipeError
    from puna.recipe import load

    loaded = load(recipe, overrides).recipe
    if loaded.task != "dlrm" or "bounded" not in (loaded.exchange.forward, loaded.exchange.backward):
        raise RecipeError(f"{recipe} has no bounds to choose", "Set task to dlrm and exchange.forward to bounded.")
    try:
        budget = float(ne_budget.removesuffix("%")) / (100 if ne_budget.endswith("%") else 1)
    except ValueError:
        raise RecipeError(f"--ne-budget {ne_budget} is no share", "Write 0.02% or 0.0002.") from None
    from puna.recsys.budget import search
    from puna.recsys.clicks import Clicks

    clicks = Clicks.open(loaded.data.path)
    found = search(loaded.dlrm, loaded.exchange, clicks, budget, samples=samples, seed=loaded.run.seed)
    if not as_json:
        found.pop("trials")
    print_figures(found, as_json)


@click.command("exchange", context_settings=RECIPE_ARGUMENTS)
@recipe_name
@settings
@click.option("--link", default=10.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="Gbit/s.")
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(2), help="Ranks that share a batch.")
@click.option("--step", default=0, show_default=True, type=click.IntRange(0), help="Of the run, for its bounds.")
@as_json
def plan_exchange(recipe: str, overrides: tuple[str, ...], link: float, ranks: int, step: int, as_json: bool) -> None:
    """Whether compressing the exchange of a recommendation model pays on a link, by table.

    Codecs are timed on this machine, on the ids of the first batch of the recipe's clicks and fresh rows.

    \b
    Example:  puna plan exchange dlrm-terabyte --data.path clicks --link 10 --ranks 4
    """
    from puna.errors import RecipeError
    from puna.plan.exchange import lines, pays
    from puna.recipe import load
    from puna.recsys.clicks import Clicks

    loaded = load(recipe, overrides).recipe
    if loaded.task != "dlrm":
        raise RecipeError(
            f"{recipe} is a recipe of task {loaded.task}, which exchanges no rows", "Name one of task dlrm."
        )
    clicks = Clicks.open(loaded.data.path)
    found = pays(loaded.dlrm, loaded.exchange, clicks, link_gbps=link, ranks=ranks, step=step)
    click.echo(json.dumps(found) if as_json else "\n".join(lines(found)))


VERBS = (clicks_import, clicks_generate, clicks_report, clicks_tune)
