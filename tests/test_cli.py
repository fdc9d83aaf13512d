"""The command line: what each verb calls, what it prints, and what it says when something is wrong."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from puna import cli, recipe
from puna.errors import Hung, NonFinite, OutOfMemory, RankFailed, RanksDiffer, RunLocked, Unfinished, UserError
from puna.llama.dialog import Style


@dataclass
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Relative paths of a command mean a scratch folder; its processes still find the package."""
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def puna(monkeypatch, capsys) -> Callable[..., Outcome]:
    """Runs one command in this process."""

    def run(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["puna", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return Outcome(left.value.code, *capsys.readouterr())

    return run


def process(*words: str, setup: str = "pass", **environment: str) -> Outcome:
    """Runs one command in a process of its own."""
    code = f"import sys; {setup}; from puna.cli import main; sys.argv = ['puna', *sys.argv[1:]]; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


ALL = list(commands(cli.puna))
NAMES = [" ".join(("puna", *path)) for path in ALL]


# --- help


@pytest.mark.parametrize("path", ALL[1:], ids=NAMES[1:])
def test_help_shows_an_example(puna, path):
    done = puna(*path, "--help")
    assert (done.status, done.err) == (0, "")
    assert f"Example:  puna {path[0]}" in done.out


@pytest.mark.parametrize("path", ALL, ids=NAMES)
def test_every_flag_says_what_it_does(path):
    command: Any = cli.puna
    for name in path:
        command = command.commands[name]
    flags = [option for option in command.params if isinstance(option, click.Option)]
    assert [flag.name for flag in flags if not flag.help and flag.name not in ("directory", "port")] == []


def test_version(puna):
    assert puna("--version").out.startswith("puna, version 0.")


def test_verbs():
    assert {path[0] for path in ALL[1:]} == {
        "check", "corpus", "demo", "doctor", "eval", "export", "generate", "graph", "health", "lab", "launch", "parity",
        "plan", "recipe", "recsys", "report", "resume", "serve", "train", "verify"
    }  # fmt: skip


def test_help_and_recipes_need_no_torch():
    setup = "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    for words in (["--help"], ["recipe", "show", "demo"], ["recipe", "list"], ["train", "--help"]):
        assert process(*words, setup=setup).err == "False\n"


# --- what a verb calls and prints

PATH = Path("some")
CALLS = {
    "demo": ("puna.demo", "main", "demo --minutes 2 --dir some", (PATH, 2.0)),
    "build": (
        "puna.corpus.build",
        "build_corpus",
        "corpus build --source stdlib --out some --near 0.9 --seed 3",
        ("stdlib", PATH, 0.05, 0.9, 3),
    ),
    "tokenizer": (
        "puna.corpus.bpe",
        "train_tokenizer",
        "corpus tokenizer some --vocab-size 512 --out t.json",
        (PATH, 512, Path("t.json")),
    ),
    "tokenize": (
        "puna.corpus.tokenize",
        "tokenize_corpus",
        "corpus tokenize some --tokenizer t.json --out shards",
        (PATH, Path("t.json"), Path("shards")),
    ),
    "eval": ("puna.evals.suite", "evaluate", "eval some --step 0 --no-baselines", (PATH, None, 0, False)),
    "eval on shards": ("puna.evals.suite", "evaluate", "eval some --data d --baselines", (PATH, Path("d"), None, True)),
    "export": (
        "puna.run",
        "export",
        "export some --to hf --out o --dtype bf16 --check",
        (PATH, Path("o"), None, "bf16", True),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("as_json", [True, False])
def test_a_verb_calls_its_function_and_prints_its_figures(puna, monkeypatch, name, as_json):
    module, function, words, expected = CALLS[name]
    seen: list[tuple] = []
    result = {"bits": 1.5, "inner": {"count": 2}}
    monkeypatch.setattr(f"{module}.{function}", lambda *given: seen.append(given) or result)
    done = puna(*words.split(), *(["--json"] if as_json else []))
    assert (done.status, seen) == (0, [expected])
    assert json.loads(done.out) == result if as_json else done.out == "bits         1.5\ninner.count  2\n"


def test_train_hands_the_loaded_recipe_over(puna, monkeypatch):
    seen = []
    monkeypatch.setattr("puna.run.train", lambda loaded: seen.append(loaded) or {"steps": 3})
    done = puna("train", "tiny", "--train.lr", "0.5", "--json", "--run.dir=here", "--model.rope_scaling", "none")
    assert json.loads(done.out) == {"steps": 3}
    assert (seen[0].recipe.train.lr, seen[0].recipe.run.dir, seen[0].origins["train.lr"]) == (0.5, "here", "flag")


def test_report_prints_the_path(puna, monkeypatch):
    monkeypatch.setattr("puna.report.write_report", lambda run: run / "report.html")
    assert puna("report", "some").out == "some/report.html\n"


def test_serve_passes_address_and_name(puna, monkeypatch):
    seen = []
    monkeypatch.setattr("puna.serve.api.server.serve", lambda *given: seen.append(given))
    assert puna("serve", "some", "--port", "0", "--name", "mine").status == 0
    assert puna("serve", "some", "--allow-mismatch", "--trim", "--tool-dialect", "python_list").status == 0
    assert seen == [
        (PATH, "127.0.0.1", 0, "mine", False, Style()),
        (PATH, "127.0.0.1", 8000, None, True, Style("python_list", trim=True)),
    ]


# --- recipes


def test_recipe_list(puna):
    assert json.loads(puna("recipe", "list", "--json").out)["llama3-8b"] == 8_030_261_248
    listed = [line.split(maxsplit=1) for line in puna("recipe", "list").out.splitlines()]
    assert ["llama3.1-405b", "405,853,388,800 parameters"] in listed
    assert ["wn18rr", "graph"] in listed
    assert json.loads(puna("recipe", "list", "--json").out)["wn18rr"] is None


def test_recipe_show_names_the_layer(puna):
    rows = puna("recipe", "show", "tiny", "--train.lr", "0.5").out.splitlines()
    assert [row.split() for row in rows if row.startswith("train.lr ")] == [["train.lr", "0.5", "flag"]]
    assert [row.split()[2:] for row in rows if row.startswith("train.seq_len ")] == [["tokens", "recipe", "tiny"]]


def test_recipe_show_with_meanings(puna):
    assert "peak learning rate" not in puna("recipe", "show", "tiny").out
    assert "peak learning rate" in puna("recipe", "show", "tiny", "--help-text").out


def test_recipe_show_as_json_and_toml(puna):
    rows = json.loads(puna("recipe", "show", "tiny", "--json").out)
    assert rows[0] == {"key": "task", "value": "pretrain", "unit": "", "layer": "default"} | {"help": rows[0]["help"]}
    assert puna("recipe", "show", "tiny", "--toml").out == recipe.load("tiny").text


def test_recipe_schema_and_reference(puna):
    assert json.loads(puna("recipe", "schema").out) == recipe.schema()
    assert puna("recipe", "reference").out == recipe.reference()


# --- when something is wrong


def test_misspelt_command(puna):
    done = puna("trian", "demo")
    assert done.status == 2
    assert "No such command 'trian'. Did you mean 'train'?" in done.err


def test_misspelt_flag(puna):
    done = puna("serve", "some", "--prot", "80")
    assert done.status == 2
    assert "No such option '--prot'. (Did you mean one of: '--host', '--port'?)" in done.err


def test_missing_argument(puna):
    done = puna("corpus", "build", "--source", "stdlib")
    assert done.status == 2
    assert "Missing option '--out'" in done.err


def test_misspelt_setting_in_a_process():
    done = process("train", "tiny", "--train.lrr", "1", "--json")
    assert (done.status, done.out) == (2, "")
    assert done.err == "error: train.lrr: unknown key in flag. Did you mean train.lr?\n"


def test_debug_shows_the_trace():
    done = process("recipe", "show", "tiny", "--train.lrr", "1", PUNA_DEBUG="1")
    assert done.status == 2
    assert "Traceback" in done.err
    assert done.err.endswith("\nerror: train.lrr: unknown key in flag. Did you mean train.lr?\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no", "Do."), 2),
        (RunLocked("no", "Wait."), 3),
        (Unfinished("no. Wait."), 4),
        (NonFinite("no"), 5),
        (RankFailed("no"), 6),
        (Hung("no"), 7),
        (RanksDiffer("no"), 8),
        (OutOfMemory("no"), 9),
    ],
)
def test_exit_code_of_each_branch(puna, monkeypatch, error, status):
    def fail(loaded):
        raise error

    monkeypatch.setattr("puna.run.train", fail)
    assert puna("train", "tiny") == Outcome(status, "", f"error: {error}\n")


def test_interrupt(puna, monkeypatch):
    def interrupted(loaded):
        raise KeyboardInterrupt

    monkeypatch.setattr("puna.run.train", interrupted)
    done = puna("train", "tiny")
    assert (done.status, done.out, done.err.strip()) == (130, "", "")


def test_a_file_that_cannot_be_opened(puna, monkeypatch):
    monkeypatch.setattr("puna.report.write_report", lambda run: (run / "nowhere").read_text())
    assert puna("report", "some") == Outcome(1, "", "error: some/nowhere: No such file or directory\n")


@pytest.mark.parametrize(
    ("module", "extra", "words"),
    [
        ("torch", "train", ["train", "tiny"]),
        ("torch", "train", ["generate", "some", "--prompt", "x"]),
        ("tokenizers", "data", ["corpus", "tokenizer", "some", "--vocab-size", "512", "--out", "t.json"]),
        ("uvicorn", "serve", ["serve", "some"]),
    ],
)
def test_missing_extra(module, extra, words):
    done = process(*words, setup=f"sys.modules[{module!r}] = None")
    assert (done.status, done.out) == (2, "")
    assert done.err == f"error: this command needs {module}, which is not installed. Run: pip install 'puna[{extra}]'\n"


def test_a_missing_module_that_no_extra_holds_is_a_defect(puna, monkeypatch):
    monkeypatch.setattr("puna.report.write_report", lambda run: importlib.import_module("puna_nowhere"))
    monkeypatch.setattr(sys, "argv", ["puna", "report", "some"])
    with pytest.raises(ModuleNotFoundError, match="puna_nowhere"):
        cli.main()


def test_missing_paths(puna, tmp_path):
    """Each verb that reads a path says which one is not there."""
    absent = str(tmp_path / "absent")
    for words in (["generate", absent, "--prompt", "x"], ["eval", absent], ["serve", absent, "--port", "0"]):
        done = puna(*words)
        assert done.status == 2, words
        assert done.out == ""
        assert done.err.startswith("error: ")
        assert absent in done.err
