"""A recipe: a TOML file and flags become frozen, typed settings; every value knows the layer that set it.

Layers, later ones win: defaults, the recipe named by `extends` (and what that one extends), the recipe itself, flags.
The word `none` unsets an optional setting, in a file and on the command line alike.
"""

import difflib
import json
import os
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails

from puna import __version__
from puna.console import err
from puna.errors import RecipeError
from puna.graph.config import GraphConfig
from puna.llama.config import DataConfig, LlamaConfig
from puna.recsys.config import DlrmConfig, ExchangeConfig
from puna.train.config import LoopConfig, MeshConfig, ScheduleConfig, TrainConfig, setting

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Renamed:
    """The name that a key has now, and the version of Puna that no longer accepts the old one (two releases on)."""

    key: str
    gone: str


RENAMED: dict[str, Renamed] = {}
"""Keys by their old dotted names."""

OVERRULES = {"data.path": "data.sources"}
"""Keys that stand for another: where a layer sets the first, what lower layers set for the second is dropped."""

STARTER = (
    "run.dir",
    "run.seed",
    "run.device",
    "run.num_processes",
    "model.num_layers",
    "model.dim",
    "model.ffn_dim",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.vocab_size",
    "model.max_seq_len",
    "data.path",
    "data.sources",
    "train.tokens",
    "train.batch_tokens",
    "train.seq_len",
    "train.micro_batch",
    "train.optimizer",
    "train.lr",
    "train.muon_lr",
    "train.dtype",
    "train.compile",
    "train.recompute",
    "schedule.warmup_tokens",
    "schedule.decay",
    "schedule.final_ratio",
    "schedule.batch_stages",
    "schedule.seq_stages",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.every",
    "eval.tokens",
)
"""What a user changes, by section: the keys of `puna recipe init`."""

GRAPH_STARTER = (
    "run.dir",
    "run.seed",
    "run.num_processes",
    "run.num_threads",
    "data.path",
    "graph.dim",
    "graph.operator",
    "graph.comparator",
    "graph.loss",
    "graph.n3",
    "graph.epochs",
    "graph.batch_edges",
    "graph.num_batch_negs",
    "graph.num_uniform_negs",
    "graph.lr",
    "graph.memory",
    "graph.num_partitions",
    "graph.unpartitioned",
    "graph.patience",
    "schedule.decay",
    "schedule.final_ratio",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.every",
    "eval.tokens",
)
"""The same for a recipe that trains a graph."""

DLRM_STARTER = (
    "run.dir",
    "run.seed",
    "run.num_processes",
    "run.num_threads",
    "data.path",
    "dlrm.dim",
    "dlrm.bottom",
    "dlrm.top",
    "dlrm.interaction",
    "dlrm.max_rows",
    "dlrm.epochs",
    "dlrm.batch",
    "dlrm.optimizer",
    "dlrm.lr",
    "dlrm.table_optimizer",
    "dlrm.dtype",
    "dlrm.placement",
    "exchange.forward",
    "exchange.backward",
    "schedule.warmup_tokens",
    "schedule.decay",
    "schedule.final_ratio",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.every",
    "eval.tokens",
)
"""The same for a recipe that trains a recommendation model."""

STARTERS = {"pretrain": STARTER, "graph": GRAPH_STARTER, "dlrm": DLRM_STARTER}


