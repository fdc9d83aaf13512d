"""The verbs around clicks, from the shell's side."""

import json

import pytest
from click.testing import CliRunner
from clicking import steps, task_of

from puna import cli
from puna.errors import CheckpointError, RecipeError
from puna.recsys import budget
from puna.recsys.config import DlrmConfig, ExchangeConfig
from puna.recsys.report import lines, report


def puna(*words):
    done = CliRunner().invoke(cli.puna, list(words), catch_exceptions=True)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_from_a_file_to_a_report(tmp_path):
    """import, train with the codec rehearsed in one process, report; raw beside it."""
    rng_lines = [f"{n % 3 == 0:d},{n % 11},c{n % 7},s{n % 40}\n" for n in range(3000)]
    (tmp_path / "clicks.csv").write_text("".join(rng_lines))
    words = (
        "--train",
        str(tmp_path / "clicks.csv"),
        "--columns",
        "label,dense:a,table:c,table:s",
        "--test-share",
        "0.2",
    )
    told = json.loads(puna("recsys", "import", *words, "--out", str(tmp_path / "out"), "--json"))
    assert told["splits"] == {"train": 2400, "test": 600}
    common = ("--data.path", str(tmp_path / "out"), "--dlrm.batch", "100", "--eval.tokens", "600", "--json")
    bounded = ("--exchange.forward", "bounded", "--exchange.backward", "bounded", "--exchange.local", "true")
    records = ("--exchange.record_every", "10", "--exchange.warmup", "2")
    runs = {name: str(tmp_path / name) for name in ("raw", "bounded")}
    for name, flags in (("raw", ()), ("bounded", (*bounded, *records))):
        figures = json.loads(puna("train", "dlrm-tiny", "--run.dir", runs[name], *common, *flags))
        assert figures["steps"] == 24
        assert 0 <= figures["heldout_auc"] <= 1
    found = json.loads(puna("recsys", "report", runs["bounded"], "--beside", runs["raw"], "--json"))
    assert [record["step"] for record in found["over_time"]] == [10, 20]
    assert [table["name"] for table in found["tables"]] == ["c", "s"]
    assert {table["class"] for table in found["tables"]} <= {"tight", "base", "loose"}
    assert found["ratio"]["forward"] > 1.5
    assert found["difference"]["auc"] == found["heldout"]["auc"] - found["beside"]["heldout"]["auc"]
    assert any(line.startswith("s ") for line in lines(found))
    with pytest.raises(CheckpointError, match="has no record of an exchange"):
        report(tmp_path / "raw")


def test_generate_names_its_tables(tmp_path):
    figures = json.loads(
        puna(
            "recsys",
            "generate",
            "--samples",
            "500",
            "--test",
            "100",
            "--tables",
            "50,9",
            "--out",
            str(tmp_path / "a"),
            "--json",
        )
    )
    assert figures["num_rows"] == 59


def test_the_largest_scale_that_fits_is_found():
    for limit in (*budget.SCALES, 0.0):
        asked = []

        def fits(scale, limit=limit, asked=asked):
            asked.append(scale)
            return scale <= limit

        assert budget.largest(fits) == (limit or None)
        assert len(asked) <= 4


def test_a_budget_chooses_bounds(planted):
    """A wide budget takes the largest bounds, a negative one none."""
    config = DlrmConfig(dim=4, bottom=(8,), top=(8,), batch=256, lr=0.2)
    exchange = ExchangeConfig(forward="bounded", classes=("base",) * 5)
    wide = budget.search(config, exchange, planted, 1.0, samples=2048)
    assert wide["scale"] == 4.0
    assert wide["base"] == pytest.approx(0.12)
    none = budget.search(config, exchange, planted, -1.0, samples=2048)
    assert none["scale"] is None
    assert none["ne_raw"] == wide["ne_raw"]
    with pytest.raises(RecipeError, match="has no bounds to choose"):
        puna("recsys", "tune", "dlrm-tiny")


def test_bounds_leave_training_close_and_wide_ones_do_not(planted):
    """The rehearsal is a rehearsal: with small bounds losses stay close to raw ones, with large ones they leave."""
    raw = steps(task_of(planted, table_lr=2.0), 40)
    wire = {"forward": "bounded", "classes": ("base",) * 5, "local": True, "decay_steps": 0}
    near = steps(task_of(planted, table_lr=2.0, exchange=wire | {"base": 0.001}), 40)
    far = steps(task_of(planted, table_lr=2.0, exchange=wire | {"base": 0.4}), 40)
    distance = [sum(abs(a - b) for a, b in zip(raw, other, strict=True)) for other in (near, far)]
    assert 0 < distance[0] < 0.1 * distance[1]


def test_the_plan_says_where_compression_pays(planted):
    """On a slow link it does for every table; on one faster than any codec it does for none."""
    words = ("--data.path", str(planted.folder), "--dlrm.dim", "32", "--ranks", "2", "--json")
    slow, fast = (
        json.loads(puna("plan", "exchange", "dlrm-tiny", *words, "--link", link)) for link in ("0.001", "1000000")
    )
    assert [table["name"] for table in slow["tables"]] == list(planted.tables)
    assert slow["tables"][0]["speedup"] > 2
    assert slow["speedup"] > 2
    assert {table["codec"] for table in fast["tables"]} == {"plain"}
    assert fast["speedup"] == 1
    with pytest.raises(RecipeError, match="exchanges no rows"):
        puna("plan", "exchange", "tiny")
