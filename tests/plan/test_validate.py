"""How far the planner is from published runs, with the constants that ship."""

import csv
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from puna.errors import DataError
from puna.plan import constants, runs, validate
from puna.plan.constants import load


@pytest.fixture(scope="session")
def published_path(data_dir: Path) -> Path:
    path = data_dir.parent / "planner" / "runs.csv"
    if not path.is_file():
        pytest.skip(f"no published runs at {path}")
    return path


@pytest.fixture(scope="session")
def published(published_path: Path) -> runs.Runs:
    return runs.read(published_path)


def test_the_errors_on_published_runs(published: runs.Runs) -> None:
    figures, rows = validate.validate(published, load())
    assert figures["n"] == len(rows) == len(published.runs)
    assert figures["skipped"].get("broken row", 0) <= 0.02 * figures["n"]
    assert figures["median_abs_pct_error_without_vts"] <= 8
    assert figures["p90_abs_pct_error_without_vts"] <= 25
    assert figures["source_balanced_median_without_vts"] <= 9
    assert figures["by_source"]["vts"]["median_abs_pct_error"] <= 12


@pytest.mark.parametrize(("kind", "most", "inside"), [("lora", 15, 70), ("moe", 30, 70)])
def test_rows_that_no_fit_saw(published_path: Path, kind: str, most: float, inside: float) -> None:
    """Adapters of low rank and mixtures: no constant was fitted to them, and a mixture's interval says so."""
    found = runs.read(published_path, (kind,))
    figures, _ = validate.validate(found, load())
    assert figures["n"] > 50
    assert figures["median_abs_pct_error"] <= most
    assert figures["interval_coverage_80"] >= inside


def test_the_memory_of_published_runs(published: runs.Runs) -> None:
    told = validate.memory(published.runs)
    assert told["n"] > 100
    assert told["median_abs_pct_error"] <= 10
    assert all(entry["reported"] for entry in told["by_source"].values())


def test_the_errors_with_each_source_left_out_are_kept_with_the_constants() -> None:
    figures = constants.about()["leave_one_source_out"]
    assert figures["median_abs_pct_error_without_vts"] <= 11
    assert figures["source_balanced_median_without_vts"] <= 13
    assert 70 <= figures["interval_coverage_80_without_vts"] <= 90


def test_the_constants_are_few() -> None:
    names = constants.Constants.names()
    by_stack = {"eager", "compiled", "megatron", "jax"}
    assert len(set(names) - by_stack) <= 15
    assert by_stack <= set(names)
    assert set(load().confidence()) == set(names)


def test_the_scores_by_hand() -> None:
    class Case:
        pass

    made = [runs.Run(f"{s}-{i}", s, Case(), 1.0) for s, n in (("a", 3), ("b", 4), ("vts", 3)) for i in range(n)]  # type: ignore[arg-type]
    middle = np.array([1.1] * 3 + [0.8] * 4 + [1.5] * 3)
    told = validate.scores(made, middle, middle * 0.85, middle * 1.2)
    assert told["n"] == 10
    assert told["source_balanced_median"] == pytest.approx((10 + 20 + 50) / 3, abs=0.01)
    assert told["source_balanced_median_without_vts"] == pytest.approx(15)
    assert told["mean_signed_pct_error_without_vts"] == pytest.approx((0.1 * 3 - 0.2 * 4) / 7 * 100, abs=0.01)
    assert told["interval_coverage_80"] == pytest.approx(30)


def test_predictions_are_written_for_every_row(published: runs.Runs, tmp_path: Path) -> None:
    _, rows = validate.validate(published, load())
    validate.write_predictions(rows, tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        back = list(csv.DictReader(file))
    assert [row["id"] for row in back] == [run.id for run in published.runs]
    for row in back:
        assert 0 < float(row["low_s"]) < float(row["predicted_s"]) < float(row["high_s"])


def test_a_file_without_usable_rows_has_the_same_keys(tmp_path: Path, published: runs.Runs) -> None:
    empty, _ = validate.validate(runs.Runs((), {"no speed": 3}, ()), load())
    whole, _ = validate.validate(published, load())
    assert set(empty) == set(whole)
    assert empty["n"] == empty["n_without_vts"] == 0
    assert empty["skipped"] == {"no speed": 3}
    assert empty["median_abs_pct_error"] is None
    grid = runs.Runs(tuple(run for run in published.runs if run.source == "vts")[:5], {}, ())
    figures, rows = validate.validate(grid, load())
    assert (figures["n"], figures["n_without_vts"], len(rows)) == (5, 0, 5)


def test_predictions_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"out\.csv cannot be written: No such file"):
        validate.write_predictions([], tmp_path / "nowhere" / "out.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv cannot be written: Is a directory"):
        validate.write_predictions([], tmp_path / "folder.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]


JUNK = (
    "", "nan", "inf", "-1", "0", "1e9", "1e300", "abc", "3.7", "  7 ", "1,5", "None", "H100", "fp8", "megatron",
    "zero3", "full", "0x10", "\x00", "true", "65536", "1e-9",
)  # fmt: skip


def test_no_junk_in_any_cell_is_a_trace(published_path: Path, tmp_path: Path) -> None:
    """Published rows with up to three cells replaced, and columns left out: predicted with an interval, or skipped."""
    with open(published_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    draw, path, quick = random.Random(7), tmp_path / "junk.csv", replace(load(), draws=load().draws[:1])
    needed = ("id", "gpu", *runs.KEY, "iter_time_s", "tokens_per_s_per_gpu")
    for _ in range(5):
        picked = [dict(row) for row in draw.sample(rows, 80)]
        for row in picked:
            row["kind"] = draw.choice(["dense", "moe", "lora", ""])
            row |= {key: draw.choice(JUNK) for key in draw.sample(list(row), draw.randint(1, 3))}
        columns = [key for key in rows[0] if key in needed or draw.random() < 0.7]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(picked)
        found = runs.read(path, ("dense", "moe", "lora"))
        figures, predicted = validate.validate(found, quick)
        assert len(found.runs) + sum(found.skipped.values()) == 80
        assert figures["n"] == len(predicted) == len(found.runs) > 5
        assert all(0 < row["low_s"] < row["predicted_s"] < row["high_s"] < 1e300 for row in predicted)