class Recipe(LoopConfig):
    """Everything one run depends on."""

    task: Literal["pretrain", "graph", "dlrm"] = setting(
        "pretrain",
        "what is trained; pretrain: next-token prediction on token shards, by the sections model and train; graph: "
        "embeddings of a graph's nodes, by the section graph; dlrm: click-through rates, by the sections dlrm and "
        "exchange",
    )
    model: LlamaConfig = LlamaConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    mesh: MeshConfig = MeshConfig()
    graph: GraphConfig = GraphConfig()
    dlrm: DlrmConfig = DlrmConfig()
    exchange: ExchangeConfig = ExchangeConfig()

    @model_validator(mode="after")
    def _heads_fill_the_stream(self) -> "Recipe":
        model = self.model
        if model.num_heads * model.head_dim != model.dim:
            raise ValueError(
                f"model.num_heads x model.head_dim is {model.num_heads} x {model.head_dim} = "
                f"{model.num_heads * model.head_dim}, but model.dim is {model.dim}; "
                f"set model.dim to {model.num_heads * model.head_dim}, or change the heads"
            )
        return self

    @model_validator(mode="after")
    def _stages_ascend(self) -> "Recipe":
        curves = {"batch_stages": self.schedule.batch_stages, "seq_stages": self.schedule.seq_stages}
        for name, pairs in curves.items():
            starts = [0, *(start for start, _ in pairs)]
            if any(size < 1 for _, size in pairs):
                raise ValueError(f"schedule.{name} holds a size below 1; every pair is (from token, size)")
            if any(later <= earlier for earlier, later in pairwise(starts)):
                raise ValueError(
                    f"schedule.{name} begins its stages at tokens {starts[1:]}; "
                    "list the stages in ascending order, the first one after token 0"
                )
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> "Recipe":
        longest = max(stage.seq_len for stage in stages(self))
        if longest > self.model.max_seq_len:
            key = "train.seq_len" if longest == self.train.seq_len else "schedule.seq_stages"
            raise ValueError(
                f"{key} reaches {longest}, more than model.max_seq_len {self.model.max_seq_len}; "
                "shorten the sequences or raise model.max_seq_len"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> "Recipe":
        if self.schedule.warmup_tokens > self.train.tokens:
            raise ValueError(
                f"schedule.warmup_tokens {self.schedule.warmup_tokens} is more than train.tokens {self.train.tokens}; "
                "the peak learning rate would never be reached: shorten the warm-up or train longer"
            )
        return self

    @model_validator(mode="after")
    def _sources_differ(self) -> "Recipe":
        folders = [Path(folder) for folder, _ in self.data.sources]
        twice = [str(folder) for folder in folders if folders.count(folder) > 1]
        if twice:
            raise ValueError(f"data.sources names {twice[0]} twice; give every folder once, with its whole weight")
        return self

    @model_validator(mode="after")
    def _memory_is_of_graphs(self) -> "Recipe":
        if self.graph.size != "given" and self.task != "graph":
            raise ValueError(
                f"graph.size is {self.graph.size!r}, but task is {self.task}; leave it out, or name a graph recipe"
            )
        if self.graph.memory and self.task != "graph":
            raise ValueError(
                f"graph.memory is {self.graph.memory!r}, but task is {self.task}, which has no partitions to hold; "
                "leave it out, or name a graph recipe"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "Recipe":
        _require_divisible(self, num_data_ranks=1)
        return self


@dataclass(frozen=True)
class Stage:
    """From `start` consumed tokens on, steps of `batch_tokens` in sequences of `seq_len`."""

    start: int
    batch_tokens: int
    seq_len: int


def stages(recipe: Recipe) -> list[Stage]:
    """The batch ramp and the sequence-length stages as one list, in order of consumed tokens."""
    batch = dict([(0, recipe.train.batch_tokens), *recipe.schedule.batch_stages])
    seq = dict([(0, recipe.train.seq_len), *recipe.schedule.seq_stages])
    found: list[Stage] = []
    for start in sorted({*batch, *seq}):
        before = found[-1] if found else Stage(0, batch[0], seq[0])
        found.append(Stage(start, batch.get(start, before.batch_tokens), seq.get(start, before.seq_len)))
    return found


def check_ranks(recipe: Recipe, num_data_ranks: int) -> None:
    """Raise RecipeError unless every stage's batch splits into whole micro-batches over `num_data_ranks` ranks."""
    try:
        _require_divisible(recipe, num_data_ranks)
    except ValueError as error:
        raise RecipeError(*_halves(str(error))) from None


def _require_divisible(recipe: Recipe, num_data_ranks: int) -> None:
    micro_tokens = recipe.train.seq_len * recipe.train.micro_batch
    for stage in stages(recipe):
        if micro_tokens % stage.seq_len:
            raise ValueError(
                f"schedule.seq_stages: sequences of {stage.seq_len} tokens from token {stage.start} on do not fill "
                f"micro-batches of {micro_tokens} tokens (train.seq_len {recipe.train.seq_len} x train.micro_batch "
                f"{recipe.train.micro_batch}); choose lengths that divide it, or another train.micro_batch"
            )
        piece = micro_tokens * num_data_ranks
        if stage.batch_tokens % piece:
            nearest = max(1, round(stage.batch_tokens / piece)) * piece
            where = f" from token {stage.start}" if stage.start else ""
            key = "schedule.batch_stages" if stage.start else "train.batch_tokens"
            raise ValueError(
                f"{key}: {stage.batch_tokens} tokens a step{where} do not split into micro-batches of seq_len "
                f"{recipe.train.seq_len} x train.micro_batch {recipe.train.micro_batch} x {num_data_ranks} "
                f"data-parallel ranks = {piece} tokens; make it {nearest}, or change train.micro_batch"
            )


# --- keys -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One setting: its dotted name, what it means, in what unit, and what it may be."""

    name: str
    help: str
    unit: str
    allowed: str
    default: Any
    is_text: bool
    is_optional: bool  # may be none


@cache
def keys() -> dict[str, Key]:
    """Every setting by its dotted name, in the order of the sections."""
    schema = Recipe.model_json_schema()
    return {name: _key(name, field) for name, field in _leaves(schema, schema["$defs"])}


@cache
def sections() -> dict[str, bool]:
    """Every group of settings by its dotted name, and whether it is optional (may be `none`)."""
    schema = Recipe.model_json_schema()
    return dict(_groups(schema, schema["$defs"]))


def _key(name: str, field: dict[str, Any]) -> Key:
    return Key(
        name=name,
        help=field.get("description", ""),
        unit=field.get("unit", ""),
        allowed=_allowed(field),
        default=field["default"],
        is_text=field.get("type") == "string",
        is_optional=any(choice.get("type") == "null" for choice in field.get("anyOf", ())),
    )


def _target(field: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any] | None:
    """The group that a field points to, or None where the field is a value."""
    for choice in (field, *field.get("anyOf", ())):
        if "$ref" in choice:
            return defs[choice["$ref"].removeprefix("#/$defs/")]
    return None


def _leaves(group: dict[str, Any], defs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in sorted(group["properties"].items(), key=lambda item: _target(item[1], defs) is not None):
        target = _target(field, defs)
        if target is None:
            yield prefix + name, field
        else:
            yield from _leaves(target, defs, f"{prefix}{name}.")


def _groups(group: dict[str, Any], defs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    for name, field in group["properties"].items():
        target = _target(field, defs)
        if target is not None:
            yield prefix + name, "anyOf" in field
            yield from _groups(target, defs, f"{prefix}{name}.")


_KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}


def _allowed(field: dict[str, Any]) -> str:
    """What a value may be, in words, from its JSON schema."""
    if "const" in field:
        return f"only {field['const']}"
    if "enum" in field:
        return "one of " + ", ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " or ".join("none" if choice["type"] == "null" else _allowed(choice) for choice in field["anyOf"])
    if field["type"] == "array":
        inner = field.get("prefixItems")
        return f"[{', '.join(map(_allowed, inner))}]" if inner else f"a list of {_allowed(field['items'])}"
    limits = [f"{words} {field[limit]}" for limit, words in _LIMITS.items() if limit in field]
    return _KINDS[field["type"]] + "".join(f", {limit}" for limit in limits)


# --- layers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Where a value came from: a recipe file or the flags."""

    name: str
    text: str = ""

    def place(self, key: str) -> str:
        """The layer's name, with the line of `key` where the file shows it."""
        line = _line(self.text, key)
        return f"{self.name}, line {line}" if line else self.name


FLAG = Layer("flag")
DEFAULT = Layer("default")


@dataclass(frozen=True)
class Loaded:
    """A recipe, the layer that set each dotted key, and the resolved recipe as TOML."""

    recipe: Recipe
    origins: dict[str, str]
    text: str


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a shipped recipe, a TOML file or a run directory, and lay `--section.key value` overrides over it.

    Keys by their old names (`RENAMED`) are taken, with a line on stderr. Raises RecipeError: unknown recipe, unknown
    key, value of a wrong type or outside its limits, contradiction.
    """
    merged: dict[str, tuple[Any, Layer]] = {}
    for layer, table in [*_files(_find(str(name_or_path), Path())), (FLAG, _flags(overrides))]:
        for key, value in _renewed(_entries(table, layer), layer):
            _lay(merged, key, value, layer)
    recipe = _build(merged)
    return Loaded(recipe, _origins(recipe, merged), dump_toml(recipe))


def laid_over(loaded: Loaded, values: Mapping[str, Any], layer: str) -> Loaded:
    """A recipe with other values of some dotted keys, as those of a layer with that name. Raises RecipeError."""
    merged = {key: (value, Layer(loaded.origins[key])) for key, value in flat(loaded.recipe).items()}
    merged |= {key: (value, Layer(layer)) for key, value in values.items()}
    recipe = _build(merged)
    return Loaded(recipe, _origins(recipe, merged), dump_toml(recipe))


def _renewed(entries: Iterator[tuple[str, Any]], layer: Layer) -> Iterator[tuple[str, Any]]:
    """Keys and values of a layer by the names of today; an old name is told on stderr."""
    written: dict[str, str] = {}
    for name, value in entries:
        key = _current(name)
        if written.setdefault(key, name) != name:
            raise RecipeError(f"{layer.name} sets {key} twice, as {written[key]} and as {name}", f"Keep {key} alone.")
        if key != name:
            told = f"{layer.place(name)}: {name} is now {key}; Puna {RENAMED[name].gone} will not know {name}"
            err.print(told, markup=False, soft_wrap=True)
        yield key, value


def _current(name: str) -> str:
    """The key that a name means: itself, or what it was renamed to where the old name is still accepted."""
    renamed = RENAMED.get(name)
    return renamed.key if renamed and _release(__version__) < _release(renamed.gone) else name


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _refuse_long(key: str, value: Any, layer: Layer) -> None:
    """Raise RecipeError where a whole number has more than TOML's 64 bits."""
    if isinstance(value, list):
        for inner in value:
            _refuse_long(key, inner, layer)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise RecipeError(
            f"{key} ({layer.place(key)}) is a number of {value.bit_length()} bits",
            "Whole numbers have at most 64 bits.",
        )


def names() -> list[str]:
    """Recipes that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _find(name: str, beside: Path) -> Path:
    """The file that a name, a path or a run directory means; relative paths start at the folder `beside`."""
    if name.startswith("-"):
        raise RecipeError(f"{name!r} stands where the recipe belongs", "Write the recipe first, its flags after it.")
    if name in names():
        return FOLDER / f"{name}.toml"
    path = beside / name
    if os.path.isfile(path / "recipe.toml"):
        return path / "recipe.toml"
    if path.suffix == ".toml" or "/" in name:
        if os.path.isfile(path):
            return path
        raise RecipeError(f"no recipe at {path}", f"Give the path of a TOML file, or a name: {', '.join(names())}")
    close = difflib.get_close_matches(name, names(), n=len(names()), cutoff=0.0)
    raise RecipeError(f"no recipe named {name!r}", f"Did you mean {close[0]}? These ship: {', '.join(close)}")


def _files(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Layer, dict[str, Any]]]:
    """The recipe at `path` and what it extends, the farthest base first."""
    if (resolved := path.resolve()) in seen:
        chain = " -> ".join(str(step) for step in (*seen, resolved))
        raise RecipeError(f"recipes extend each other in a circle: {chain}", "Remove one of the `extends` lines.")
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror})", "Give a file that can be.") from None
    except RecursionError:
        raise RecipeError(f"{path} nests brackets too deeply", "Mend that place.") from None
    except ValueError as error:
        raise RecipeError(f"{path} is not TOML: {error}", "Mend that place; text needs quotes.") from None
    layer = Layer(f"recipe {path.stem}" if path.parent == FOLDER else f"file {path}", text)
    base = table.pop("extends", None)
    _refuse_long("extends", base, layer)
    if base is not None and not isinstance(base, str):
        raise RecipeError(f"extends = {_shown(base)} in {path} is not text", 'Write extends = "NAME" or a path.')
    below = _files(_find(base, path.parent), (*seen, resolved)) if base is not None else []
    return [*below, (layer, table)]


def _flags(overrides: Sequence[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` as one table of dotted keys."""
    table: dict[str, Any] = {}
    words = iter(overrides)
    for word in words:
        if not word.startswith("--"):
            raise RecipeError(f"{word!r} is neither a flag nor a flag's value", "Write --section.key value.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise RecipeError(f"--{key} has no value", f"Write --{key} VALUE; booleans too: true or false.")
        table[key] = _value(key, text)
    return table


def _value(name: str, text: str) -> Any:
    """A flag's value as TOML, or as text where it is not TOML or where the setting is text."""
    key = keys().get(_current(name))
    if key and key.is_text:
        return text
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text


def _entries(table: Mapping[str, Any], layer: Layer, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested table, as they are written; every one is known, if by an old name."""
    for name, value in table.items():
        key = prefix + name
        _refuse_long(key, value, layer)
        if _current(key) in keys() or (value == "none" and sections().get(key)):
            yield key, value
        elif key not in sections() and not any(_current(old) != old and old.startswith(f"{key}.") for old in RENAMED):
            raise _unknown(key, layer)
        elif isinstance(value, Mapping):
            yield from _entries(value, layer, f"{key}.")
        else:
            choice = ", or none" if sections().get(key) else ""
            raise RecipeError(
                f"{key} = {_shown(value)} ({layer.place(key)}): {key} is a section", f"Set the keys inside it{choice}."
            )


def _unknown(key: str, layer: Layer) -> RecipeError:
    problem = f"{key}: unknown key in {layer.place(key)}"
    if key in RENAMED:
        return RecipeError(problem, f"It was renamed: write {RENAMED[key].key}.")
    known = [*keys(), *sections()]
    same_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    close = [*same_name, *difflib.get_close_matches(key, known, n=1, cutoff=0.0)]
    return RecipeError(problem, f"Did you mean {close[0]}?")


def _lay(merged: dict[str, tuple[Any, Layer]], key: str, value: Any, layer: Layer) -> None:
    """Set `key`; `none` unsets an optional setting, with everything that lower layers put inside it."""
    is_section = key in sections()
    if is_section:
        for inner in [other for other in merged if other.startswith(f"{key}.")]:
            del merged[inner]
    for group in sections():
        if key.startswith(f"{group}."):
            merged.pop(group, None)
    overruled = OVERRULES.get(key, "")
    if overruled in merged and merged[overruled][1] != layer:
        del merged[overruled]
    unset = value == "none" and (is_section or keys()[key].is_optional)
    merged[key] = (None if unset else value, layer)


def _build(merged: Mapping[str, tuple[Any, Layer]]) -> Recipe:
    nested: dict[str, Any] = {}
    for key, (value, _) in merged.items():
        *groups, name = key.split(".")
        table = nested
        for group in groups:
            table = table.setdefault(group, {})
        table[name] = _frozen(value)
    try:
        return Recipe.model_validate(nested)
    except ValidationError as error:
        raise _explain(error.errors()[0], merged) from None


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _origins(recipe: Recipe, merged: Mapping[str, tuple[Any, Layer]]) -> dict[str, str]:
    return {key: merged.get(key, (None, DEFAULT))[1].name for key in _flatten(recipe.model_dump())}


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every value by its dotted key."""
    return _flatten(recipe.model_dump())


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in sorted(table.items(), key=lambda item: isinstance(item[1], Mapping)):
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


# --- errors in one sentence -----------------------------------------------------------------------------------------


def _explain(error: ErrorDetails, merged: Mapping[str, tuple[Any, Layer]]) -> RecipeError:
    """A validation error as one sentence: key, value, layer, and what is allowed."""
    path = [str(part) for part in error["loc"]]
    if error["type"] == "value_error":
        problem, fix = _halves(error["msg"].removeprefix("Value error, "))
        mentioned = [f"{key} set by {layer.place(key)}" for key, (_, layer) in merged.items() if _names(problem, key)]
        where = f" ({', '.join(mentioned)})" if mentioned else ""
        return RecipeError("".join(f"{part}: " for part in path) + problem + where, fix)
    key = next(".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in keys())
    value, layer = merged[key]
    return RecipeError(f"{key} = {_shown(value)} ({layer.place(key)}) is not allowed", _remedy(keys()[key], value))


def _names(text: str, key: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", text) is not None


def _remedy(key: Key, value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and key.allowed.startswith("a whole number"):
        return f"It must be {key.allowed}; write {int(value):_}."
    choices = key.allowed.removeprefix("one of ").split(", ")
    close = difflib.get_close_matches(str(value), choices, n=1) if key.allowed.startswith("one of ") else []
    return f"It must be {key.allowed}" + (f"; did you mean {close[0]}?" if close else ".")


def _halves(message: str) -> tuple[str, str]:
    """The messages of rules read `problem; fix`."""
    problem, _, fix = message.partition("; ")
    return problem, fix[:1].upper() + fix[1:] + "."


def _line(text: str, key: str) -> int | None:
    """The line of a TOML text that sets `key`, where it stands on a line of its own."""
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([\w.]+)\]", line):
            section = f"{header[1]}."
        elif (entry := re.match(r"\s*([\w.-]+)\s*=", line)) and f"{key}.".startswith(f"{section}{entry[1]}."):
            return number
    return None


# --- printing -------------------------------------------------------------------------------------------------------


def show(loaded: Loaded) -> list[dict[str, Any]]:
    """One record a setting: key, value, unit, layer that set it, help."""
    return [
        {
            "key": name,
            "value": value,
            "unit": keys()[name].unit if name in keys() else "",
            "layer": loaded.origins[name],
            "help": keys()[name].help if name in keys() else "optional section, not set",
        }
        for name, value in _flatten(loaded.recipe.model_dump()).items()
    ]


def table(loaded: Loaded, help_text: bool = False) -> str:
    """The records of `show` as aligned text: key, value, unit, layer and, if wanted, what the key means."""
    columns = ("key", "value", "unit", "layer") + ("help",) * help_text
    return _aligned(
        [columns] + [tuple(_toml(row[c]) if c == "value" else row[c] for c in columns) for row in show(loaded)]
    )


def diff(a: Loaded, b: Loaded) -> list[dict[str, Any]]:
    """One record a key whose values differ: key, and under a and b its value and layer, or None where there is none."""
    sides = [{row["key"]: {"value": row["value"], "layer": row["layer"]} for row in show(loaded)} for loaded in (a, b)]
    records = [{"key": key, "a": sides[0].get(key), "b": sides[1].get(key)} for key in {**sides[0], **sides[1]}]
    return [r for r in records if r["a"] is None or r["b"] is None or r["a"]["value"] != r["b"]["value"]]


def diff_table(a: str, b: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The records of `diff` as aligned text, under the names of the two recipes."""
    rows = [("key", a, "layer", b, "layer")]
    for record in records:
        cells = [(_toml(side["value"]), side["layer"]) if side else ("-", "-") for side in (record["a"], record["b"])]
        rows.append((record["key"], *cells[0], *cells[1]))
    return _aligned(rows) if records else "no difference\n"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def starter(name: str, run: str) -> str:
    """A recipe to edit, as TOML: the shipped recipe `name` with the run directory `run`.

    It holds what users change (`STARTERS`) with the recipe's own values, each below its meaning, unit
    and limits; the rest comes by `extends`. Raises RecipeError where no such recipe ships.
    """
    if name not in names():
        raise RecipeError(f"no recipe named {name!r} ships", f"Begin from one of {', '.join(names())}.")
    recipe = load(name).recipe
    values = flat(recipe) | {"run.dir": run}
    lines = [f"# Begun from the recipe {name}. What is not here is as there; `puna recipe show FILE` prints all of it."]
    lines += [f'extends = "{name}"']
    section = ""
    for key in STARTERS[recipe.task]:
        group, _, short = key.rpartition(".")
        if group != section:
            section = group
            lines += ["", f"[{group}]"]
        known = keys()[key]
        limits = f"{known.unit}: {known.allowed}" if known.unit else known.allowed
        lines += textwrap.wrap(f"{known.help} ({limits})", 118, initial_indent="# ", subsequent_indent="# ")
        lines.append(f"{short} = {_toml(values[key])}")
    return "\n".join(lines) + "\n"


def write_starter(name: str, out: Path) -> None:
    """Write `starter` to a new file OUT, for runs in runs/STEM. Raises RecipeError where OUT is there, or no .toml."""
    from puna.llama.shards import write_atomic

    if out.suffix != ".toml":
        raise RecipeError(f"{out} does not end in .toml", f"Name it {out.with_suffix('.toml')}.")
    if out.exists():
        raise RecipeError(f"{out} is already there", "Name another file with --out, or remove it.")
    text = starter(name, f"runs/{out.stem}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text.encode())


def catalogue() -> dict[str, int | None]:
    """The recipes that ship and the exact parameter counts of their models; None where the data decides."""
    recipes = {name: load(name).recipe for name in names()}
    return {name: found.model.num_parameters if found.task == "pretrain" else None for name, found in recipes.items()}


def dump_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML that `load` reads back to an equal recipe."""
    lines: list[str] = []
    section = ""
    for name, value in _flatten(recipe.model_dump()).items():
        group, _, key = name.rpartition(".")
        if group != section:
            lines += ["", f"[{group}]"]
            section = group
        lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return "{...}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


def _shown(value: Any) -> str:
    """A value in a message: as TOML, cut where it is long."""
    text = _toml(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors."""
    found = Recipe.model_json_schema()
    found["properties"]["extends"] = {"type": "string", "description": "recipe to start from: a name or a path"}
    return found


_HEAD = ("| key | default | unit | meaning | allowed |", "|---|---|---|---|---|")


def reference() -> str:
    """The reference page's tables, in Markdown: every setting with its default, unit, meaning and limits."""
    lines: list[str] = []
    section = None
    for key in keys().values():
        group, _, name = key.name.rpartition(".")
        if group != section:
            section = group
            lines += ["", f"### {group or 'top level'}", "", *_HEAD]
        lines.append(f"| `{name}` | `{_toml(key.default)}` | {key.unit or '-'} | {key.help} | {key.allowed} |")
    return "\n".join(lines).lstrip("\n") + "\n"


def to_json(loaded: Loaded) -> str:
    """What a run directory keeps as recipe.json: each dotted key with its value and layer."""
    return json.dumps({row["key"]: {"value": row["value"], "layer": row["layer"]} for row in show(loaded)}, indent=2)
