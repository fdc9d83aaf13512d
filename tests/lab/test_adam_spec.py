"""Specifications of runs: what a file may hold, and what is said of one that may not."""

import json
from pathlib import Path

import pytest

from puna.errors import DataError
from puna.lab.adam_draw import DIVERGING, EVALUATION, HEALTHY, KINDS, draw
from puna.lab.adam_spec import RunSpec, read_specs

COMMITTED = Path(__file__).parents[2] / "bench" / "health_runs.json"


def written(tmp_path: Path, rows: object) -> Path:
    path = tmp_path / "runs.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


def test_a_file_of_runs(tmp_path: Path) -> None:
    row = {
        "cause": "stall",
        "seed": 3,
        "rate": 0.03,
        "tensors": ["model.layers.*"],
        "start": 2,
        "length": 150,
        "depth": 1e-9,
    }
    spec = read_specs(written(tmp_path, [row]))[0]
    assert (spec.title, spec.tensors, spec.depth) == ("stall-3", ("model.layers.*",), 1e-9)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("{", "runs.json cannot be read as JSON"),
        ({}, "runs.json holds no list of runs"),
        ([], "runs.json holds no list of runs"),
        (
            [{"cause": "x"}, {"cause": "x", "rat": 1}],
            r"run 1, rat: Extra inputs are not permitted.*puna lab adam --fields",
        ),
        ([{"rate": -1.0}], "run 0, rate: Input should be greater than 0"),
        ([{"tensors": ["*"]}], "run 0, the whole: .*a stall .* needs length"),
        ([{"seed": 1}, {"seed": 1}], "runs.json has two runs of the name none-1"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, rows: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_specs(written(tmp_path, rows))


def test_a_cause_holds_from_its_start_for_its_length() -> None:
    spec = RunSpec(start=10, length=5, beta2_after=0.3)
    assert [step for step in range(30) if spec.holds(step)] == [10, 11, 12, 13, 14]
    assert RunSpec(start=10, rate_after=1.0).holds(10_000)


def test_a_reference_has_nothing_that_goes_wrong() -> None:
    for kind in KINDS:
        spec = draw(kind, 7)
        calm = spec.reference()
        assert not calm.tensors
        assert calm.burst == "none"
        assert (calm.warmup_cut, calm.state_dtype, calm.rate_after, calm.beta2_after, calm.eps_after) == (
            False,
            "fp32",
            *[None] * 3,
        )
        assert (calm.seed, calm.rate, calm.eps, calm.beta2) == (spec.seed, spec.rate, spec.eps, spec.beta2)


def test_a_drawn_run_is_a_function_of_kind_and_seed() -> None:
    assert draw("stall", 11) == draw("stall", 11)
    assert draw("stall", 11) != draw("stall", 12)
    assert draw("eps", 11).rate != draw("warmup_cut", 11).rate


def test_the_committed_runs_are_draws_that_chose_no_threshold() -> None:
    specs = read_specs(COMMITTED)
    causes = [spec.cause for spec in specs]
    assert all(spec.seed >= EVALUATION for spec in specs)
    assert {cause: causes.count(cause) for cause in dict.fromkeys(causes)} == DIVERGING | HEALTHY
    assert specs == [draw(spec.cause, spec.seed) for spec in specs]
    assert sum(DIVERGING.values()) == sum(HEALTHY.values()) == 30
    assert DIVERGING["stall"] <= 15
